"""Offline vectors, scores and classes against transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from penstock.local import LLM, pooled
from penstock.local.pooled import Floats

Folder = Callable[[str], Path]
TEXTS = ["hello", "The capital of France", "a", "1 + 1 = 2", "Grüße, 世界", "hello"]


def _open(folder: Path, **options: Any) -> LLM:
    return LLM(folder, threads=1, max_num_batched_tokens=64, max_num_seqs=8, **options)


@pytest.fixture(scope="module")
def embedder(pooled_checkpoint: Folder) -> Iterator[LLM]:
    with _open(pooled_checkpoint("embedder")) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _nothing_is_left(embedder: LLM) -> Iterator[None]:
    yield
    load = embedder.load()
    assert (load.running, load.waiting, load.waiting_tokens) == (0, 0, 0)


def _vectors(folder: Path, texts: list[str]) -> Floats:
    """Mean of the last hidden states, of length 1."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    rows = []
    with torch.inference_mode():
        for text in texts:
            states = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
            rows.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
    return np.stack(rows)


def test_vectors_in_order(embedder: LLM, pooled_checkpoint: Folder) -> None:
    own = embedder.embed(TEXTS, use_tqdm=False)
    assert isinstance(own, np.ndarray)
    assert (own.dtype, own.shape) == (np.float32, (6, 32))
    np.testing.assert_allclose(own, _vectors(pooled_checkpoint("embedder"), TEXTS), atol=1e-5)


def test_many_texts_are_with_the_loop_a_bounded_number_at_a_time(
    embedder: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled, "_CHUNK", 16)
    monkeypatch.setattr(pooled, "_LIVE", 32)
    loop: Any = embedder._loop
    most = 0
    step = loop.step

    def watched() -> None:
        nonlocal most
        most = max(most, len(loop.queue.live()) + len(embedder._inbox._messages))
        step()

    monkeypatch.setattr(loop, "step", watched)
    texts = [f"text {number}" * (number % 5 + 1) for number in range(200)]
    many = embedder.embed(texts, use_tqdm=False)
    assert 16 <= most <= 32
    for place in (0, 77, 199):
        np.testing.assert_allclose(many[place], embedder.embed(texts[place], use_tqdm=False)[0], atol=1e-5)


def test_forms_of_input(embedder: LLM) -> None:
    (one,) = embedder.embed("hello", use_tqdm=False)
    ids = embedder.get_tokenizer().encode("hello").ids
    np.testing.assert_array_equal(embedder.embed(ids, use_tqdm=False)[0], one)
    both = embedder.embed([ids, "hello"], use_tqdm=False)
    np.testing.assert_allclose(both, [one, one], atol=1e-6)
    assert embedder.embed([], use_tqdm=False).shape == (0, 32)  # type: ignore[union-attr]
    every = embedder.embed(["hello", "a"], pooling="all", use_tqdm=False)
    assert [rows.shape for rows in every] == [(7, 32), (3, 32)]
    prompted = embedder.embed(["lo"], prompt="hel", use_tqdm=False)
    np.testing.assert_allclose(prompted[0], one, atol=1e-6)


