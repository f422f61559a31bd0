"""A process that checks constraints: what hurts the library hurts no request, and what takes too long is
killed with it. Knows no requests.

Run as `python -P -m penstock.engine_service.core.grammar_process --parent PID TOKENIZER VOCAB EOS...`.
Reads one JSON object a line, the fields of a ConstraintSource; writes {"grammar"} or {"reason", "message"}.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from penstock.engine_service.core.child import EXIT_OK, follow_parent
from penstock.engine_service.core.grammar_compiler import GrammarCompiler
from penstock.engine_service.core.grammar_source import GrammarError, behind, grammar_of
from penstock.engine_service.core.messages import ConstraintSource

_NICE = 5
_MEMORY_BYTES = 4 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    follow_parent(options.parent)
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    compiler = GrammarCompiler(Path(options.tokenizer), options.vocab_size, options.eos)
    serve(compiler, sys.stdin.buffer, sys.stdout.buffer)
    return EXIT_OK


def serve(compiler: GrammarCompiler, questions: BinaryIO, answers: BinaryIO) -> None:
    """Answers until the questions end."""
    for line in questions:
        answers.write(json.dumps(answer(compiler, ConstraintSource(**json.loads(line)))).encode() + b"\n")
        answers.flush()


def answer(compiler: GrammarCompiler, source: ConstraintSource) -> dict[str, Any]:
    try:
        grammar = grammar_of(source)
        # On its own first: behind a preamble, what is wrong with it would show in the midst of an answer.
        compiler.compile(grammar)
        if source.preamble:
            grammar = behind(source.preamble, grammar)
            compiler.compile(grammar)
        return {"grammar": grammar}
    except GrammarError as error:
        return {"reason": error.reason, "message": error.message}
    except MemoryError:
        return {"reason": "grammar_too_complex", "message": "The constraint needs too much memory."}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return {"reason": "invalid_grammar", "message": f"The constraint is not valid: {str(error)[:500]}"}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="penstock-grammars")
    parser.add_argument("--parent", type=int, default=0, help="process id of the parent")
    parser.add_argument("tokenizer", help="the model's tokenizer.json")
    parser.add_argument("vocab_size", type=int)
    parser.add_argument("eos", type=int, nargs="*", help="end-of-sequence ids")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
