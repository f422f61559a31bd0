"""Raw bytes and texts of single tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from penstock.frontend.api.logprobs_body import TextOffsets, chat_content
from penstock.frontend.logprobs import entry
from penstock.frontend.text.pipeline import TextPipeline
from penstock.frontend.text.token_bytes import Family, byte_of_character, family_of
from penstock.frontend.text.vocabulary import Vocabulary


def decoder_json(decoder: object) -> dict[str, object]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoder
    return json.loads(tokenizer.to_str())["decoder"]


def byte_level_vocabulary() -> Vocabulary:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("日本", normalized=False), AddedToken("a b", normalized=False)])
    return Vocabulary(tokenizer)


def llama_vocabulary() -> Vocabulary:
    words = ["<unk>", "▁Hello", "▁", "a", "▁a", *[f"<0x{value:02X}>" for value in range(256)]]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return Vocabulary(tokenizer)


def test_byte_table_is_the_tokenizers_librarys() -> None:
    table = byte_of_character()
    assert sorted(table) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for value in range(128):
        ((mapped, _),) = encoder.pre_tokenize_str(chr(value))
        assert table[mapped] == value


def test_byte_level_tokens() -> None:
    vocabulary = byte_level_vocabulary()
    text = "a é👩"
    ids = vocabulary.tokenizer.encode(text).ids
    assert b"".join(vocabulary.raw(i) for i in ids) == text.encode()
    parts = [vocabulary.text(i) for i in ids]
    assert parts[:2] == ["a", " "]
    assert set(parts[2:]) == {"�"}
    for content in ("<|im_end|>", "日本", "a b"):
        token_id = vocabulary.tokenizer.token_to_id(content)
        assert vocabulary.raw(token_id) == content.encode()
        assert vocabulary.text(token_id) == vocabulary.tokenizer.decode([token_id], skip_special_tokens=False)


def test_byte_fallback_tokens() -> None:
    vocabulary = llama_vocabulary()
    token = vocabulary.tokenizer.token_to_id
    assert vocabulary.raw(token("<0xE2>")) == b"\xe2"
    assert vocabulary.text(token("<0xE2>")) == "�"
    assert vocabulary.text(token("<0x0A>")) == "\n"
    assert vocabulary.raw(token("▁Hello")) == b" Hello"
    assert vocabulary.raw(token("▁Hello"), first=True) == b"Hello"
    assert vocabulary.raw(token("▁")) == b" "
    assert vocabulary.text(token("</s>")) == "</s>"


@pytest.mark.parametrize("make", [byte_level_vocabulary, llama_vocabulary])
def test_ids_beyond_the_vocabulary_are_nothing(make: object) -> None:
    vocabulary = make()  # type: ignore[operator]
    beyond = vocabulary.tokenizer.get_vocab_size() + 7
    assert vocabulary.raw(beyond) == b""
    assert vocabulary.text(beyond) == ""
    assert vocabulary.pieces(True)[beyond] is None


def test_special_tokens_are_hidden_only_when_skipped() -> None:
    vocabulary = byte_level_vocabulary()
    special = vocabulary.tokenizer.token_to_id("<|im_end|>")
    added = vocabulary.tokenizer.token_to_id("日本")
    assert vocabulary.special_ids == {special}
    assert vocabulary.pieces(True)[special] is None
    assert vocabulary.pieces(False)[special] == "<|im_end|>"
    assert vocabulary.pieces(True)[added] == "日本"


@pytest.mark.parametrize(
    ("decoder", "family"),
    [
        (decoders.ByteLevel(), Family.BYTE_LEVEL),
        (decoders.Sequence([decoders.ByteLevel()]), Family.BYTE_LEVEL),
        (decoders.Metaspace(), Family.PIECES),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
            Family.PIECES,
        ),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), Family.OTHER),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), Family.OTHER),
        (decoders.WordPiece(), Family.OTHER),
        (decoders.BPEDecoder(), Family.OTHER),
        (decoders.CTC(), Family.OTHER),
    ],
)
def test_family_of_a_decoder(decoder: object, family: Family) -> None:
    assert family_of(decoder_json(decoder)) is family


def test_what_is_no_tokenizer_is_a_value_error() -> None:
    for data in (b"", b"{}", b"[1]", b"\xff\xfe"):
        with pytest.raises(ValueError):
            Vocabulary.from_buffer(data)


@pytest.mark.parametrize("make", [byte_level_vocabulary, llama_vocabulary])
def test_every_byte_has_a_token_whose_bytes_it_is(make: Callable[[], Vocabulary]) -> None:
    """All 256, those that are no character alone included: as in an answer's log-probabilities."""
    vocabulary = make()
    row = (-1.0, 1, [], [])
    for value in range(256):
        character = next(c for c, v in byte_of_character().items() if v == value)
        name = character if vocabulary.family is Family.BYTE_LEVEL else f"<0x{value:02X}>"
        found = entry(vocabulary, vocabulary.tokenizer.token_to_id(name), row, False)
        assert found.bytes == bytes([value])
        assert found.token == bytes([value]).decode("utf-8", "replace")
        assert chat_content([found])[0]["bytes"] == [value]


@pytest.mark.parametrize("make", [byte_level_vocabulary, llama_vocabulary])
def test_bytes_and_offsets_are_those_of_the_text(make: Callable[[], Vocabulary]) -> None:
    """Random texts, a token a byte: bytes add up to the text, and every token begins where it is found."""
    vocabulary = make()
    dice = random.Random(5)
    token = vocabulary.tokenizer.token_to_id
    byte_level = vocabulary.family is Family.BYTE_LEVEL
    names = {v: c for c, v in byte_of_character().items()}
    for _ in range(300):
        text = "".join(dice.choice("ab é日👩‍🚀\n") for _ in range(dice.randint(1, 12)))
        ids = [token(names[byte] if byte_level else f"<0x{byte:02X}>") for byte in text.encode()]
        pipeline = TextPipeline.create(vocabulary, [token("a")])
        offsets, length = TextOffsets(), 0
        joined = b""
        for token_id in ids:
            found = entry(vocabulary, token_id, (-1.0, 1, [], []), False)
            assert offsets.next(found) == length
            joined += found.bytes
            length += len(pipeline.feed(token_id))
        assert joined.decode() == text
        assert length == len(text)