def test_long_texts_are_cut_only_on_request(embedder: LLM) -> None:
    text = "x" * 100
    with pytest.raises(ValueError, match="text 1: 102 tokens; this model takes 1 to 64"):
        embedder.embed(["a", text], use_tqdm=False)
    cut = embedder.embed([text], truncate_prompt_tokens=-1, use_tqdm=False)
    np.testing.assert_allclose(cut, embedder.embed("x" * 62, use_tqdm=False), atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([1.5], {}, "texts: entry 0"),
        (["a", None], {}, "texts: entry 1"),
        ([[300]], {}, "outside the vocabulary"),
        (["a"], {"dimensions": 16}, "dimensions"),
        (["a"], {"dimensions": "16"}, "dimensions: must be a whole number"),
        (["a"], {"normalize": "no"}, "normalize"),
        (["a"], {"prompt": 5}, "prompt: "),
        (b"a", {}, "texts: a text"),
        ([[True]], {}, "texts: entry 0"),
        (["a\ud83d"], {}, "half of a character"),
        (["a"], {"truncate_prompt_tokens": "5"}, "truncate_prompt_tokens: must be a whole number"),
        (["a"], {"pooling": "max"}, "pooling"),
        (["a"], {"prompt_name": "query"}, "prompt_name"),
        (["a"], {"truncate_prompt_tokens": 65}, "truncate_prompt_tokens"),
    ],
)
def test_bad_input(embedder: LLM, texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder.embed(texts, use_tqdm=False, **options)


@pytest.mark.parametrize(
    ("text_1", "text_2", "named"),
    [
        (5, "a", "text_1"),
        ("a", {"text": "b"}, "text_2"),
        ("a", b"b", "text_2"),
        ("a", [["b"]], "text_2"),
        (["a", "b"], ["c"], "text_2"),
    ],
)
def test_what_is_no_pair_is_refused(embedder: LLM, text_1: Any, text_2: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{named}: "):
        embedder.score(text_1, text_2, use_tqdm=False)


def test_a_text_that_fails_is_named(embedder: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = embedder._loop._runner  # type: ignore[attr-defined]
    nothing = np.full((1, 32), np.nan, np.float32)
    monkeypatch.setattr(runner, "_values", lambda wish, hidden, batch: nothing)
    with pytest.raises(RuntimeError, match=r"text 0: .*non-finite"):
        embedder.embed(["hello"], use_tqdm=False)


def test_what_the_model_is_not_for(embedder: LLM, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="this model serves embed; it cannot classify"):
        embedder.classify(["a"], use_tqdm=False)
    with pytest.raises(ValueError, match="this model serves embed; it cannot generate"):
        embedder.generate("a", use_tqdm=False)
    with _open(tiny_checkpoint("llama"), num_kv_blocks=20) as llm:
        for ask in (lambda: llm.embed("a"), lambda: llm.score("a", "b"), lambda: llm.classify("a")):
            with pytest.raises(ValueError, match="this model serves generate"):
                ask()


def test_scores_of_an_embedder_are_cosines(embedder: LLM) -> None:
    vectors = embedder.embed(TEXTS, use_tqdm=False)
    scores = embedder.score("hello", TEXTS, use_tqdm=False)
    np.testing.assert_allclose(scores, np.asarray(vectors) @ vectors[0], atol=1e-5)
    words = [f"a {n}" for n in range(200)]
    assert np.abs(embedder.score(words, words, use_tqdm=False)).max() <= 1.0
    with pytest.raises(ValueError, match="text_2: 3 texts for the 2"):
        embedder.score(["a", "b"], ["a", "b", "c"], use_tqdm=False)


@pytest.mark.parametrize("kind", ["reranker", "classifier"])
def test_classifiers(kind: str, pooled_checkpoint: Folder) -> None:
    folder = pooled_checkpoint(kind)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    def logits(row: tokenizers.Encoding) -> torch.Tensor:
        with torch.inference_mode():
            made = oracle(torch.tensor([row.ids]), token_type_ids=torch.tensor([row.type_ids]))
        return made.logits[0]

    with _open(folder) as llm:
        classes = llm.classify(TEXTS, use_tqdm=False)
        if kind == "classifier":
            assert llm.labels == ("anger", "joy", "fear")
            expected = [torch.softmax(logits(tokenizer.encode(text)), 0).numpy() for text in TEXTS]
            np.testing.assert_allclose(classes, expected, atol=1e-5)
            with pytest.raises(ValueError, match="cannot score"):
                llm.score("a", "b", use_tqdm=False)
            return
        scores = llm.score("hello", TEXTS, use_tqdm=False)
        expected = [torch.sigmoid(logits(tokenizer.encode("hello", text))).item() for text in TEXTS]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert len(set(scores.round(6))) > 3, "the pair's second text counts"
