"""Asks a process of its own whether constraints can be enforced, and keeps what it said. Knows no requests.

The process starts with the first question. One that takes too long, or that the process does not survive, is
refused; the process is replaced, and whoever waits behind goes on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from penstock.engine_service.core.messages import ConstraintSource, Ready
from penstock.protos.child_process import PIPE, ChildProcess
from penstock.protos.errors import ApiError, from_parts

log = logging.getLogger("penstock.engine.grammars")

LIMIT_S = 5.0
# The process reads the tokenizer with its first question, on a machine that may be busy.
START_LIMIT_S = 60.0
MAX_WAITING = 64
MAX_ENTRIES = 256
MAX_BYTES = 16 << 20
_MAX_ANSWER_BYTES = 64 << 20
_COMMAND = (sys.executable, "-P", "-m", "penstock.engine_service.core.grammar_process")

Verdict = str | ApiError  # the grammar as the core takes it, or why there is none


class GrammarChecks:
    """One question at a time; the latest verdicts are remembered."""

    def __init__(
        self, model_folder: Path, *, limit_s: float = LIMIT_S, command: Sequence[str] = _COMMAND
    ) -> None:
        self._tokenizer = model_folder / "tokenizer.json"
        self._limit_s = limit_s
        self._command = command
        self._turn = asyncio.Lock()
        self._process: ChildProcess | None = None
        self._fresh = True
        self._verdicts: OrderedDict[ConstraintSource, Verdict] = OrderedDict()
        self._bytes = 0
        self._exchanges: dict[ConstraintSource, asyncio.Task[Verdict]] = {}

    def known(self, source: ConstraintSource) -> str | None:
        """The grammar of a source that was asked for lately. Raises ApiError if it was refused."""
        verdict = self._verdicts.get(source)
        if verdict is None:
            return None
        self._verdicts.move_to_end(source)
        return _grammar(verdict)

    async def grammar(self, source: ConstraintSource, ready: Ready) -> str:
        """The grammar of a source. Raises ApiError: invalid_grammar, grammar_too_complex, and queue_full when
        too many wait. A caller that leaves does not end the question."""
        found = self.known(source)
        if found is not None:
            return found
        exchange = self._exchanges.get(source)
        if exchange is None:
            if len(self._exchanges) >= MAX_WAITING:
                raise ApiError("queue_full", "Too many constraints are waiting to be checked.")
            exchange = asyncio.create_task(self._exchange(source, ready))
            self._exchanges[source] = exchange
            exchange.add_done_callback(lambda _: self._exchanges.pop(source, None))
        return _grammar(await asyncio.shield(exchange))

    async def close(self) -> None:
        """Ends the process; questions in flight fail."""
        for exchange in list(self._exchanges.values()):
            exchange.cancel()
        await asyncio.gather(*self._exchanges.values(), return_exceptions=True)
        await self._end()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def _exchange(self, source: ConstraintSource, ready: Ready) -> Verdict:
        async with self._turn:
            try:
                verdict = await self._ask(source, ready)
            except (OSError, ValueError, EOFError) as error:  # a timeout is an OSError
                log.warning("the grammar process was lost", exc_info=error)
                await self._end()
                if self._fresh:  # it was not the question's fault that there is none
                    return ApiError("internal_error", "Constraints cannot be checked.")
                why = f"took longer than {self._limit_s:g} s" if isinstance(error, TimeoutError) else "failed"
                text = f"Compiling the constraint {why}."
                verdict = ApiError("grammar_too_complex", text, f"constraint.{source.kind}")
            except asyncio.CancelledError:
                await self._end()
                raise
        self._remember(source, verdict)
        return verdict

    async def _ask(self, source: ConstraintSource, ready: Ready) -> Verdict:
        """Raises TimeoutError, OSError, ValueError, EOFError."""
        if self._process is None or self._process.returncode is not None:
            await self._start(ready)
        async with asyncio.timeout(self._limit_s):
            answer = await self._say(source)
        if "grammar" in answer:
            return str(answer["grammar"])
        return from_parts(str(answer["reason"]), str(answer["message"]), f"constraint.{source.kind}")

    async def _start(self, ready: Ready) -> None:
        self._fresh = True
        self._process = await ChildProcess.start(
            [
                *self._command,
                "--parent",
                str(os.getpid()),
                str(self._tokenizer),
                str(ready.vocab_size),
                *map(str, ready.eos_token_ids),
            ],
            stdin=PIPE,
            stdout=PIPE,
            limit=_MAX_ANSWER_BYTES,
            start_new_session=True,
        )
        async with asyncio.timeout(START_LIMIT_S):
            await self._say(ConstraintSource("json_object"))
        self._fresh = False

    async def _say(self, source: ConstraintSource) -> dict[str, object]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError("there is no process")
        process.stdin.write(json.dumps(dataclasses.asdict(source)).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the process ended")
        answer: dict[str, object] = json.loads(line)
        return answer

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.end()

    def _remember(self, source: ConstraintSource, verdict: Verdict) -> None:
        self._verdicts[source] = verdict
        self._bytes += _weight(source, verdict)
        while len(self._verdicts) > 1 and (len(self._verdicts) > MAX_ENTRIES or self._bytes > MAX_BYTES):
            self._bytes -= _weight(*self._verdicts.popitem(last=False))


def _weight(source: ConstraintSource, verdict: Verdict) -> int:
    return len(source.text) + (len(verdict) if isinstance(verdict, str) else 0) + 1024


def _grammar(verdict: Verdict) -> str:
    if isinstance(verdict, ApiError):
        raise from_parts(verdict.reason, verdict.message, verdict.param)
    return verdict
