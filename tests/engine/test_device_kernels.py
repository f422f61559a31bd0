"""The device runner over Triton kernels, in their interpreter, and on a GPU with real graphs."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_driver import AHEAD, IN_TURN, MAX_TOKENS, NUM_BLOCKS, Driver, Job, device_runner, load
from in_process import Harness
from transformers import AutoModelForCausalLM

from penstock.engine_service.backends.cuda import CudaBackend
from penstock.engine_service.core.accelerator import CudaAccelerator
from penstock.engine_service.core.build import build
from penstock.engine_service.core.device_memory import measure
from penstock.engine_service.core.device_rehearsal import rehearse
from penstock.engine_service.core.device_runner import DeviceRunner
from penstock.engine_service.core.messages import AddRequest, Configure, Sampling
from penstock.engine_service.core.plan import Step, StepPlan
from penstock.kernels import dispatch

pytest.importorskip("triton")

Folder = Callable[..., Path]
DICE = random.Random(12)
PROMPTS = [[DICE.randrange(256) for _ in range(count)] for count in (17, 1, 66, 5, 40, 2, 16, 33, 8)]
NEW = 10


# Rows of padding are whatever was in memory, and numpy minds.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_in_the_interpreter(family: str, tiny_checkpoint: Folder) -> None:
    """Every op that has one runs its Triton kernel, recorded and one step ahead."""
    loaded = load(tiny_checkpoint(family))

    def work() -> list[Job]:
        return [Job(PROMPTS[1], 3), Job(PROMPTS[3], 2, chunk=3)]

    dispatch.choose("paged_attention", "reference")
    expected = [Driver(device_runner(loaded), lookahead=False).run([job])[0].tokens for job in work()]
    chosen = [op for op in dispatch.ops() if dispatch.has(op, "triton")]
    assert {"inputs", "paged_attention"} <= set(chosen)
    try:
        for op in chosen:
            dispatch.choose(op, "triton")
        runner = device_runner(loaded, num_slots=2, max_tokens=8)
        done = Driver(runner, lookahead=True, num_slots=2).run(work(), max_tokens=8)
        assert [job.tokens for job in done] == expected
    finally:
        for op in chosen:
            dispatch.choose(op, None)


@pytest.fixture(scope="module")
def accelerator() -> CudaAccelerator:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return CudaAccelerator(torch.device("cuda", 0))


@contextmanager
def no_sync() -> Iterator[None]:
    """Whatever waits for the device, events apart, is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def jobs(**options: Any) -> list[Job]:
    return [Job(prompt, NEW, **options) for prompt in PROMPTS]


def tokens(done: list[Job]) -> list[list[int]]:
    assert not any(job.errors for job in done)
    return [job.tokens for job in done]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama3", "qwen3", "opt"])
def test_greedy_in_float32_equals_transformers(
    family: str, tiny_checkpoint: Folder, accelerator: CudaAccelerator
) -> None:
    folder = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        expected.append(made[0, len(prompt) :].tolist())
    loaded = load(folder, CudaBackend())
    for record in (True, False):
        for lookahead in (True, False):
            runner = device_runner(loaded, accelerator, record=record)
            runner.record_decodes()
            driver = Driver(runner, lookahead=lookahead)
            assert tokens(driver.run(jobs())) == expected
            ragged = jobs(chunk=7)
            for number, job in enumerate(ragged):
                job.start, job.chunk = driver.num_steps + number, 3 + 5 * (number % 3)
                job.preempt_at = len(job.prompt) + 3 if number % 4 == 1 else -1
            assert tokens(driver.run(ragged, max_tokens=29)) == expected
            assert bool(runner.graphs.recorded) == record


@pytest.mark.gpu
def test_bfloat16_is_the_same_recorded_and_ahead(
    tiny_checkpoint: Folder, accelerator: CudaAccelerator
) -> None:
    """The same buckets run the same kernels: as none stands in for another, not a bit may differ."""
    loaded = load(tiny_checkpoint("llama3", dtype="bfloat16"), CudaBackend())
    said = []
    for record in (True, False):
        runner = device_runner(loaded, accelerator, torch.bfloat16, record=record)
        with torch.inference_mode():
            for bucket in runner._buckets.varied() if record else []:
                assert runner.graphs.record(bucket)
        said.append(tokens(Driver(runner, lookahead=record).run([Job(PROMPTS[4], 40)])))
    assert said[0] == said[1]


