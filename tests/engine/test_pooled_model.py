"""A real tiny model behind the pooled loop: mixed steps, weights that give NaN, and what cannot be built."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_pooled import call, numbers
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.loops import make_loop
from penstock.engine_service.core.messages import (
    CLASSIFY,
    SIMILARITY,
    AddPooled,
    Configure,
    Failure,
    FromCore,
    Pooled,
    Ready,
    StepOutput,
)
from penstock.engine_service.core.pooled_build import build
from penstock.engine_service.models.errors import ModelError

Folder = Callable[[str], Path]
DICE = random.Random(5)
INPUTS = [[DICE.randrange(256) for _ in range(DICE.randint(1, 40))] for _ in range(24)]


class Engine:
    """Runs requests through one loop in this thread."""

    def __init__(self, folder: Path, budget: int = 64, **options: object) -> None:
        configure = Configure(
            str(folder),
            max_num_batched_tokens=budget,
            threads=1,
            **options,  # type: ignore[arg-type]
        )
        built = build(configure, lambda done, total: None)
        self.ready: Ready = built.ready
        self.inbox = Inbox()
        self.loop = make_loop(configure, built, self.inbox, self)
        self.answers: dict[int, Pooled | Failure] = {}

    def send(self, message: FromCore) -> None:
        if isinstance(message, StepOutput):
            self.answers |= {finish.id: finish.pooled for finish in message.finished if finish.pooled}
            self.answers |= {failure.id: failure for failure in message.failures}

    def run(self, *requests: AddPooled) -> dict[int, Pooled | Failure]:
        for request in requests:
            self.inbox.put(request)
        self.loop.step()
        while self.loop.has_work:
            self.loop.step()
        answers, self.answers = self.answers, {}
        return answers


def rows(answer: Pooled | Failure) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    assert isinstance(answer, Pooled)
    return numbers(answer)


@pytest.fixture(scope="module")
def embedder(pooled_checkpoint: Folder) -> Engine:
    return Engine(pooled_checkpoint("embedder"))


def test_any_batch_and_order_equals_transformers(embedder: Engine, pooled_checkpoint: Folder) -> None:
    oracle = AutoModel.from_pretrained(pooled_checkpoint("embedder"), dtype=torch.float32)
    with torch.inference_mode():
        states = [oracle(torch.tensor([ids])).last_hidden_state[0] for ids in INPUTS]
    answers = embedder.run(
        call(1, INPUTS),
        call(2, INPUTS[::-1]),
        call(3, INPUTS, pooling="cls", normalize=False),
        call(4, INPUTS, pooling="all", normalize=False),
        call(5, INPUTS, kind=SIMILARITY),
        *(call(10 + number, [ids]) for number, ids in enumerate(INPUTS)),
    )
    for number, state in enumerate(states):
        mean = torch.nn.functional.normalize(state.mean(0), dim=0).numpy()
        np.testing.assert_allclose(rows(answers[1])[number][0], mean, atol=1e-5)
        np.testing.assert_allclose(rows(answers[2])[-1 - number][0], mean, atol=1e-5)
        np.testing.assert_allclose(rows(answers[10 + number])[0][0], mean, atol=1e-5)
        np.testing.assert_allclose(rows(answers[3])[number][0], state[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(rows(answers[4])[number], state.numpy(), atol=1e-4)
    first = rows(answers[1])[0][0]
    for number, cosine in enumerate(rows(answers[5])[1:], 1):
        assert cosine[0, 0] == pytest.approx(float(first @ rows(answers[1])[number][0]), abs=1e-5)


def test_a_wish_that_the_model_cannot_meet_ends_its_request_alone(embedder: Engine) -> None:
    answers = embedder.run(
        call(1, INPUTS[:3], dimensions=33), call(2, INPUTS[:3]), call(3, INPUTS[:2], kind=CLASSIFY)
    )
    for number in (1, 3):
        failure = answers[number]
        assert isinstance(failure, Failure)
        assert failure.reason == "invalid_value"
    assert len(rows(answers[2])) == 3


def test_weights_that_give_nan_are_reported_and_never_data(tmp_path: Path, pooled_checkpoint: Folder) -> None:
    folder = tmp_path / "poisoned"
    shutil.copytree(pooled_checkpoint("embedder"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][260] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    answers = Engine(folder).run(
        call(1, INPUTS), call(2, [INPUTS[0], [1, 260, 2], INPUTS[1]]), call(3, [[260]], pooling="all")
    )
    assert len(rows(answers[1])) == len(INPUTS)
    for number, place in ((2, 1), (3, 0)):
        failure = answers[number]
        assert isinstance(failure, Failure)
        assert failure.reason == "internal_error"
        assert failure.message == f"Input {place}: the model produced non-finite values."
    similar = Engine(folder).run(
        call(1, [[1], [2], [260]], kind=SIMILARITY), call(2, [[260], [1]], kind=SIMILARITY)
    )
    for number, name in ((1, "Document 1"), (2, "The query")):
        failure = similar[number]
        assert isinstance(failure, Failure)
        assert failure.message == f"{name}: the model produced non-finite values."


def test_what_is_ready(embedder: Engine, pooled_checkpoint: Folder) -> None:
    ready = embedder.ready
    assert (ready.tasks, ready.max_model_len, ready.kv_blocks, ready.dtype) == (["embed"], 64, 0, "float32")
    assert ready.pooled is not None
    assert (ready.pooled.pooling, ready.pooled.normalize, ready.pooled.dimensions) == ("mean", True, 32)
    assert (ready.pooled.matryoshka, ready.pooled.any_dimensions) == ([], False)
    assert Engine(pooled_checkpoint("classifier"), max_model_len=9).ready.max_model_len == 9


def test_a_generator_stays_one_unless_asked_otherwise(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen3")
    options = {"num_kv_blocks": 32}
    assert Engine(folder, 256, **options).ready.tasks == ["generate"]
    engine = Engine(folder, task="embed")
    assert engine.ready.tasks == ["embed"]
    oracle = AutoModel.from_pretrained(folder, dtype=torch.float32)
    answer = rows(engine.run(call(1, INPUTS[:4]))[1])
    for ids, own in zip(INPUTS, answer, strict=False):
        with torch.inference_mode():
            last = torch.nn.functional.normalize(oracle(torch.tensor([ids])).last_hidden_state[0, -1], dim=0)
        np.testing.assert_allclose(own[0], last.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 65}, "--max-model-len 65 is more than the 64 tokens"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"task": "classify"}, "classify"),
        ({"task": "generate"}, "generate"),
    ],
)
def test_what_cannot_be_built(pooled_checkpoint: Folder, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Engine(pooled_checkpoint("embedder"), **options)
