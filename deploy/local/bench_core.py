"""The engine's core in this process, as its benchmarks drive it: requests in, steps, and its parts by hand.

The only benchmark module that knows the core's inside; figures and printing are others' business.
"""

from __future__ import annotations

import gc
import inspect
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.core.build import build
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.loop import EngineLoop
from penstock.engine_service.core.messages import (
    AbortRequests,
    AddRequest,
    Configure,
    FromCore,
    Sampling,
    StepOutput,
)
from penstock.engine_service.models.config import ModelSpec, read_spec
from penstock.kernels import dispatch
from penstock.kernels.paged_attention import AttentionBatch, paged_attention
from penstock.kernels.sampling import draw_tokens
from penstock.local.bench_null import NullRunner

BLOCK_SIZE = 16
# Prompts are made of these ids and above: below any vocabulary's end, above the usual special tokens.
FIRST_ID = 10


class UnknownOption(Exception):
    """The engine of this version has no such option."""


class RequestFailed(Exception):
    """A request of a benchmark ended with an error."""


@dataclass(slots=True)
class Outbox:
    """Counts what the loop says, keeps none of it."""

    tokens: dict[int, int] = field(default_factory=dict)  # by request
    failure: str = ""

    def send(self, message: FromCore) -> None:
        if not isinstance(message, StepOutput):
            return
        for request in message.ids:
            self.tokens[request] = self.tokens.get(request, 0) + 1
        if message.failures:
            self.failure = message.failures[0].message


def configure(folder: Path, **options: Any) -> Configure:
    """Raises UnknownOption for an option that this engine does not have; empty values mean: not given."""
    known = inspect.signature(Configure).parameters
    given = {name: value for name, value in options.items() if value not in ("", None, False, 0)}
    for name in given:
        if name not in known:
            raise UnknownOption(f"--{name.replace('_', '-')}: this engine has no such option")
    return Configure(str(folder), **given)


class Engine:
    """A built core and its loop; one thread. Raises ModelError, UnknownOption, RequestFailed."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        asked = configure(folder, **options)
        self.spec: ModelSpec = read_spec(folder)
        built = build(asked, lambda done, total: None)
        self.max_num_batched_tokens = asked.max_num_batched_tokens
        self.dtype = str(built.ready.dtype)
        # Of the layers' matrices, in bytes; 0: the dtype's own.
        self.weight_itemsize = 1 if options.get("quantization", "") not in ("", "none") else 0
        self.num_blocks = int(built.ready.kv_blocks)
        self.block_size = int(built.ready.kv_block_size)
        self.outbox = Outbox()
        self._inbox = Inbox()
        self._loop = EngineLoop.of_model(asked, built.ready, built.runner, self._inbox, self.outbox)
        self.model: Any
        self.kv_caches: list[Tensor]
        self.model, self.kv_caches = _parts_of(built.runner)
        self.device: torch.device = self.kv_caches[0].device
        self._next_id = 0
        self._live: list[int] = []
        for cache in self.kv_caches:
            _fill_with_numbers(cache)
        self.build_s = time.perf_counter() - start

    @property
    def kv_itemsize(self) -> int:
        return self.kv_caches[0].element_size()

    @property
    def prefix_hits(self) -> int:
        """Prompt tokens found in the prefix cache so far."""
        return int(self._loop.load().prefix_cache_hits)

    @property
    def has_work(self) -> bool:
        return self._loop.has_work

    def add(self, prompt: list[int], max_new_tokens: int) -> int:
        """A greedy request that nothing but its length ends. Returns its id."""
        self._next_id += 1
        sampling = Sampling(temperature=0.0)
        now_us = time.monotonic_ns() // 1000
        request = AddRequest(
            self._next_id, prompt, sampling, max_new_tokens=max_new_tokens, arrival_us=now_us
        )
        self._inbox.put(request)
        self._live.append(self._next_id)
        return self._next_id

    def step(self) -> None:
        self._loop.step()
        if self.outbox.failure:
            raise RequestFailed(self.outbox.failure)

    def tokens_of(self, request: int) -> int:
        return self.outbox.tokens.get(request, 0)

    def clear(self) -> None:
        """Ends every request, and lets the loop come to rest."""
        self._inbox.put(AbortRequests(self._live))
        self._live = []
        self._loop.step()
        while self.has_work:
            self._loop.step()
        self.synchronize()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def decode_step(self, batch: int, context: int) -> Callable[[], object]:
        """One decode step's kernels without the loop: forward, logits, the greedy choice.

        `batch` sequences of `context` tokens, the new one included, in blocks scattered over the cache.
        """
        attention, slots = self._static_batch(batch, context, new_slots=True)
        ids = torch.randint(FIRST_ID, self.spec.vocab_size, (batch,), device=self.device)
        positions = torch.full((batch,), context - 1, dtype=torch.int64, device=self.device)
        step = _step_tensors(ids, positions, slots, attention)
        chosen = torch.zeros(batch, dtype=torch.int32, device=self.device)
        best = torch.zeros(batch, device=self.device)

        def run() -> object:
            attention.prepared.clear()
            hidden = self.model.forward(step, self.kv_caches)
            draw_tokens(self.model.logits(hidden), chosen, best)
            return chosen

        return run

    def attention_step(self, batch: int, context: int) -> Callable[[], object]:
        """Every layer's decode attention alone, one after the other, each over its own cache."""
        attention, _ = self._static_batch(batch, context, new_slots=False)
        spec = self.spec
        shape = (batch, spec.num_heads, spec.head_dim)
        dtype = self.kv_caches[0].dtype if self.kv_itemsize > 1 else torch.bfloat16
        query = torch.randn(shape, device=self.device).to(dtype)
        scale = spec.head_dim**-0.5

        def run() -> object:
            attention.prepared.clear()
            for cache, window in zip(self.kv_caches, spec.windows, strict=True):
                paged_attention(query, cache, attention, scale=scale, window=window)
            return None

        return run

    def recorded(self, work: Callable[[], object]) -> tuple[Callable[[], object], str]:
        """`work` as one CUDA graph where the kernels allow it, and how it is launched, in words."""
        if self.device.type != "cuda":
            return work, "called directly"
        if not self.has_device_attention:
            return work, "launched one by one"
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # a collection may free memory of the device, which no recording survives
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            reason = str(error).splitlines()[0][:120]
            return work, f"launched one by one (no graph: {reason})"
        finally:
            if collecting:
                gc.enable()
        return graph.replay, "one CUDA graph"

    @property
    def has_device_attention(self) -> bool:
        """Whether attention runs without asking the host for lengths, as a recording needs."""
        name = dispatch.implementation("paged_attention", self.device.type).__name__
        return name.rpartition(".")[2] not in (dispatch.REFERENCE, "cpu")

    def _static_batch(self, batch: int, context: int, *, new_slots: bool) -> tuple[AttentionBatch, Tensor]:
        """Raises ValueError when the cache is too small."""
        size = self.block_size
        each = -(-context // size)
        if batch * each > self.num_blocks:
            raise ValueError(f"{batch} sequences of {context} tokens do not fit the KV cache")
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(0))
        tables = order[: batch * each].view(batch, each)
        last = tables[:, (context - 1) // size] * size + (context - 1) % size
        # An implementation may want lengths on the host or on the device; a recording must not copy them.
        on_host = not (self.device.type == "cuda" and self.has_device_attention)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=self.device)
        attention = AttentionBatch(
            query_lens=[1] * batch if on_host else [],
            seq_lens=[context] * batch if on_host else [],
            num_decodes=batch,
            block_size=size,
            block_tables=tables.to(torch.int32 if not on_host else torch.int64).to(self.device),
            query_starts=starts,
            context_lens=torch.full((batch,), context, dtype=torch.int32, device=self.device),
            max_query_len=1,
            max_context_len=context,
        )
        return attention, last.to(self.device) if new_slots else last


