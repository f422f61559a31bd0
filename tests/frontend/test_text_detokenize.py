"""Streaming detokenization against decoding everything at once, for the decoder families of real
tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from penstock.frontend.text.detokenize import PieceDetokenizer, WindowDetokenizer, make_detokenizer
from penstock.frontend.text.token_bytes import Family
from penstock.frontend.text.vocabulary import Vocabulary

TEXT = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "Once upon a time, two tiny models counted: one, two, three. Über Straße naïve café.",
    "def f(x):\n    return x + 1\n\n  indented   words",
]
REPLACEMENT = "�"


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return with_added(tokenizer)


def byte_pieces() -> dict[str, int]:
    return {f"<0x{value:02X}>": value + 3 for value in range(256)}


def llama() -> Tokenizer:
    """As Llama 2 and Mistral: a mark for the space, byte fallback, the first space stripped."""
    return with_added(sentencepiece_bpe([decoders.Strip(" ", 1, 0)], prefix=True))


def gemma() -> Tokenizer:
    """As Gemma: the same without stripping."""
    return with_added(sentencepiece_bpe([], prefix=False))


def sentencepiece_bpe(last: list[Any], prefix: bool) -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator(["▁" + text for text in TEXT], trainer)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **byte_pieces()}
    for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1]):
        vocab.setdefault(token, len(vocab))
    state = __import__("json").loads(trained.to_str())["model"]["merges"]
    merges = [tuple(pair) for pair in state]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and XLM-R: Unigram with Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return with_added(tokenizer)


def wordpiece() -> Tokenizer:
    """As BERT: a decoder that looks at neighbours."""
    words = ["[UNK]", "hello", "world", "##ly", "##s", ",", ".", "don", "'", "t", "a", "b", "##b", "!"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return with_added(tokenizer)


def plain() -> Tokenizer:
    """No decoder at all: tokens joined with spaces."""
    words = ["<unk>", "hello", "world", "a", "b"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return with_added(tokenizer)


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<｜wide▁end｜>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("né e", normalized=False)])
    return tokenizer


MAKERS = {
    "byte_level": byte_level,
    "llama": llama,
    "gemma": gemma,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "plain": plain,
}
VOCABULARIES: dict[str, Vocabulary] = {}


def vocabulary_of(name: str) -> Vocabulary:
    if name not in VOCABULARIES:
        VOCABULARIES[name] = Vocabulary(MAKERS[name]())
    return VOCABULARIES[name]


def stream(
    vocabulary: Vocabulary,
    prompt: list[int],
    output: list[int],
    skip: bool = True,
    kind: Any = make_detokenizer,
) -> list[str]:
    detokenizer = kind(vocabulary, prompt, skip)
    parts = [detokenizer.feed(token_id) for token_id in output]
    return [*parts, detokenizer.flush()]


def at_once(vocabulary: Vocabulary, prompt: list[int], output: list[int], skip: bool = True) -> str:
    """Decoding everything, less decoding the prompt."""
    before = vocabulary.tokenizer.decode(prompt, skip_special_tokens=skip)
    after = vocabulary.tokenizer.decode(prompt + output, skip_special_tokens=skip)
    assert after.startswith(before)
    return after[len(before) :]


def is_byte(vocabulary: Vocabulary, token_id: int) -> bool:
    return isinstance(vocabulary.pieces(False)[token_id], bytes)


def test_families() -> None:
    families = {name: vocabulary_of(name).family for name in MAKERS}
    assert families == {
        "byte_level": Family.BYTE_LEVEL,
        "llama": Family.PIECES,
        "gemma": Family.PIECES,
        "unigram": Family.PIECES,
        "wordpiece": Family.OTHER,
        "plain": Family.OTHER,
    }


SENTENCES = [
    "Hello world, how are you?",
    "  two spaces   three\n\ttabs ",
    "日本語のテキスト、全角！",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 ok",
    "naïve café Straße ÅÄÖ ñ",
    "עברית and العربية mixed",
    "zero\u200dwidth e\u0301 combining",
    "",
]


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma"])
@pytest.mark.parametrize("text", SENTENCES)
def test_every_split_into_prompt_and_output(name: str, text: str) -> None:
    vocabulary = vocabulary_of(name)
    ids = vocabulary.tokenizer.encode(text).ids
    for cut in range(len(ids) + 1):
        prompt, output = ids[:cut], ids[cut:]
        if vocabulary.tokenizer.decode(prompt).endswith(REPLACEMENT):
            continue  # inside a character, see below
        assert "".join(stream(vocabulary, prompt, output)) == at_once(vocabulary, prompt, output)
    assert "".join(stream(vocabulary, [], ids)) == vocabulary.tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma"])
@pytest.mark.parametrize("text", SENTENCES)
def test_never_half_a_character(name: str, text: str) -> None:
    vocabulary = vocabulary_of(name)
    ids = vocabulary.tokenizer.encode(text).ids
    parts = stream(vocabulary, [], ids)
    assert parts[-1] == ""
    assert all(REPLACEMENT not in part for part in parts)


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma"])
def test_an_unfinished_character_ends_as_replacement(name: str) -> None:
    vocabulary = vocabulary_of(name)
    prompt = vocabulary.tokenizer.encode("Hi").ids
    ids = vocabulary.tokenizer.encode("a👩").ids
    for left_out in (1, 2, 3):
        *parts, rest = stream(vocabulary, prompt, ids[:-left_out])
        assert REPLACEMENT not in "".join(parts)
        assert set(rest) == {REPLACEMENT}
        assert "".join(parts) + rest == at_once(vocabulary, prompt, ids[:-left_out])


@pytest.mark.parametrize("name", ["byte_level", "llama"])
def test_a_character_begun_by_the_prompt_is_finished_whole(name: str) -> None:
    vocabulary = vocabulary_of(name)
    ids = vocabulary.tokenizer.encode("ab👩cd").ids
    text = "👩cd"
    last = max(i for i, token_id in enumerate(ids) if is_byte(vocabulary, token_id))
    for cut in range(last - 2, last + 1):
        assert "".join(stream(vocabulary, ids[:cut], ids[cut:])) == text
        # An output that does not go on with it: the open character belongs to the prompt.
        other = vocabulary.tokenizer.encode("ab").ids[-1:]
        whole = "".join(stream(vocabulary, ids[:cut], other))
        assert whole == at_once(vocabulary, ids[:cut], other)
        assert "".join(stream(vocabulary, ids[:cut], [])) == ""


@pytest.mark.parametrize("name", sorted(MAKERS))
@given(data=st.data())
def test_random_ids_against_decoding_at_once(name: str, data: st.DataObject) -> None:
    vocabulary = vocabulary_of(name)
    size = vocabulary.tokenizer.get_vocab_size()
    ids = st.integers(0, size + 3)  # some beyond the vocabulary, as padded models give
    if name in ("llama", "gemma"):
        # Invalid runs of byte tokens cannot be taken back in a stream; they have tests of their own.
        ids = ids.filter(lambda token_id: not is_byte(vocabulary, token_id))
    prompt = data.draw(st.lists(ids, max_size=12))
    output = data.draw(st.lists(ids, max_size=12))
    skip = data.draw(st.booleans())
    before = vocabulary.tokenizer.decode(prompt, skip_special_tokens=skip)
    if before.endswith(REPLACEMENT):
        return
    assert "".join(stream(vocabulary, prompt, output, skip)) == at_once(vocabulary, prompt, output, skip)


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma"])
@given(prompt=st.text(max_size=12), output=st.text(max_size=12))
def test_random_texts_against_decoding_at_once(name: str, prompt: str, output: str) -> None:
    vocabulary = vocabulary_of(name)
    first, second = vocabulary.tokenizer.encode(prompt).ids, vocabulary.tokenizer.encode(output).ids
    parts = stream(vocabulary, first, second)
    assert "".join(parts) == at_once(vocabulary, first, second)


@given(data=st.binary(max_size=24))
def test_random_bytes_of_a_byte_level_tokenizer(data: bytes) -> None:
    vocabulary = vocabulary_of("byte_level")
    by_byte = {vocabulary.raw(i): i for i in range(256 + 5) if len(vocabulary.raw(i)) == 1}
    ids = [by_byte[bytes((value,))] for value in data]
    assert "".join(stream(vocabulary, [], ids)) == data.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xff", "x" + REPLACEMENT + "y"),
        (b"\xe2\x82", "x" + 2 * REPLACEMENT + "y"),
        (b"\xf0\x9f\x91", "x" + 3 * REPLACEMENT + "y"),
        (b"\x80\x80\x80", "x" + 3 * REPLACEMENT + "y"),
        ("é".encode() + b"\xff", "xé" + REPLACEMENT + "y"),  # é was sent before the run became invalid
        ("👩".encode(), "x👩y"),
    ],
)
def test_byte_runs_of_a_byte_fallback_tokenizer(data: bytes, text: str) -> None:
    vocabulary = vocabulary_of("llama")
    x, y = (vocabulary.tokenizer.token_to_id(character) for character in "xy")
    ids = [x, *(value + 3 for value in data), y]
    assert "".join(stream(vocabulary, [x], ids)) == text


def test_endless_byte_tokens_hold_nothing_back() -> None:
    """Otherwise each step would decode all of them again."""
    vocabulary = vocabulary_of("llama")
    detokenizer = make_detokenizer(vocabulary, [], True)
    sent = "".join(detokenizer.feed(0xF0 + 3) for _ in range(1000))
    assert len(sent) >= 999


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_special_tokens_hidden_and_shown(name: str) -> None:
    vocabulary = vocabulary_of(name)
    start, end = (vocabulary.tokenizer.token_to_id(token) for token in ("<|start|>", "<|end|>"))
    word = (
        next(i for i in range(20, 400) if vocabulary.text(i).strip().isalpha())
        if name
        not in (
            "wordpiece",
            "plain",
        )
        else 1
    )
    prompt, output = [word], [word, start, end, word]
    for skip in (True, False):
        text = "".join(stream(vocabulary, prompt, output, skip))
        assert text == at_once(vocabulary, prompt, output, skip)
        assert ("<|start|>" in text) is not skip


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma", "unigram"])
def test_both_ways_agree(name: str) -> None:
    """The table of pieces against the library's DecodeStream, where both apply."""
    vocabulary = vocabulary_of(name)
    ids = vocabulary.tokenizer.encode("The quick brown fox, one two three").ids
    for cut in (0, 1, 3):
        pieces = stream(vocabulary, ids[:cut], ids[cut:], kind=PieceDetokenizer)
        window = stream(vocabulary, ids[:cut], ids[cut:], kind=WindowDetokenizer)
        assert "".join(pieces) == "".join(window)


def test_window_goes_on_after_what_decode_stream_refuses() -> None:
    vocabulary = vocabulary_of("llama")
    x, y = (vocabulary.tokenizer.token_to_id(character) for character in "xy")
    ids = [x, 0xC3 + 3, 0xA9 + 3, 0xFF + 3, x, y]
    text = "".join(stream(vocabulary, [x], ids, kind=WindowDetokenizer))
    assert text == "xé" + REPLACEMENT + "xy"


def test_window_holds_back_a_bounded_number_of_tokens() -> None:
    vocabulary = vocabulary_of("llama")
    detokenizer = WindowDetokenizer(vocabulary, [], True)
    sent = "".join(detokenizer.feed(0xF0 + 3) for _ in range(100))
    assert len(sent) >= 90
