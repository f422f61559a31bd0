"""Encoding and decoding against transformers, and model folders that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from penstock.protos.errors import ApiError
from penstock.tokenizer_service import tokenizer_files
from penstock.tokenizer_service.tokenizer import EncodeOptions, LoadedTokenizer, load
from penstock.tokenizer_service.tokenizer_files import ModelFilesError

TEXTS = [
    "Hello world",
    "",
    "the quick brown fox 123",
    "é😀 中文\n\n  spaces ",
    "<|im_start|>user\nhi<|im_end|>",
    "a" * 300,
]


def loaded(folder: Path) -> LoadedTokenizer:
    return load(tokenizer_files.read(str(folder)))


@pytest.fixture(scope="module")
def tokenizer(chat_folder: Path) -> LoadedTokenizer:
    return loaded(chat_folder)


@pytest.fixture(scope="module")
def oracle(chat_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_folder)


def test_info(tokenizer: LoadedTokenizer, oracle: PreTrainedTokenizerBase) -> None:
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.special_ids == {"bos": 0, "eos": 1, "pad": 1}
    assert tokenizer.all_special_ids == [0, 1, 2, 3, 4, 5, 6]
    assert tokenizer.adds_bos
    assert len(tokenizer.fingerprint) == 64


@pytest.mark.parametrize("special", [True, False])
def test_encode_equals_transformers(
    tokenizer: LoadedTokenizer, oracle: PreTrainedTokenizerBase, special: bool
) -> None:
    theirs = oracle(TEXTS, add_special_tokens=special, return_offsets_mapping=True)
    rows = tokenizer.encode(TEXTS, [], EncodeOptions(add_special_tokens=special, offsets=True, tokens=True))
    for i, row in enumerate(rows):
        assert row.ids == theirs["input_ids"][i]
        assert row.offsets == [edge for span in theirs["offset_mapping"][i] for edge in span]
        assert row.tokens == oracle.convert_ids_to_tokens(row.ids)
        assert row.type_ids == []
    plain = tokenizer.encode(TEXTS, [], EncodeOptions(add_special_tokens=special))
    assert [row.ids for row in plain] == [row.ids for row in rows]


def test_pairs_equal_transformers(tokenizer: LoadedTokenizer, oracle: PreTrainedTokenizerBase) -> None:
    theirs = oracle(TEXTS, TEXTS[::-1], return_token_type_ids=True)
    rows = tokenizer.encode(TEXTS, TEXTS[::-1], EncodeOptions())
    assert [row.ids for row in rows] == theirs["input_ids"]
    assert [row.type_ids for row in rows] == theirs["token_type_ids"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
def test_truncation_equals_transformers(
    tokenizer: LoadedTokenizer, chat_folder: Path, side: str, limit: int, special: bool
) -> None:
    oracle = AutoTokenizer.from_pretrained(chat_folder, truncation_side=side)
    theirs = oracle(TEXTS, truncation=True, max_length=limit, add_special_tokens=special)["input_ids"]
    options = EncodeOptions(add_special_tokens=special, truncate=limit, keep_last=side == "left")
    rows = [row.ids for row in tokenizer.encode(TEXTS, [], options)]
    if special and limit == 1:  # transformers refuses; only the special token fits
        rows = [row[:1] for row in rows]
        assert all(len(row) == 1 for row in rows)
    else:
        assert rows == theirs


def test_little_is_kept_of_long_pairs_in_no_time(tokenizer: LoadedTokenizer) -> None:
    """What was cut off both sides must not be joined piece by piece: a million of them here."""
    long = "hello world " * 3000
    brief, cut = (
        tokenizer.encode([text], [text], EncodeOptions(truncate=10, keep_last=False))[0]
        for text in ("hello world " * 12, long)
    )
    assert len(cut.ids) == 10
    assert (cut.ids, cut.type_ids) == (brief.ids, brief.type_ids)


def test_truncated_pairs_keep_both_sides(tokenizer: LoadedTokenizer) -> None:
    long, short = "word " * 50, "hi"
    (row,) = tokenizer.encode([long], [short], EncodeOptions(truncate=20, keep_last=False))
    (untouched,) = tokenizer.encode([short], [], EncodeOptions())
    assert len(row.ids) == 20
    assert row.ids[-len(untouched.ids) :] == untouched.ids
    assert row.type_ids == [0] * (20 - len(untouched.ids)) + [1] * len(untouched.ids)
    (both,) = tokenizer.encode([long], [long], EncodeOptions(truncate=21))
    assert len(both.ids) == 21


def test_the_text_of_several_that_is_too_long_is_named(tokenizer: LoadedTokenizer) -> None:
    for texts, name in ((["a b c d e"], "prompt"), (["a", "a", "a b c d e"], "prompt[2]")):
        with pytest.raises(ApiError) as caught:
            tokenizer.encode(texts, [], EncodeOptions(max_tokens=4))
        assert caught.value.param == name


def test_too_many_tokens_names_both_numbers(tokenizer: LoadedTokenizer) -> None:
    count = len(tokenizer.encode(["Hello world"], [], EncodeOptions())[0].ids)
    with pytest.raises(ApiError, match=rf"\b3 tokens.*\b{count} tokens") as caught:
        tokenizer.encode(["Hello world"], [], EncodeOptions(max_tokens=2))
    assert caught.value.reason == "context_length_exceeded"


def test_limits_inside_tokenizer_json_do_not_bind(tmp_path: Path, chat_folder: Path) -> None:
    limited = Tokenizer.from_file(str(chat_folder / "tokenizer.json"))
    limited.enable_truncation(4)
    limited.enable_padding(length=64)
    limited.save(str(tmp_path / "tokenizer.json"))
    (row,) = loaded(tmp_path).encode(["the quick brown fox jumps"], [], EncodeOptions())
    assert 4 < len(row.ids) < 64


def test_decode_equals_transformers(tokenizer: LoadedTokenizer, oracle: PreTrainedTokenizerBase) -> None:
    rows = [row.ids for row in tokenizer.encode(TEXTS, [], EncodeOptions())]
    for skip in (True, False):
        theirs = [
            oracle.decode(r, skip_special_tokens=skip, clean_up_tokenization_spaces=False) for r in rows
        ]
        assert tokenizer.decode(rows, skip, True) == theirs


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer: LoadedTokenizer) -> None:
    for bad in (tokenizer.vocab_size, 2**32 - 1):
        with pytest.raises(ApiError, match=str(bad)) as caught:
            tokenizer.decode([[5], [5, bad]], True, True)
        assert caught.value.reason == "invalid_value"
        assert caught.value.param == "rows[1]"


def words(folder: Path, vocabulary: dict[str, int], specials: list[str]) -> Path:
    """A word-level tokenizer, whose decoder puts a blank between any two tokens."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_holes_in_the_vocabulary_are_outside_it(tmp_path: Path) -> None:
    folder = words(tmp_path, {"[UNK]": 0, "a": 1, "b": 5}, [])
    tokenizer = loaded(folder)
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode([[1, 5]], True, True) == ["a b"]
    with pytest.raises(ApiError):
        tokenizer.decode([[1, 3]], True, True)


