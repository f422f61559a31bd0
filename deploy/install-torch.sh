#!/bin/sh
# Installs the pinned torch into the interpreter given as $1, before anything else can ask for it.
# A plain install takes the newest build with gigabytes of CUDA packages, so the order is: a wheel that pip already
# finds on this machine, the CPU index (unless a GPU is wanted), the default index.
# $2: "cpu", "cuda" or "auto" (cuda where nvidia-smi is on the path).
set -eu
python=$1
kind=${2:-auto}
torch=$(grep '^torch==' "$(dirname "$0")/../constraints.txt")
pip="$python -m pip install --quiet --disable-pip-version-check --no-deps"
if [ "$kind" = auto ]; then
  if command -v nvidia-smi >/dev/null 2>&1; then kind=cuda; else kind=cpu; fi
fi
if $python -c "import importlib.metadata as m, sys; sys.exit('$torch' != 'torch==' + m.version('torch').split('+')[0])" \
  2>/dev/null; then exit 0; fi
$pip --no-index "$torch" 2>/dev/null && exit 0
if [ "$kind" = cpu ]; then
  $pip --retries 1 --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch" && exit 0
fi
$pip "$torch"
