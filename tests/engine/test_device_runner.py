"""The device runner on the CPU: padded, replayed and one step ahead, it says what transformers says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_driver import (
    BLOCK_SIZE,
    MAX_LEN,
    MAX_TOKENS,
    NUM_BLOCKS,
    NUM_SLOTS,
    Driver,
    Job,
    device_runner,
    load,
    spoil,
)
from transformers import AutoModelForCausalLM

from penstock.engine_service.core import device_prompt_logprobs
from penstock.engine_service.core.accelerator import CpuAccelerator, Event
from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.core.device_build import DeviceParts
from penstock.engine_service.core.device_inputs import InputPacker
from penstock.engine_service.core.device_memory import StepMemory
from penstock.engine_service.core.device_rehearsal import rehearse
from penstock.engine_service.core.device_results import DeviceRows
from penstock.engine_service.core.device_sampler import DeviceSampler, DeviceTokens
from penstock.engine_service.core.memory import make_kv_caches
from penstock.engine_service.core.messages import AddRequest
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.request import Request
from penstock.engine_service.core.slots import SlotTable
from penstock.kernels import dispatch
from penstock.kernels.paged_attention import AttentionBatch

Folder = Callable[..., Path]
DICE = random.Random(11)
PROMPTS = [[DICE.randrange(256) for _ in range(count)] for count in (17, 1, 66, 5, 40, 2, 16, 33, 8)]
NEW = 8
FAMILIES = ["llama3", "qwen3", "opt"]


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    """Static batches are for the reference kernels here: the CPU's own need lists of lengths."""
    dispatch.choose("paged_attention", "reference")
    dispatch.choose("inputs", "reference")
    yield
    dispatch.choose("paged_attention", None)
    dispatch.choose("inputs", None)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> list[list[int]]:
    """What transformers says, prompt by prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def jobs(**options: Any) -> list[Job]:
    return [Job(prompt, NEW, **options) for prompt in PROMPTS]


def tokens(done: list[Job]) -> list[list[int]]:
    assert not any(job.errors for job in done)
    return [job.tokens for job in done]


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "eager"])
@pytest.mark.parametrize("lookahead", [True, False], ids=["ahead", "in turn"])
def test_greedy_equals_transformers(
    loaded: Any, oracle: list[list[int]], record: bool, lookahead: bool
) -> None:
    runner = device_runner(loaded, record=record)
    runner.record_decodes()
    driver = Driver(runner, lookahead=lookahead)
    # All at once; then ragged arrivals in chunks, some preempted; then one by one.
    assert tokens(driver.run(jobs())) == oracle
    ragged = jobs(chunk=7)
    for number, job in enumerate(ragged):
        job.start, job.chunk = driver.num_steps + number, 3 + 5 * (number % 3)
        job.preempt_at = len(job.prompt) + 3 if number % 4 == 1 else -1
    assert tokens(driver.run(ragged, max_tokens=29)) == oracle
    for job, expected in zip(jobs(), oracle, strict=True):
        assert tokens(driver.run([job])) == [expected]
    assert bool(runner.graphs.recorded) == record


def test_nothing_but_the_sequences_own_blocks_and_the_padding_block_is_written(loaded: Any) -> None:
    runner = device_runner(loaded)
    driver = Driver(runner, lookahead=True, spoiled=False)
    before = set(driver.free_blocks[-40:])
    driver.free_blocks = driver.free_blocks[-40:]
    driver.run([Job(PROMPTS[number], NEW, start=number) for number in range(3)])
    for cache in runner._work._kv_caches:
        written = {i for i in range(NUM_BLOCKS) if not cache[i].isnan().all()}
        assert written
        assert written <= before


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Folder) -> Any:
    return load(tiny_checkpoint("llama3"))


def test_seeded_tokens_do_not_depend_on_the_batch_or_on_how_it_runs(llama: Any) -> None:
    sampling = {"temperature": 1.5, "seed": 77}

    def crowd() -> list[Job]:
        mine = Job(PROMPTS[4], 12, start=3, sampling=sampling)
        return [mine, *jobs(chunk=9, sampling={"temperature": 0.7, "seed": 5})]

    alone = Driver(device_runner(llama, record=False), lookahead=False).run(
        [Job(PROMPTS[4], 12, sampling=sampling)]
    )
    for record in (True, False):
        for lookahead in (True, False):
            driver = Driver(device_runner(llama, record=record), lookahead=lookahead)
            assert driver.run(crowd(), max_tokens=31)[0].tokens == alone[0].tokens
    assert len(set(alone[0].tokens)) > 2


def test_slots_pass_from_one_sequence_to_another(llama: Any) -> None:
    """More sequences than slots, so that tables and last tokens of a slot change hands."""
    runner = device_runner(llama, num_slots=2)
    expected = [Driver(device_runner(llama), lookahead=False).run([job])[0].tokens for job in jobs()]
    driver = Driver(runner, lookahead=True, num_slots=2)
    assert tokens(driver.run(jobs())) == expected


@pytest.mark.parametrize("max_elements", [1, 272 * 5, 1 << 24])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("first", [1, 6])
def test_prompt_scores(
    llama: Any, chunk: int, max_elements: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_prompt_logprobs, "_MAX_ELEMENTS", max_elements)
    prompt = PROMPTS[4]
    assert len(prompt) > 16
    runner = device_runner(llama)
    asked = Job(prompt, 2, chunk=chunk, sampling={"prompt_logprobs": 3, "prompt_logprobs_from": first})
    Driver(runner, lookahead=True).run([Job(PROMPTS[1], 30), asked, Job(PROMPTS[5], 12)])
    expected = reference_scores(llama, prompt)[first - 1 :]
    values = [value for rows in asked.scores for value in rows.logprobs]
    ranks = [value for rows in asked.scores for value in rows.ranks]
    ids = [value for rows in asked.scores for value in rows.alternative_ids]
    alternatives = [value for rows in asked.scores for value in rows.alternative_logprobs]
    own = expected[range(len(prompt) - first), prompt[first:]]
    assert values == pytest.approx(own.tolist(), abs=1e-4)
    assert ranks == ((expected[:-1] > own[:, None]).sum(dim=1) + 1).tolist()
    best, best_ids = expected[:-1].topk(3)
    assert ids == best_ids.flatten().tolist()
    assert alternatives == pytest.approx(best.flatten().tolist(), abs=1e-4)


@torch.inference_mode()
def reference_scores(loaded: Any, prompt: list[int]) -> torch.Tensor:
    """log-softmax after every position, [len(prompt), vocab], in one step over lists."""
    spec, model = loaded
    blocks = -(-len(prompt) // BLOCK_SIZE)
    caches = make_kv_caches(spec, blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    batch = AttentionBatch([len(prompt)], [len(prompt)], 0, BLOCK_SIZE, torch.arange(blocks)[None])
    places = torch.arange(len(prompt))
    step = StepTensors(torch.tensor(prompt), places, places, batch, [0])
    return model.logits(model.forward(step, caches)).float().log_softmax(dim=-1)


def test_prompt_scores_that_are_not_finite_end_the_request(llama: Any) -> None:
    runner = device_runner(llama)
    asked = Job(PROMPTS[4], 4, sampling={"prompt_logprobs": 0})
    broken = runner._work._model.logits

    class Broken:
        forward = runner._work._model.forward

        @staticmethod
        def logits(hidden: torch.Tensor) -> torch.Tensor:
            made = broken(hidden)
            return made.index_fill_(0, torch.tensor([2]), torch.nan) if len(made) > 2 else made

    runner._work._model = Broken()
    other = Job(PROMPTS[5], 4)
    Driver(runner, lookahead=True).run([asked, other])
    assert [error.reason for error in asked.errors] == ["internal_error"]
    assert len(other.tokens) == 4


def test_a_sequence_whose_numbers_are_not_finite_fails_alone(llama: Any) -> None:
    expected = [Driver(device_runner(llama), lookahead=False).run([job])[0].tokens for job in jobs()[3:7]]
    runner = device_runner(llama)
    driver = Driver(runner, lookahead=True)
    bad, good = Job(PROMPTS[2], NEW), jobs()[3:7]
    driver._join(bad)
    driver._step([bad], MAX_TOKENS)
    assert bad.sequence is not None
    with torch.inference_mode():
        for cache in runner._work._kv_caches:
            cache[bad.sequence.block_table[1]] = float("inf")
    driver.run([bad, *good])
    assert [error.reason for error in bad.errors] == ["internal_error"]
    assert tokens(good) == expected
    # Its blocks may go to others.
    assert tokens(driver.run(jobs()[3:7])) == expected


@pytest.mark.parametrize("right", [0, 2, 5])
def test_drafts_give_what_single_steps_give(llama: Any, right: int) -> None:
    """A draft of five of which the first `right` are what the model says."""
    expected = Driver(device_runner(llama), lookahead=False).run([Job(PROMPTS[4], 12)])[0].tokens
    runner = device_runner(llama)
    driver = Driver(runner, lookahead=False)
    job, others = Job(PROMPTS[4], 3), [Job(PROMPTS[number], 3) for number in (0, 1, 3, 5)]
    for each in (job, *others):
        driver._join(each)
    while not all(each.tokens for each in (job, *others)):
        driver._step([each for each in (job, *others) if not each.tokens], MAX_TOKENS)
    draft = expected[1 : 1 + right] + [(token + 1) % 256 for token in expected[1 + right : 6]]
    plan, rows = driver._plan([*others, job], MAX_TOKENS) or pytest.fail("nothing to do")
    row = rows.index(job)
    assert row == 4
    slot, start = plan.slots[row], int(plan.starts[row])
    driver.table.append_blocks(int(slot), [driver.free_blocks.pop() for _ in range(3)])
    plan.counts[row], plan.num_decodes = 6, 4
    plan.drafts[row] = np.array(draft, np.int32)
    spoil(runner)
    forward, bounds = runner._work._model.forward, []

    class Watched:
        logits = runner._work._model.logits

        @staticmethod
        def forward(step: StepTensors, caches: list[torch.Tensor]) -> torch.Tensor:
            bounds.append(step.attention.max_query_len)
            return forward(step, caches)

    runner._work._model = Watched()
    result = runner.start(plan).wait()
    # 10 tokens, but so few of each sequence that attention may split its keys.
    assert bounds == [8]
    assert result.num_tokens.tolist() == [1, 1, 1, 1, right + 1]
    assert result.tokens[row, : right + 1].tolist() == expected[1 : right + 2]
    assert (
        result.tokens[0, 0]
        == Driver(device_runner(llama), lookahead=False).run([Job(PROMPTS[0], 2)])[0].tokens[1]
    )
    assert start == len(PROMPTS[4])


def test_drafted_rows_know_their_place() -> None:
    table = SlotTable(4, 64, 4)
    sequences = []
    for number, prompt in enumerate(([1, 2, 3], [4, 5], [6])):
        sequence = Request.create(AddRequest(number, prompt)).sequences[0]
        table.take(number + 1, sequence)
        table.append_blocks(number + 1, [7, 8, 9])
        sequences.append(sequence)
    plan = StepPlan(
        table,
        sequences,
        np.array([1, 2, 3]),
        np.array([5, 0, 4], np.int32),
        np.array([1, 1, 3], np.int32),
        np.array([True, False, True]),
        np.array([True, False, False]),
        2,
        {2: np.array([50, 51], np.int32)},
        table.epochs[1:4],
    )
    out = np.full(200, -1, np.int32)
    packed = InputPacker(4).pack(plan, out)
    rows = DeviceRows.of(plan, packed)
    assert rows.sequences == [sequences[0], *[sequences[2]] * 3]
    assert rows.slots.tolist() == [1, 3, 3, 3]
    # The prompts have 3 and 1 tokens: positions among the output tokens.
    assert rows.positions.tolist() == [3, 4, 5, 6]
    assert (packed.num_tokens, packed.num_samples, packed.decode) == (5, 4, False)


class TestRefusals:
    def plan(self, count: int = 1, blocks: int = 2) -> StepPlan:
        table = SlotTable(4, 64, 4)
        sequence = Request.create(AddRequest(1, [1] * 8)).sequences[0]
        table.take(2, sequence)
        table.append_blocks(2, list(range(blocks)))
        return StepPlan(
            table, [sequence], np.array([2]), np.array([0], np.int32), np.array([count], np.int32),
            np.array([False]), np.array([False]), 0, epochs=table.epochs[[2]],
        )  # fmt: skip

    def test_a_plan_without_work(self, llama: Any) -> None:
        with pytest.raises(ValueError, match="needs sequences"):
            device_runner(llama).start(self.plan(count=0))

    def test_tokens_beyond_the_blocks(self, llama: Any) -> None:
        with pytest.raises(ValueError, match="beyond its blocks"):
            device_runner(llama).start(self.plan(count=8, blocks=1))

    def test_more_tokens_than_a_step_has_room_for(self, llama: Any) -> None:
        with pytest.raises(ValueError):
            device_runner(llama, max_tokens=4).start(self.plan(count=8))

    def test_after_a_failed_start_the_device_is_told_everything_again(
        self, llama: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner = device_runner(llama)
        expected = Driver(device_runner(llama), lookahead=False).run([Job(PROMPTS[4], 6)])[0].tokens
        plan = self.plan(count=8)
        runner.start(plan).wait()
        with monkeypatch.context() as patch:
            patch.setattr(runner._staging, "send", lambda words: (_ for _ in ()).throw(RuntimeError("lost")))
            plan.table.append_blocks(2, [5])
            with pytest.raises(RuntimeError, match="lost"):
                runner.start(plan)
        assert runner._packer.pack(plan, np.zeros(500, np.int32)).num_words > 4 + 10 + 8 + 2
        assert Driver(runner, lookahead=True).run([Job(PROMPTS[4], 6)])[0].tokens == expected


class Dying(CpuAccelerator):
    """Fails at its `fail_at`th event."""

    fail_at = 0

    def copy_out(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        self.fail_at -= 1
        return _Dead() if self.fail_at == 0 else super().copy_out(pairs)


class _Dead:
    def wait(self) -> None:
        raise RuntimeError("an illegal memory access was encountered")


def test_a_failed_wait_raises_and_the_device_is_told_everything_again(llama: Any) -> None:
    dying = Dying()
    runner = device_runner(llama, dying)
    driver = Driver(runner, lookahead=False)
    job = Job(PROMPTS[4], 6)
    driver._join(job)
    driver._step([job], MAX_TOKENS)
    dying.fail_at = 1
    with pytest.raises(RuntimeError, match="illegal memory"):
        driver._step([job], MAX_TOKENS)
    assert (runner._packer._epochs == -1).all()
    expected = Driver(device_runner(llama), lookahead=False).run([Job(PROMPTS[4], 6)])[0].tokens
    assert Driver(runner, lookahead=True).run([Job(PROMPTS[4], 6)])[0].tokens == expected


class Guard(CpuAccelerator):
    """Copies out as late as an event allows, and knows which buffers are still being copied in."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def mark(self) -> Event:
        return _Marked(self)

    def copy_out(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        return _Late(list(pairs))


class _Marked:
    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def wait(self) -> None:
        self._guard.waits += 1


class _Late:
    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._pairs = pairs

    @torch.inference_mode()
    def wait(self) -> None:
        for target, source in self._pairs:
            target.copy_(source)


def test_results_that_leave_late_are_the_steps_own(llama: Any) -> None:
    """Nothing a later step writes reaches the results of the one before."""
    expected = [Driver(device_runner(llama), lookahead=False).run([job])[0].tokens for job in jobs()]
    guard = Guard()
    driver = Driver(device_runner(llama, guard), lookahead=True)
    assert tokens(driver.run(jobs(sampling={"prompt_logprobs": 1}))) == expected
    # A packed buffer is written again only behind the copy of two steps ago.
    assert guard.waits == driver.num_steps - 2 or guard.waits == driver.num_steps - 3


def test_a_rehearsal_touches_no_block_and_leaves_nothing_behind(llama: Any) -> None:
    runner = device_runner(llama)
    limits = runner._limits
    rehearse(runner, limits)
    with torch.inference_mode():
        for cache in runner._work._kv_caches:
            assert cache[:NUM_BLOCKS].isnan().all()
    expected = Driver(device_runner(llama), lookahead=False).run([Job(PROMPTS[4], 6)])[0].tokens
    runner.warm_up()
    assert Driver(runner, lookahead=True).run([Job(PROMPTS[4], 6)])[0].tokens == expected


class Seen(DeviceSampler):
    """Notes of each step how many rows it sampled, edited and ranked, and that none of them failed."""

    rows: list[tuple[int, int, int]]

    def launch(self, *arguments: Any, **options: Any) -> DeviceTokens:
        launched = super().launch(*arguments, **options)
        ranked = 0 if launched.logprobs is None else len(launched.logprobs._asked)
        self.rows.append((launched.num_rows, len(launched.edited), ranked))
        assert not launched.errors
        return launched


@pytest.mark.parametrize("max_tokens", [1, 2, 10, 200])
def test_a_rehearsal_fills_the_largest_step(llama: Any, max_tokens: int) -> None:
    """With each of its sequences asking for all that takes memory, and as many drafts as may come."""
    vocab_size = llama[0].vocab_size
    sampler = Seen(vocab_size, NUM_SLOTS, torch.device("cpu"), 3)
    sampler.rows = []
    runner = device_runner(llama, sampler=sampler, max_tokens=max_tokens, record=False)
    seen: list[tuple[int, int]] = []
    scored: list[int] = []
    start = runner.start

    class Spy:
        lookahead, needs_host_tokens, forget = True, runner.needs_host_tokens, runner.forget
        guide = None

        @staticmethod
        def start(plan: StepPlan) -> Any:
            seen.append((len(plan), plan.num_tokens))
            scored.extend(
                sequence.num_prompt_tokens
                for sequence in plan.sequences
                if sequence.sampling.prompt_logprobs is not None
            )
            return start(plan)

    rehearse(Spy(), replace(runner._limits, max_num_drafted=25))
    most = min(NUM_SLOTS, max_tokens)
    assert (most, max_tokens) in seen
    assert (most, most) in seen
    rows = most + min(25, max_tokens - most)
    assert (rows, rows, rows) in sampler.rows
    assert max(sampler.rows)[0] == rows
    assert max_tokens <= 2 or min(max_tokens, MAX_LEN - 1) in scored


class Measured(CpuAccelerator):
    """Says that work takes so much, and how much is left."""

    taken, free = 0, 1 << 40

    def peak_memory(self, work: Callable[[], None]) -> int:
        work()
        return self.taken

    def free_memory(self) -> int:
        return self.free


@pytest.mark.parametrize("short", [0, 1])
def test_recordings_leave_what_the_largest_steps_were_seen_to_take(llama: Any, short: int) -> None:
    accelerator = Measured()
    accelerator.taken, accelerator.free = 1 << 30, (1 << 30) + (256 << 20) - short
    runner = parts_of(llama, accelerator).build(NUM_BLOCKS)
    assert bool(runner.graphs.recorded) == (not short)


def test_parts_put_together(llama: Any) -> None:
    runner = parts_of(llama, CpuAccelerator()).build(NUM_BLOCKS)
    assert [bucket.num_tokens for bucket in runner.graphs.recorded] == [10, 8, 4, 2, 1]
    assert len(runner._work._kv_caches[0]) == NUM_BLOCKS + 1
    expected = Driver(device_runner(llama), lookahead=False).run([Job(PROMPTS[4], 6)])[0].tokens
    assert Driver(runner, lookahead=runner.lookahead).run([Job(PROMPTS[4], 6)])[0].tokens == expected


def parts_of(loaded: Any, accelerator: CpuAccelerator) -> DeviceParts:
    spec, model = loaded
    return DeviceParts(
        model=model,
        spec=spec,
        sampler=DeviceSampler(spec.vocab_size, NUM_SLOTS, accelerator.device, 3),
        accelerator=accelerator,
        limits=replace(device_runner(loaded)._limits, num_blocks=0),
        dtype=torch.float32,
        kv_dtype=torch.float32,
        record=True,
        lookahead=True,
    )


class TestStepMemory:
    GIB = 1 << 30

    def test_what_keys_and_values_get(self) -> None:
        memory = StepMemory(total=80 * self.GIB, used=17 * self.GIB, step=2 * self.GIB)
        quarter = self.GIB // 4
        assert memory.kv_budget(0.9, record=False) == int(72 * self.GIB) - 19 * self.GIB - quarter
        # Graphs keep their own temporaries beside those of other steps.
        assert memory.kv_budget(0.9, record=True) == memory.kv_budget(0.9, record=False) - self.GIB // 2
        pooled = replace(memory, pool=3 * self.GIB)
        assert pooled.kv_budget(0.9, record=True) == memory.kv_budget(0.9, record=True) - 3 * self.GIB
        assert pooled.kv_budget(0.9, record=False) == memory.kv_budget(0.9, record=False)
        assert memory.available(record=False) == 61 * self.GIB - quarter

    def test_nothing_left(self) -> None:
        memory = StepMemory(total=8 * self.GIB, used=7 * self.GIB, step=self.GIB)
        assert memory.kv_budget(0.9, record=True) == memory.available(record=True) == 0
