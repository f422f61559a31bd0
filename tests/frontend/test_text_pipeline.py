"""Detokenizer and stop strings together, against cutting the full text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from penstock.frontend.text.pipeline import TextPipeline
from penstock.frontend.text.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(tokenizers_support: Any) -> Vocabulary:
    return Vocabulary(tokenizers_support.byte_level_tokenizer())


def run(pipeline: TextPipeline, ids: list[int]) -> str:
    out = ""
    for token_id in ids:
        out += pipeline.feed(token_id)
        if pipeline.hit is not None:
            return out
    return out + pipeline.flush()


@settings(max_examples=200)
@given(
    text=st.text(alphabet="ab 日👩\n", max_size=20),
    stop=st.text(alphabet="ab 日👩\n", min_size=1, max_size=4),
)
def test_text_up_to_the_first_match(vocabulary: Vocabulary, text: str, stop: str) -> None:
    ids = vocabulary.tokenizer.encode(text).ids
    for include in (False, True):
        pipeline = TextPipeline.create(vocabulary, [], stop=[stop], include_stop=include)
        end = text.find(stop)
        expected = text if end < 0 else text[: end + len(stop) if include else end]
        assert run(pipeline, ids) == expected
        assert pipeline.hit == (None if end < 0 else stop)


def test_a_stop_string_may_begin_inside_a_token_and_cross_characters(vocabulary: Vocabulary) -> None:
    text = "say 👩‍👩‍👧 now"
    ids = vocabulary.tokenizer.encode(text).ids
    pipeline = TextPipeline.create(vocabulary, [], stop=["‍👧 n"])
    assert run(pipeline, ids) == "say 👩‍👩"


def test_the_replacement_of_an_unfinished_character_may_complete_a_stop_string(
    vocabulary: Vocabulary,
) -> None:
    ids = vocabulary.tokenizer.encode("ab👩").ids[:-1]
    pipeline = TextPipeline.create(vocabulary, [], stop=["b�"])
    assert run(pipeline, ids) == "a"
    assert pipeline.hit == "b�"


@pytest.mark.row("A3.20")
def test_special_tokens_without_spaces_between() -> None:
    """A tokenizer that joins with spaces: only those between special tokens go."""
    words = ["<unk>", "hello", "world"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<a>", "<b>"])
    vocabulary = Vocabulary(tokenizer)
    ids = [1, 3, 4, 3, 2]

    def text(**options: bool) -> str:
        return run(TextPipeline.create(vocabulary, [1], **options), ids)

    assert text(skip_special_tokens=False) == " hello <a> <b> <a> world"
    assert text(skip_special_tokens=False, spaces_between_special_tokens=False) == " hello <a><b><a> world"
    assert text(skip_special_tokens=True, spaces_between_special_tokens=False) == " hello world"


def test_a_decoder_without_context_needs_no_change(vocabulary: Vocabulary) -> None:
    special = vocabulary.tokenizer.token_to_id("<|im_end|>")
    word = vocabulary.tokenizer.encode("Hello").ids
    pipeline = TextPipeline.create(
        vocabulary, [], skip_special_tokens=False, spaces_between_special_tokens=False
    )
    assert run(pipeline, [*word, special, special]) == "Hello<|im_end|><|im_end|>"
