"""Every figure that needs a GPU, in parts (`make bench-gpu`): each prints its tables, and leaves them too.

    PYTHONPATH=.dev python3 benchmarks/gpu.py [--parts kernels,llama-3-8b] [--out FOLDER] [-- THEIR OPTIONS]

Needs the packages of a GPU image only, and no network. A part that runs longer than --minutes is ended; the
others run all the same. Without a GPU, try the parts themselves with small options.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("llama-3-8b", "qwen2.5-7b", "qwen3-0.6b", "qwen2.5-0.5b")
ENGINE = ("-m", "penstock.local.bench_engine")
PARTS: dict[str, tuple[str, ...]] = {
    "kernels": ("-m", "penstock.local", "bench", "kernels"),
    **{shape: (*ENGINE, "--shape", shape) for shape in SHAPES},
    "eager": (*ENGINE, "--shape", "llama-3-8b", "--batch", "1,32", "--parts", "decode", "--enforce-eager"),
    "fp8": (*ENGINE, "--shape", "llama-3-8b", "--quantization", "fp8", "--kv-cache-dtype", "fp8"),
    "transformers": ("benchmarks/transformers_continuous.py", "--shape", "llama-3-8b"),
}


def run(part: str, out: Path, extra: list[str], minutes: float) -> int:
    """Its exit code; 124 when it took too long. What it printed goes to the screen and to OUT/<part>.md."""
    words = [sys.executable, *PARTS[part], "--json", str(out / f"{part}.json"), *extra]
    print(f"== {part}: {' '.join(words[1:])}", file=sys.stderr, flush=True)
    start = time.monotonic()
    # A session of its own, so that what the part started ends with it.
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=60 * minutes)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        code = 124
    print(said, flush=True)
    (out / f"{part}.md").write_text(said, encoding="utf-8")
    print(f"== {part}: exit {code} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench-results"), help="default $OUT"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="longest time of a part")
    parser.add_argument("extra", nargs="*", metavar="OPTION", help="after --, for every part that runs")
    options = parser.parse_args()
    parts = options.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]!r} is not known; known: {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    codes = {part: run(part, options.out.resolve(), options.extra, options.minutes) for part in parts}
    failed = [f"{part} ({code})" for part, code in codes.items() if code]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
