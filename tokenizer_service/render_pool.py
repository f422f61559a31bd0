"""A few warm renderer processes and the line in front of them. Knows how to ask, not what a template is.

A render that passes its time limit costs its process, which is killed and replaced; the others go on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.protos.errors import ApiError, from_parts
from penstock.tokenizer_service.render_process import RendererGone, RenderProcess, RenderTimeout

log = logging.getLogger("penstock.tokenizer.renderers")

MAX_OUTPUT_BYTES = 4 << 20
MAX_WAITING = 256
# Python and Jinja start in a tenth of a second; a busy machine may need much longer.
START_LIMIT_S = 60.0
START_ATTEMPTS = 3
RESTART_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class RenderJob:
    """One render. The JSON fields are the caller's bytes, unparsed; empty where absent.

    content_format: "auto", "string" or "openai". special_tokens: template variables such as bos_token."""

    messages: bytes
    template: str = ""
    tools: bytes = b""
    documents: bytes = b""
    arguments: bytes = b""
    content_format: str = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_effort: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def parts(self) -> list[bytes]:
        head = {
            "op": "render",
            "content_format": self.content_format,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "reasoning_effort": self.reasoning_effort,
            "special_tokens": dict(self.special_tokens),
            "max_output_bytes": MAX_OUTPUT_BYTES,
        }
        template = self.template.encode("utf-8", "replace")
        payload = [self.messages, self.tools, self.documents, self.arguments]
        return [json.dumps(head).encode(), template, *payload]


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    content_format: str
    ends_in_reasoning: bool


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """content_format: "string" or "openai". variables: names the template reads from outside."""

    content_format: str
    variables: frozenset[str]


class RenderPool:
    def __init__(self, size: int, limit_s: float, on_kill: Callable[[str], None]) -> None:
        """size: processes. limit_s: seconds one render may take. on_kill(reason): called for each process
        that had to go ("timeout", "memory", "crash")."""
        self._size = size
        self._limit_s = limit_s
        self._on_kill = on_kill
        self._idle: asyncio.Queue[RenderProcess] = asyncio.Queue()
        self._all: set[RenderProcess] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()
        self._warm: tuple[str, ...] = ()
        self._waiting = 0
        self._closed = False

    @property
    def waiting(self) -> int:
        """Renders in line for a process."""
        return self._waiting

    def pids(self) -> list[int]:
        return [process.pid for process in self._all]

    async def start(self) -> None:
        """Starts all processes. Raises ApiError when none answers."""
        await asyncio.gather(*(self._add(START_ATTEMPTS) for _ in range(self._size)))
        if not self._all:
            raise ApiError("internal_error", "No template renderer could be started.")

    async def keep_warm(self, templates: Sequence[str]) -> None:
        """Compiles templates, which inspect() has accepted, in every process there is and will be."""
        self._warm = tuple(templates)
        idle = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for template in self._warm:
            await asyncio.gather(*(self._compile(process, template) for process in idle))
        for process in idle:
            self._idle.put_nowait(process)

    async def close(self) -> None:
        """Ends every process; renders in flight fail."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._ending, *(process.kill() for process in self._all))
        self._all.clear()

    async def inspect(self, template: str) -> TemplateInfo:
        """Raises ApiError (invalid_value) when the template is not valid Jinja."""
        head, _ = await self._ask(_inspection(template))
        return TemplateInfo(head["content_format"], frozenset(head["variables"]))

    async def render(self, job: RenderJob) -> Rendered:
        """Raises ApiError: invalid_* for what the caller sent or the limits refuse, queue_full and
        engine_overloaded when no process is free."""
        head, data = await self._ask(job.parts())
        return Rendered(data.decode("utf-8"), head["content_format"], head["ends_in_reasoning"])

    async def _ask(self, parts: list[bytes]) -> tuple[dict[str, Any], bytes]:
        for _ in range(2):
            process = await self._take()
            # A caller that leaves must not leave a half-read pipe: the exchange always runs to its end.
            task = self._spawn(self._exchange(process, parts))
            reply = await asyncio.shield(task)
            if reply is not None:
                break
        else:
            raise ApiError("invalid_value", "The chat template ended its renderer.", "messages")
        head, data = reply
        error = head.get("error")
        if error is not None:
            raise from_parts(error["reason"], error["message"], error["param"])
        return head, data

    async def _exchange(
        self, process: RenderProcess, parts: list[bytes]
    ) -> tuple[dict[str, Any], bytes] | None:
        """One question to one process, which then goes back in line or is replaced. None: it died."""
        cause = ""
        try:
            head, data = await process.ask(parts, self._limit_s, MAX_OUTPUT_BYTES)
            cause = "memory" if head.get("retire") else ""
            return head, data
        except RenderTimeout:
            cause = "timeout"
            text = f"Rendering the chat template took longer than {self._limit_s:g} s."
            return {"error": {"reason": "invalid_value", "message": text, "param": "messages"}}, b""
        except RendererGone:
            cause = "crash"
            return None
        finally:
            if cause:
                self._replace(process, cause)
            elif not self._closed:
                self._idle.put_nowait(process)

    async def _take(self) -> RenderProcess:
        if self._waiting >= MAX_WAITING:
            raise ApiError("queue_full", "Too many chat prompts are waiting to be rendered.")
        self._waiting += 1
        try:
            # Everyone ahead may use up the whole limit, but nobody waits for more than two of them.
            async with asyncio.timeout(2 * self._limit_s + 1.0):
                return await self._idle.get()
        except TimeoutError as error:
            raise ApiError("engine_overloaded", "No template renderer became free in time.") from error
        finally:
            self._waiting -= 1

    def _replace(self, process: RenderProcess, cause: str) -> None:
        self._all.discard(process)
        self._on_kill(cause)
        log.warning("replacing a template renderer", extra={"cause": cause})
        if not self._closed:
            self._spawn(self._add())
        # Not one of the tasks that close() cancels: a killed process is always collected.
        ending = asyncio.get_running_loop().create_task(process.kill())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _add(self, attempts: int | None = None) -> None:
        """Starts one process and puts it in line; tries again until it works or the pool closes."""
        for attempt in itertools.count(1):
            process = None
            try:
                process = await RenderProcess.start(self._limit_s)
                self._all.add(process)
                for template in ("", *self._warm):
                    await self._compile(process, template)
            except (OSError, RendererGone, RenderTimeout) as error:
                log.error("a template renderer did not start", extra={"cause": type(error).__name__})
                if process is not None:
                    self._all.discard(process)
                    await process.kill()
                if attempt == attempts:
                    return
                await asyncio.sleep(RESTART_PAUSE_S)
                continue
            self._idle.put_nowait(process)
            return

    async def _compile(self, process: RenderProcess, template: str) -> None:
        await process.ask(_inspection(template), START_LIMIT_S, MAX_OUTPUT_BYTES)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _inspection(template: str) -> list[bytes]:
    return [json.dumps({"op": "inspect"}).encode(), template.encode("utf-8", "replace")]
