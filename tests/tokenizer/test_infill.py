"""Fill-in-the-middle prompts: each family by its vocabulary, in the order it was trained on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from penstock.protos import tokenizer_pb2 as pb
from penstock.protos.errors import from_rpc

Serve = Callable[..., Awaitable[Any]]
ModelFolder = Callable[[Any], Path]

# family -> (tokens added to the vocabulary, what the prompt reads, texts of the ids that end the answer)
FAMILIES = {
    "qwen": (
        ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"],
        "<|fim_prefix|>def f(<|fim_suffix|>)\n<|fim_middle|>",
        ["<|endoftext|>", "<|fim_pad|>"],
    ),
    "starcoder": (
        ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"],
        "<fim_prefix>def f(<fim_suffix>)\n<fim_middle>",
        ["<|endoftext|>"],
    ),
    "deepseek": (
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
        "<｜fim▁begin｜>def f(<｜fim▁hole｜>)\n<｜fim▁end｜>",
        [],
    ),
    "codestral": (["[SUFFIX]", "[PREFIX]", "[MIDDLE]"], "[SUFFIX])\n[PREFIX]def f(", []),
}


def with_tokens(folder: Path, tokens: list[str]) -> Path:
    """Adds special tokens to the folder's tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_order_and_the_ends_are_the_familys(
    serve: Serve, model_folder: ModelFolder, family: str
) -> None:
    tokens, form, ends = FAMILIES[family]
    folder = with_tokens(model_folder(None), tokens)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stub, _ = await serve(folder)
    answer = await stub.Encode(pb.EncodeRequest(texts=["def f(", "x"], suffix=")\n"))
    first, second = (list(encoding.ids) for encoding in answer.encodings)
    assert tokenizer.decode(first, skip_special_tokens=False) == "<s>" + form
    assert tokenizer.decode(second, skip_special_tokens=False) == "<s>" + form.replace("def f(", "x")
    # The marks are single tokens, not text that reads like them.
    assert [tokenizer.token_to_id(token) in first for token in tokens if token in form] == [True] * (
        2 if family == "codestral" else 3
    )
    assert sorted(answer.stop_token_ids) == sorted(tokenizer.token_to_id(token) for token in ends)
    bare = await stub.Encode(pb.EncodeRequest(texts=["def f("], suffix=")\n", add_special_tokens=False))
    assert list(bare.encodings[0].ids) == first[1:]


async def test_codellama_gets_no_space_before_the_suffix(serve: Serve, model_folder: ModelFolder) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "☺", "▁a", "▁b"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = model_folder(None)
    tokenizer.save(str(folder / "tokenizer.json"))
    with_tokens(folder, ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stub, _ = await serve(folder)
    answer = await stub.Encode(pb.EncodeRequest(texts=["a"], suffix="b"))
    names = [made.id_to_token(token) for token in answer.encodings[0].ids]
    assert names == ["<s>", "▁<PRE>", "▁a", "▁<SUF>", "b", "▁<MID>"]
    assert [made.id_to_token(token) for token in answer.stop_token_ids] == ["▁<EOT>"]


async def test_refusals(serve: Serve, model_folder: ModelFolder, chat_folder: Path) -> None:
    plain, _ = await serve(chat_folder)
    able, _ = await serve(with_tokens(model_folder(None), FAMILIES["qwen"][0]))
    for stub, fields, reason, param in (
        (plain, {}, "unsupported_parameter", "suffix"),
        (able, {"pairs": ["x"]}, "invalid_value", "suffix"),
        (able, {"truncate_tokens": 3}, "invalid_value", "suffix"),
        (able, {"return_offsets": True}, "invalid_value", "suffix"),
        (able, {"max_tokens": 3}, "context_length_exceeded", "prompt"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Encode(pb.EncodeRequest(texts=["a b c"], suffix="d", **fields))
        error = from_rpc(caught.value)
        assert (error.reason, error.param) == (reason, param)