@pytest.mark.gpu
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("lookahead", [True, False])
def test_starting_a_step_does_not_wait_for_the_device(
    tiny_checkpoint: Folder,
    accelerator: CudaAccelerator,
    record: bool,
    lookahead: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decodes and mixed steps, and rows of each kind: alone, so that none hides behind another, and all."""
    runner = device_runner(
        load(tiny_checkpoint("llama3"), CudaBackend()), accelerator, record=record, lookahead=lookahead
    )
    runner.warm_up()
    runner.record_decodes()
    driver = Driver(runner, lookahead=lookahead, spoiled=False)
    # Recording a further shape is the one thing that waits.
    monkeypatch.setattr(runner.graphs, "record_due", lambda: False)
    kinds = AHEAD if lookahead else AHEAD + IN_TURN
    start, seen = runner.start, set()

    def guarded(plan: StepPlan) -> Step:
        seen.add(bool(plan.counts.max() == 1))
        plan.copies = np.array([[0, NUM_BLOCKS]])  # as a beam search has them, to where anything may stand
        with no_sync():
            return start(plan)

    def all_of_them(first: int) -> list[Job]:
        chosen = zip(PROMPTS + PROMPTS, kinds, strict=False)
        return [
            Job(prompt, NEW, start=first + number // 3, chunk=16, sampling=kind)
            for number, (prompt, kind) in enumerate(chosen)
        ]

    driver.run(all_of_them(0))  # compiles what padding alone does not
    monkeypatch.setattr(runner, "start", guarded)
    for kind in kinds:
        assert tokens(driver.run([Job(PROMPTS[4], 4, sampling=kind)]))
    assert tokens(driver.run(all_of_them(driver.num_steps)))
    assert seen == {True, False}


@pytest.mark.gpu
def test_memory_is_measured_with_the_largest_step(
    tiny_checkpoint: Folder, accelerator: CudaAccelerator
) -> None:
    loaded = load(tiny_checkpoint("llama3"), CudaBackend())

    def run() -> None:
        runner = device_runner(loaded, accelerator, record=False)
        rehearse(runner, runner._limits)

    memory = measure(run, accelerator)
    assert memory.step >= MAX_TOKENS * loaded[0].vocab_size
    assert 0 < memory.used < memory.total
    assert memory.kv_budget(0.9, record=True) < memory.total


@pytest.mark.gpu
def test_what_recordings_keep_is_not_counted_as_free(accelerator: CudaAccelerator) -> None:
    size, slack = 256 << 20, 32 << 20
    own = CudaAccelerator(accelerator.device)

    def make() -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=own.device).zero_()

    gc.collect()
    torch.cuda.empty_cache()
    free = own.free_memory()
    kept = make()
    assert own.free_memory() <= free - size + slack
    del kept
    # The allocator has it still, for whoever comes next.
    assert own.free_memory() >= free - slack
    assert size <= own.peak_memory(make) <= size + slack
    replay = own.record(make)
    assert own.free_memory() <= free - size + slack
    replay()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_whole_engine(tiny_checkpoint: Folder, accelerator: CudaAccelerator) -> None:
    """Built as it is served, its sequences alone and together: the same tokens, all memory accounted for."""
    configure = Configure(
        str(tiny_checkpoint("llama3")),
        device="cuda",
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=MAX_TOKENS,
        gpu_memory_utilization=0.5,
    )
    made = build(configure, lambda done, total: None)
    assert isinstance(made.runner, DeviceRunner)
    assert made.runner.graphs.recorded
    harness = Harness(
        made.runner,
        num_blocks=made.num_blocks,
        max_num_seqs=8,
        max_num_batched_tokens=MAX_TOKENS,
        max_model_len=128,
    )

    def requests(first: int) -> list[AddRequest]:
        return [
            AddRequest(
                first + i, prompt, Sampling(temperature=0.8 * (i % 2), seed=i, top_k=20), max_new_tokens=NEW
            )
            for i, prompt in enumerate(PROMPTS)
        ]

    alone = [harness.generate(request)[request.id].tokens[0] for request in requests(0)]
    harness.generate(*requests(100))
    assert [harness.said[100 + i].tokens[0] for i in range(len(PROMPTS))] == alone
