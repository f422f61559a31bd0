"""From a new process to its first token: run as a process of its own by `penstock bench engine`.

    python -m penstock.local.bench_start FOLDER OPTIONS PROMPT_TOKENS STARTED

OPTIONS is a JSON object of engine options; STARTED the monotonic clock, in seconds, when the parent asked for
the process. Prints one JSON object of seconds since then.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMEOUT_S = 500.0


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds since the process was asked for."""

    imported_s: float
    built_s: float
    first_token_s: float
    prompt_tokens: int


class StartFailed(Exception):
    """The process ended without a first token."""


def measure(folder: Path, options: Mapping[str, Any], prompt_tokens: int) -> Start:
    """Raises StartFailed with the last line the process said."""
    words = [sys.executable, "-m", "penstock.local.bench_start", str(folder), json.dumps(dict(options))]
    words += [str(prompt_tokens), repr(time.monotonic())]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise StartFailed(f"no first token within {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise StartFailed(said[-1] if said else f"ended with {done.returncode}")
    return Start(**json.loads(done.stdout.strip().splitlines()[-1]))


def main(arguments: list[str] | None = None) -> int:
    folder, options, tokens, started = sys.argv[1:5] if arguments is None else arguments
    since = float(started)
    from penstock.local.bench_core import Engine, random_prompts

    imported = time.monotonic() - since
    engine = Engine(Path(folder), json.loads(options))
    built = time.monotonic() - since
    [prompt] = random_prompts(1, int(tokens), engine.spec.vocab_size, seed=7)
    request = engine.add(prompt, 2)
    while not engine.tokens_of(request):
        engine.step()
    start = Start(imported, built, time.monotonic() - since, int(tokens))
    engine.clear()
    print(json.dumps({name: getattr(start, name) for name in Start.__slots__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
