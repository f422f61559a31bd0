#!/bin/sh
# Regenerates the committed Python of the schemas in this folder. The virtual path gives imports that read
# `from penstock.protos import ...`. Usage: protos/generate.sh [OUTPUT_DIR], default: this folder.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/protos}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$root"
"${PYTHON:-python}" -m grpc_tools.protoc -Ipenstock/protos=protos \
  --python_out="$tmp" --pyi_out="$tmp" --grpc_python_out="$tmp" \
  penstock/protos/common.proto penstock/protos/engine.proto penstock/protos/tokenizer.proto
rm -f "$tmp"/penstock/protos/common_pb2_grpc.py
mkdir -p "$out"
cp "$tmp"/penstock/protos/*_pb2*.py* "$out"/