def _parts_of(runner: Any) -> tuple[Any, list[Tensor]]:
    """The model and its caches, of the runner that computes at once or of the one that runs ahead."""
    work = getattr(runner, "_work", None)
    return (runner._model, runner._kv_cache) if work is None else (work._model, work._kv_caches)


def _step_tensors(ids: Tensor, positions: Tensor, slots: Tensor, attention: AttentionBatch) -> StepTensors:
    """With whatever further fields this version's step has left at their defaults."""
    values: dict[str, Any] = {
        "token_ids": ids,
        "positions": positions,
        "slots": slots,
        "attention": attention,
        "query_starts": list(range(len(ids))),
    }
    known = inspect.signature(StepTensors).parameters
    return StepTensors(**{name: value for name, value in values.items() if name in known})


@torch.inference_mode()
def _fill_with_numbers(cache: Tensor) -> None:
    """In place: zeros take less power than data, and so run faster."""
    if cache.element_size() > 1:
        cache.normal_()
    else:
        cache.view(torch.uint8).random_(0, 64)  # fp8: small positive numbers


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """No two share a first block, in one call or between seeds: nothing is found in a prefix cache."""
    source = random.Random(seed)
    return [[source.randrange(FIRST_ID, vocab_size) for _ in range(length)] for _ in range(count)]


def tensors_of(root: object) -> list[Tensor]:
    """Every tensor that an object holds, each storage once: attributes, closures, containers."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            # Packed layouts have no address to tell them by.
            key = id(value) if value.is_mkldnn else value.untyped_storage().data_ptr()
            found[key] = value
            continue
        stack.extend(_held_by(value))
    return list(found.values())


def _held_by(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if inspect.isfunction(value):
        return [cell.cell_contents for cell in value.__closure__ or ()]
    if inspect.ismethod(value):
        return [value.__self__]
    if not type(value).__module__.startswith("penstock."):
        return []
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    values = [getattr(value, name) for name in slots if hasattr(value, name)]
    return values + list(getattr(value, "__dict__", {}).values())


def null_loop(batch: int, context: int) -> tuple[EngineLoop, Inbox]:
    """A loop over a runner that computes nothing, with `batch` requests of `context` tokens put into it."""
    blocks = batch * (-(-context // BLOCK_SIZE) + 64) + 1
    inbox = Inbox()
    loop = EngineLoop(
        NullRunner(),
        inbox,
        Outbox(),
        num_blocks=blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=batch,
        max_num_batched_tokens=max(8192, batch),
        max_model_len=context + 1024,
    )
    for index, prompt in enumerate(random_prompts(batch, context, 50_000, seed=1)):
        inbox.put(AddRequest(index, prompt, Sampling(temperature=0.0), max_new_tokens=1000))
    return loop, inbox
