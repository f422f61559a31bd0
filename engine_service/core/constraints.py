"""Compiles the constraints of arriving requests while the loop goes on. Knows no scheduling and no logits.

A request waits, held, until its grammar is there: the answer comes through the inbox, as any other message.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict

from penstock.engine_service.core.constraint_state import CompiledGrammar
from penstock.engine_service.core.grammar_compiler import GrammarCompiler
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.messages import AddRequest, Prepared, RequestError

log = logging.getLogger("penstock.engine.constraints")

MAX_ENTRIES = 256
MAX_BYTES = 64 << 20
# What a compiled grammar was seen to take: the worst of large schemas, and the least.
_BYTES_PER_CHARACTER = 128
_LEAST_BYTES = 8 << 10


class Constraints:
    """The least recently used grammars stay compiled. Its thread starts with the first request or warm-up."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._bytes = 0
        self._questions: queue.SimpleQueue[tuple[AddRequest, Inbox] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def prepare(self, params: AddRequest, inbox: Inbox) -> None:
        """Compiles the constraint of a request; the inbox gets a Prepared."""
        self._ask((params, inbox))

    def warm_up(self) -> None:
        """Reads the tokenizer now. With a large vocabulary that stops all of the process for up to a second,
        because the library keeps Python's lock: left to the first request, it stops the others' steps."""
        self._ask(None)

    @property
    def num_bytes(self) -> int:
        """What the cache takes, estimated."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._cache)

    def _ask(self, question: tuple[AddRequest, Inbox] | None) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="constraints", daemon=True)
            self._thread.start()
        self._questions.put(question)

    def _work(self) -> None:
        while True:
            question = self._questions.get()
            if question is None:
                self._read_tokenizer()
                continue
            params, inbox = question
            try:
                if params.constraint is None:
                    raise ValueError("a request without a constraint")
                inbox.put(Prepared(params.id, self.compiled(params.constraint.grammar)))
            except RequestError as error:
                inbox.put(Prepared(params.id, error=error))
            except Exception:
                log.exception("the constraint of request %d could not be compiled", params.id)
                failed = RequestError("internal_error", "The constraint could not be compiled.")
                inbox.put(Prepared(params.id, error=failed))

    def _read_tokenizer(self) -> None:
        try:
            _ = self._compiler.tokenizer
        except Exception as error:
            log.warning("no constraints: the library cannot read the tokenizer: %s", error)

    def compiled(self, source: str) -> CompiledGrammar:
        """The grammar, kept for the requests that come with it. Not while others are prepared. Raises
        GrammarError."""
        found = self._cache.get(source)
        if found is not None:
            self._cache.move_to_end(source)
            return found
        found = CompiledGrammar(self._compiler.compile(source), self._compiler.tokenizer)
        self._cache[source] = found
        self._bytes += _weight(source)
        while len(self._cache) > 1 and (len(self._cache) > MAX_ENTRIES or self._bytes > MAX_BYTES):
            evicted, _ = self._cache.popitem(last=False)
            self._bytes -= _weight(evicted)
        return found


def _weight(source: str) -> int:
    return _LEAST_BYTES + _BYTES_PER_CHARACTER * len(source)
