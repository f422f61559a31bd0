"""Nothing in a step's start waits for the device, seen without one: its tensors have no memory here.

A tensor of the device "meta" has a shape and no numbers, so whatever would read one on the host raises. The
kernels are not run; their launches are counted. What torch's sync debug mode says of a GPU is in
test_device_kernels.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from device_driver import AHEAD, IN_TURN, NUM_SLOTS, Driver, Job, device_runner, load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.engine_service.backends.base import Linear
from penstock.engine_service.core.accelerator import CpuAccelerator, Event
from penstock.engine_service.core.device_runner import DeviceRunner
from penstock.engine_service.core.device_step import StepWork
from penstock.engine_service.core.graphs import Bucket
from penstock.engine_service.core.plan import Step, StepPlan
from penstock.kernels import dispatch
from penstock.kernels.paged_attention import tiling

pytest.importorskip("triton")

Folder = Callable[..., Path]
META = torch.device("meta")
PROMPT = list(range(1, 20))


class MetaBackend:
    device, threads = META, 1

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        placed, offset = self.place(weight), None if bias is None else self.place(bias)
        return lambda x: F.linear(x, placed, offset)

    def head(self, weight: Tensor) -> Linear:
        return self.linear(weight, None)

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(META)

    def available_memory(self) -> int:
        return 1 << 40

    def kv_cache_budget(self, gpu_memory_utilization: float) -> int:
        return 1 << 40

    def synchronize(self) -> None:
        return


class MetaAccelerator(CpuAccelerator):
    """Nothing ever arrives: host buffers stay as they are, all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.device = META

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def copy_out(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Event:
        for target, source in pairs:
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            assert target.is_contiguous()
            assert source.is_contiguous()
        return self.mark()


class NoBlockingCopies(TorchDispatchMode):
    """A copy from the host that the host waits for is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        if isinstance(out, Tensor) and out.device == META and "non_blocking" in names:
            source = given.get("src", given.get("self"))
            from_host = isinstance(source, Tensor) and source.device.type == "cpu"
            assert not from_host or given.get("non_blocking"), f"the host waits for a copy: {func}"
        return out


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel was launched; none is run."""
    from triton.runtime import interpreter

    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a GPU")
    seen: Counter[str] = Counter()
    monkeypatch.setattr(
        interpreter.InterpretedFunction,
        "run",
        lambda kernel, *args, **options: seen.update([kernel.__name__]),
    )
    chosen = [op for op in dispatch.ops() if dispatch.has(op, "triton")]
    for op in chosen:
        dispatch.choose(op, "triton")
    yield seen
    for op in chosen:
        dispatch.choose(op, None)


@pytest.fixture
def runner(launches: Counter[str], tiny_checkpoint: Folder, monkeypatch: pytest.MonkeyPatch) -> DeviceRunner:
    made = device_runner(load(tiny_checkpoint("qwen3"), MetaBackend()), MetaAccelerator(), torch.float32)
    start = made.start

    def guarded(plan: StepPlan) -> Step:
        with NoBlockingCopies():
            return start(plan)

    monkeypatch.setattr(made, "start", guarded)
    return made


@pytest.mark.parametrize("lookahead", [True, False])
def test_starting_a_step_does_not_wait(runner: DeviceRunner, launches: Counter[str], lookahead: bool) -> None:
    kinds = AHEAD if lookahead else AHEAD + IN_TURN
    jobs = [Job(PROMPT, 4, start=i // 3, chunk=7, sampling=kind) for i, kind in enumerate(kinds)]
    done = Driver(runner, lookahead=lookahead, spoiled=False).run(jobs)
    assert not any(job.errors for job in done)
    sampled = {"draw_chunks", "pick", "summarize", "find_bounds", "change_pairs", "sum_chunks", "join_chunks"}
    assert sampled <= set(launches)
    assert lookahead or launches["penalise_pairs"]


def test_drafts_and_block_copies_do_not_wait(runner: DeviceRunner, launches: Counter[str]) -> None:
    driver = Driver(runner, lookahead=False, spoiled=False)
    start, drafted = runner.start, 0

    def changed(plan: StepPlan) -> Step:
        nonlocal drafted
        plan.copies = np.array([[0, 1], [2, 3]])
        if plan.counts.max() > 1:
            plan.drafts = {row: np.zeros(plan.counts[row] - 1, np.int32) for row in range(len(plan))}
            drafted += 1
        return start(plan)

    runner.start = changed  # type: ignore[method-assign]
    driver.run([Job(PROMPT[:5], 3), Job(PROMPT[:3], 3, sampling={"logprobs": 2})])
    assert drafted
    assert launches["draw_chunks"]


@pytest.mark.parametrize(
    "waits",
    [
        lambda hidden: hidden.sum().item(),
        lambda hidden: hidden[hidden > 0],
        lambda hidden: hidden[:1, 0].copy_(torch.ones(1)),
        lambda hidden: torch.ones(1).to(META),
    ],
    ids=["item", "mask", "copy", "to"],
)
def test_what_waits_is_seen(
    runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch, waits: Callable[[Tensor], object]
) -> None:
    run = StepWork.run

    def run_and_wait(work: StepWork, bucket: Bucket) -> None:
        run(work, bucket)
        waits(work.hidden)

    monkeypatch.setattr(StepWork, "run", run_and_wait)
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match=r"meta|waits for a copy"):
        Driver(runner, lookahead=False, spoiled=False).run([Job(PROMPT, 1)])


@pytest.mark.parametrize("family", ["llama3", "qwen3", "opt"])
def test_six_launches_of_ours_a_layer(
    launches: Counter[str], tiny_checkpoint: Folder, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Beside its four products, behind a context long enough to be split: two norms, cache write, attention
    and its merge, activation."""
    monkeypatch.setattr(tiling, "_SHORTEST_SPLIT", 16)
    loaded = load(tiny_checkpoint(family), MetaBackend())
    runner = device_runner(loaded, MetaAccelerator())
    with torch.inference_mode():
        runner._work.run(Bucket.of_decodes(NUM_SLOTS))
    layers = loaded[0].num_layers
    assert launches.pop("_build_inputs") == 1
    assert launches.pop("_norm_rows") == 2 * layers + 1  # the head's
    own = ("_rotate_and_write", "split_attention", "merge_parts", "_activate")
    assert launches == dict.fromkeys(own, layers)