@pytest.mark.row("A3.20")
def test_spaces_between_special_tokens(tmp_path: Path) -> None:
    tokenizer = loaded(words(tmp_path, {"[UNK]": 0, "a": 1, "b": 2}, ["<x>", "<y>"]))
    ids = tokenizer.encode(["<x><y>a b<x>"], [], EncodeOptions())[0].ids
    assert tokenizer.decode([ids], False, True) == ["<x> <y> a b <x>"]
    assert tokenizer.decode([ids], False, False) == ["<x><y>a b<x>"]
    assert tokenizer.decode([ids], True, False) == ["a b"]


def test_tokens_that_only_the_configuration_calls_special_are_skipped(tmp_path: Path) -> None:
    folder = words(tmp_path, {"[UNK]": 0, "a": 1, "END": 2}, [])
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "END"}}))
    tokenizer = loaded(folder)
    assert tokenizer.special_ids == {"eos": 2}
    assert tokenizer.all_special_ids == [2]
    assert tokenizer.decode([[1, 2]], True, True) == ["a"]


def test_an_added_token_that_only_the_configuration_calls_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.add_tokens([AddedToken("<end>", special=False, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    ours = loaded(tmp_path)
    assert ours.all_special_ids == [2]
    assert ours.decode([[1, 2]], True, True) == ["a"]


def test_a_batch_in_groups_keeps_its_order(
    tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenizer.encode(TEXTS, [], EncodeOptions())
    monkeypatch.setattr("penstock.tokenizer_service.tokenizer.GROUP_CHARS", 10)
    assert tokenizer.encode(TEXTS, [], EncodeOptions()) == whole
    assert tokenizer.encode([], [], EncodeOptions()) == []


def test_a_template_that_writes_bos_gets_no_second_one(tokenizer: LoadedTokenizer) -> None:
    assert tokenizer.encode_prompt("<s>[INST] hi", True) == tokenizer.encode_prompt("<s>[INST] hi", False)
    assert tokenizer.encode_prompt("hi", True)[0] == 0
    assert tokenizer.encode_prompt("hi", False)[0] != 0


@pytest.mark.parametrize(
    "text", ["a" * (1 << 20), "ab " * (1 << 18), "\n" * (1 << 20)], ids=["one", "words", "lines"]
)
def test_a_megabyte_of_repetition_is_encoded(tokenizer: LoadedTokenizer, text: str) -> None:
    (row,) = tokenizer.encode([text], [], EncodeOptions(add_special_tokens=False))
    assert tokenizer.decode([row.ids], True, True) == [text]


def test_older_files_are_converted(tmp_path: Path, chat_folder: Path) -> None:
    model = json.loads((chat_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = loaded(tmp_path)
    assert tokenizer.decode(
        [row.ids for row in tokenizer.encode(["Hello é"], [], EncodeOptions())], True, True
    ) == ["Hello é"]
    assert load(tokenizer_files.read(str(tmp_path))).fingerprint == tokenizer.fingerprint


def broken(name: str, data: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)

    return change


CORRUPT: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no tokenizer.json": ("tokenizer.json", broken("tokenizer.json", None)),
    "empty": ("tokenizer.json", broken("tokenizer.json", b"")),
    "cut off": ("tokenizer.json", broken("tokenizer.json", b'{"version": "1.0", "model": {"ty')),
    "not a tokenizer": ("tokenizer.json", broken("tokenizer.json", b'{"hello": 1}')),
    "a list": ("tokenizer.json", broken("tokenizer.json", b"[]")),
    "deep": ("tokenizer.json", broken("tokenizer.json", b"[" * 200_000)),
    "not UTF-8": ("tokenizer.json", broken("tokenizer.json", b"\xff\xfe\x00")),
    "no words": (
        "tokenizer.json",
        broken(
            "tokenizer.json",
            b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}',
        ),
    ),
    "config cut off": ("tokenizer_config.json", broken("tokenizer_config.json", b'{"bos_token":')),
    "config a list": ("tokenizer_config.json", broken("tokenizer_config.json", b"[]")),
    "template a number": ("tokenizer_config.json", broken("tokenizer_config.json", b'{"chat_template": 5}')),
    "template without name": (
        "tokenizer_config.json",
        broken("tokenizer_config.json", b'{"chat_template": [{}]}'),
    ),
    "template not UTF-8": ("chat_template.jinja", broken("chat_template.jinja", b"\xff")),
    "map cut off": ("special_tokens_map.json", broken("special_tokens_map.json", b"{")),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_folders_are_refused_with_the_files_name(
    tmp_path: Path, chat_folder: Path, case: str
) -> None:
    for file in chat_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name, change = CORRUPT[case]
    change(tmp_path)
    with pytest.raises(ModelFilesError) as caught:
        loaded(tmp_path)
    line = str(caught.value)
    assert name in line
    assert "\n" not in line
    assert len(line) < 600


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="no such folder"):
        tokenizer_files.read(str(tmp_path / "nowhere"))


def test_code_in_the_folder_is_never_run(tmp_path: Path, chat_folder: Path) -> None:
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer.json").write_bytes((chat_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    marker = tmp_path / "was-run"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    loaded(tmp_path)
    assert not marker.exists()


def template_files(folder: Path, **config: Any) -> dict[str, str]:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_files.read(str(folder)).templates


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert template_files(tmp_path) == {}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert template_files(tmp_path) == {"default": "J"}
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert template_files(tmp_path, chat_template=named) == {"default": "D", "tool_use": "T"}
    assert template_files(tmp_path, chat_template="C") == {"default": "C"}
    (tmp_path / "chat_template.jinja").write_text("F")
    assert template_files(tmp_path, chat_template="C") == {"default": "F"}
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("U")
    assert template_files(tmp_path, chat_template="C") == {"default": "F", "tool_use": "U"}


def test_byte_fallback_and_bos_from_the_post_processor(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "▁a": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    ours = loaded(tmp_path)
    assert ours.adds_bos
    (row,) = ours.encode(["é"], [], EncodeOptions())
    assert ours.decode([row.ids], True, True)[0].strip() == "é"


@pytest.mark.parametrize("limit", [5, 6, 9, 10, 21])
def test_truncated_pairs_equal_transformers(
    tokenizer: LoadedTokenizer, chat_folder: Path, limit: int
) -> None:
    """As a cross-encoder truncates: one token at a time from the longer side, the first tokens are kept."""
    oracle = AutoTokenizer.from_pretrained(chat_folder, truncation_side="right")
    words = ["one", "two words", "a b c d", "the quick brown fox jumps over", "word " * 30, "number " * 31]
    firsts = [first for first in words for _ in words]
    seconds = words * len(words)
    theirs = oracle(firsts, seconds, truncation="longest_first", max_length=limit, return_token_type_ids=True)
    rows = tokenizer.encode(firsts, seconds, EncodeOptions(truncate=limit, keep_last=False))
    assert [row.ids for row in rows] == theirs["input_ids"]
    assert [row.type_ids for row in rows] == theirs["token_type_ids"]


def test_an_input_that_gets_no_answer_may_fill_the_context(tokenizer: LoadedTokenizer) -> None:
    count = len(tokenizer.encode(["Hello world"], [], EncodeOptions())[0].ids)
    tokenizer.encode(["Hello world"], [], EncodeOptions(max_tokens=count, no_answer=True))
    with pytest.raises(ApiError, match=rf"input length is {count - 1} tokens.*\b{count} tokens"):
        tokenizer.encode(["Hello world"], [], EncodeOptions(max_tokens=count - 1, no_answer=True))


def test_prompts_of_sentence_transformers(tmp_path: Path, chat_folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((chat_folder / "tokenizer.json").read_bytes())
    config = tmp_path / "config_sentence_transformers.json"
    assert (loaded(tmp_path).prompts, loaded(tmp_path).default_prompt_name) == ({}, "")
    config.write_text('{"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "query"}')
    assert loaded(tmp_path).prompts == {"query": "find: ", "document": ""}
    assert loaded(tmp_path).default_prompt_name == "query"
    for bad in ('{"prompts": ["a"]}', '{"prompts": {"a": 1}}', '{"default_prompt_name": "a"}'):
        config.write_text(bad)
        with pytest.raises(ModelFilesError, match="config_sentence_transformers"):
            loaded(tmp_path)
