"""The Tokenizer contract over gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from transformers import AutoTokenizer

from penstock.protos import common_pb2
from penstock.protos import tokenizer_pb2 as pb
from penstock.protos.errors import ApiError, from_rpc
from penstock.tokenizer_service.tokenizer import LoadedTokenizer

Serve = Callable[..., Awaitable[Any]]
ModelFolder = Callable[[Any], Path]

CHAT = [{"role": "user", "content": "Hello world"}]
PROMPT = "<|im_start|>user\nHello world<|im_end|>\n<|im_start|>assistant\n"
THINKER = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}{# <tool_call> tools #}"
)
LOOP = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4


def render(messages: Any = CHAT, **fields: Any) -> pb.RenderRequest:
    return pb.RenderRequest(messages_json=json.dumps(messages).encode(), **{"return_text": True, **fields})


async def refusal(call: Any) -> ApiError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)


@pytest.mark.row("A6.1")
async def test_render(serve: Serve, chat_folder: Path) -> None:
    stub, parts = await serve(chat_folder)
    oracle = AutoTokenizer.from_pretrained(chat_folder)
    answer = await stub.Render(render())
    assert answer.text == PROMPT
    theirs = oracle.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert list(answer.ids) == list(theirs)
    assert answer.content_format == pb.CONTENT_FORMAT_STRING
    assert list(answer.stop_token_ids) == [oracle.convert_tokens_to_ids("<|im_end|>")]
    assert not answer.ends_in_reasoning
    assert not (await stub.Render(render(return_text=False))).text
    assert (await stub.Render(render(add_generation_prompt=False))).text.endswith("<|im_end|>\n")
    assert (await stub.Render(render("Hello world"))).ids == answer.ids
    as_parts = [{"role": "user", "content": [{"type": "text", "text": "Hello world"}]}]
    assert (await stub.Render(render(as_parts))).ids == answer.ids
    assert parts.pool.waiting == 0
    assert parts.lanes.pending == 0


async def test_render_options(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder)
    whole = list((await stub.Render(render())).ids)
    assert list((await stub.Render(render(truncate_prompt_tokens=4))).ids) == whole[-4:]
    assert list((await stub.Render(render(add_special_tokens=True))).ids) == [0, *whole]
    assert list((await stub.Render(render(max_tokens=len(whole)))).ids) == whole
    too_long = await refusal(stub.Render(render(max_tokens=len(whole) - 1)))
    assert (too_long.reason, too_long.param) == ("context_length_exceeded", "messages")
    assert f" {len(whole)} tokens" in too_long.message
    assert f" {len(whole)} tokens" in too_long.message
    fits = await stub.Render(render(max_tokens=4, truncate_prompt_tokens=4))
    assert len(fits.ids) == 4
    final = [*CHAT, {"role": "assistant", "content": "It is"}]
    open_end = await stub.Render(render(final, continue_final_message=True))
    assert open_end.text.endswith("<|im_start|>assistant\nIt is")
    forced = await stub.Render(render(content_format=pb.CONTENT_FORMAT_STRING))
    assert forced.content_format == pb.CONTENT_FORMAT_STRING


async def test_render_refusals(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder)
    cases: list[tuple[pb.RenderRequest, str, str]] = [
        (pb.RenderRequest(), "invalid_json", "messages"),
        (pb.RenderRequest(messages_json=b"[{"), "invalid_json", "messages"),
        (render([]), "invalid_value", "messages"),
        (render(model="other"), "model_not_found", "model"),
        (render(chat_template="{{ 1 }}"), "unsupported_parameter", "chat_template"),
        (
            render(add_generation_prompt=True, continue_final_message=True),
            "invalid_value",
            "continue_final_message",
        ),
        (render(truncate_prompt_tokens=0), "invalid_value", "truncate_prompt_tokens"),
        (render(content_format=7), "invalid_value", "content_format"),
        (render(template_kwargs_json=b'{"tokenize": true}'), "invalid_value", "chat_template_kwargs"),
        (render(tools_json=b"{}"), "invalid_type", "tools"),
        (render(documents_json=b"1"), "invalid_type", "documents"),
        (
            render(
                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]
            ),
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
    ]
    for request, reason, param in cases:
        error = await refusal(stub.Render(request))
        assert (error.reason, error.param) == (reason, param)
        assert error.http_status in (400, 404)
    assert "chatty" in (await refusal(stub.Render(render(model="other")))).message
    assert (await stub.Render(render())).text == PROMPT


async def test_a_template_that_loops_costs_one_request(serve: Serve, chat_folder: Path) -> None:
    stub, parts = await serve(chat_folder, chat_template=LOOP, render_timeout_seconds=1.5)
    error = await refusal(stub.Render(render()))
    assert (error.reason, error.http_status) == ("invalid_value", 400)
    encoded = await stub.Encode(pb.EncodeRequest(texts=["still here"]))
    assert len(encoded.encodings) == 1
    name, labels = "penstock:tokenizer_renderer_kills_total", {"cause": "timeout"}
    assert parts.metrics.registry.get_sample_value(name, labels) == 1


async def test_trusted_request_templates(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder, trust_request_chat_template=True, render_timeout_seconds=1.5)
    answer = await stub.Render(render(chat_template="{{ bos_token }}{{ messages[0].content }}<think>"))
    assert answer.text == "<s>Hello world<think>"
    assert answer.ends_in_reasoning
    assert answer.reasoning_parser == "deepseek_r1"
    twice = await stub.Render(render(chat_template="{{ bos_token }}x", add_special_tokens=True))
    assert list(twice.ids).count(0) == 1
    assert (await refusal(stub.Render(render(chat_template="{% for %}")))).param == "chat_template"
    assert (await refusal(stub.Render(render(chat_template=LOOP)))).reason == "invalid_value"
    assert (await stub.Render(render())).text == PROMPT


@pytest.mark.row("A3.1", "A6.3")
async def test_a_base_model_completes_but_does_not_chat(serve: Serve, base_folder: Path) -> None:
    stub, _ = await serve(base_folder)
    error = await refusal(stub.Render(render()))
    assert (error.reason, error.http_status, error.param) == ("invalid_value", 400, "messages")
    assert "no chat template" in error.message
    assert (await stub.Encode(pb.EncodeRequest(texts=["Hello"]))).encodings[0].ids
    info = await stub.GetInfo(pb.GetTokenizerInfoRequest())
    assert (info.has_chat_template, info.chat_template_source) == (False, "none")


@pytest.mark.parametrize(
    ("options", "source", "text"),
    [
        ({"chat_template": "default"}, "named:default", "Hello world"),
        ({"chat_template": "{{ messages[0].role }}"}, "flag", "user"),
        ({"chat_template": "FILE"}, "flag", "from a file"),
        ({"custom_chat_template": "{{ 'custom' }}"}, "environment", "custom"),
        ({"role_table": "TABLE"}, "role_table", "<Hello world>"),
    ],
)
@pytest.mark.row("A1.14", "A6.2", "A6.16")
async def test_where_the_template_comes_from(
    serve: Serve, base_folder: Path, tmp_path: Path, options: dict[str, str], source: str, text: str
) -> None:
    files = {"FILE": tmp_path / "t.jinja", "TABLE": tmp_path / "t.yaml"}
    files["FILE"].write_text("from a file")
    files["TABLE"].write_text('roles: {user: {pre_message: "<", post_message: ">"}}')
    given = {key: str(files.get(value, value)) for key, value in options.items()}
    stub, _ = await serve(base_folder, **given)
    assert (await stub.Render(render())).text == text
    info = await stub.GetInfo(pb.GetTokenizerInfoRequest())
    assert (info.chat_template_source, info.has_chat_template) == (source, True)


async def test_the_models_template_wins_over_the_environment(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder, custom_chat_template="{{ 'custom' }}")
    assert (await stub.Render(render())).text == PROMPT


async def test_tool_template_is_used_for_tools(serve: Serve, model_folder: ModelFolder) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} [TOOL_CALLS]"},
    ]
    stub, _ = await serve(model_folder(named))
    assert (await stub.Render(render())).text == "plain"
    assert (await stub.Render(render(tools_json=b" [ ] "))).text == "plain"
    assert (await stub.Render(render(tools_json=b'[{"type":"function"}]'))).text == "1 [TOOL_CALLS]"
    info = await stub.GetInfo(pb.GetTokenizerInfoRequest())
    assert (info.supports_tools, info.tool_parser) == (True, "mistral")


async def test_a_broken_template_of_the_model_fails_chats_only(
    serve: Serve, model_folder: ModelFolder
) -> None:
    stub, _ = await serve(model_folder("{% for %}"))
    assert (await refusal(stub.Render(render()))).reason == "invalid_value"
    assert (await stub.GetInfo(pb.GetTokenizerInfoRequest())).content_format == pb.CONTENT_FORMAT_STRING


async def test_reasoning_state_and_hints(serve: Serve, model_folder: ModelFolder) -> None:
    stub, _ = await serve(model_folder(THINKER))
    answer = await stub.Render(render())
    assert answer.ends_in_reasoning
    assert (answer.tool_parser, answer.reasoning_parser) == ("hermes", "deepseek_r1")
    said = [{"role": "user", "content": "say <think>"}]
    assert not (await stub.Render(render(said, add_generation_prompt=False))).ends_in_reasoning
    for content, inside in (("<think>hm", True), ("<think>hm</think>so", False), ("plain", False)):
        final = [*said, {"role": "assistant", "content": content}]
        answer = await stub.Render(render(final, continue_final_message=True))
        assert answer.ends_in_reasoning == inside


async def test_encode(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder)
    oracle = AutoTokenizer.from_pretrained(chat_folder)
    texts = ["Hello", "the quick fox"]
    rows = (
        await stub.Encode(pb.EncodeRequest(texts=texts, return_offsets=True, return_tokens=True))
    ).encodings
    assert [list(row.ids) for row in rows] == oracle(texts)["input_ids"]
    assert list(rows[0].tokens) == oracle.convert_ids_to_tokens(list(rows[0].ids))
    assert list(rows[0].offsets[-2:])[1] == 5
    bare = await stub.Encode(pb.EncodeRequest(texts=texts, add_special_tokens=False))
    assert [list(row.ids) for row in bare.encodings] == oracle(texts, add_special_tokens=False)["input_ids"]
    pairs = await stub.Encode(pb.EncodeRequest(texts=texts, pairs=texts))
    assert [list(row.ids) for row in pairs.encodings] == oracle(texts, texts)["input_ids"]
    assert set(pairs.encodings[0].token_type_ids) == {0, 1}
    first = await stub.Encode(
        pb.EncodeRequest(texts=texts[1:], truncate_tokens=3, truncation_side=pb.TRUNCATION_SIDE_RIGHT)
    )
    assert list(first.encodings[0].ids) == list(rows[1].ids)[:3]
    last = await stub.Encode(pb.EncodeRequest(texts=texts[1:], truncate_tokens=3))
    assert list(last.encodings[0].ids) == [0, *list(rows[1].ids)[-2:]]
    assert not (await stub.Encode(pb.EncodeRequest())).encodings


async def test_encode_and_decode_refusals(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder)
    cases: list[tuple[pb.EncodeRequest, str, str | None]] = [
        (pb.EncodeRequest(texts=["a"], model="x"), "model_not_found", "model"),
        (pb.EncodeRequest(texts=["a"], pairs=["b", "c"]), "invalid_value", "pairs"),
        (pb.EncodeRequest(texts=["a"], truncate_tokens=0), "invalid_value", "truncate_tokens"),
        (pb.EncodeRequest(texts=["a"], truncation_side=9), "invalid_value", "truncation_side"),
        (pb.EncodeRequest(texts=["a b c"], max_tokens=2), "context_length_exceeded", "prompt"),
        (pb.EncodeRequest(texts=["a"] * 4097), "invalid_value", "texts"),
        (pb.EncodeRequest(texts=["a" * 4_194_305]), "request_too_large", "texts"),
        (pb.EncodeRequest(texts=["a" * 4_000_000] * 5), "request_too_large", "texts"),
        (pb.EncodeRequest(texts=["a" * 4_194_305], max_tokens=5), "context_length_exceeded", "prompt"),
    ]
    for request, reason, param in cases:
        error = await refusal(stub.Encode(request))
        assert (error.reason, error.param) == (reason, param)
    bad = pb.DecodeRequest(rows=[common_pb2.TokenIds(ids=[4_000_000_000])])
    assert (await refusal(stub.Decode(bad))).reason == "invalid_value"
    assert (await refusal(stub.Decode(pb.DecodeRequest(model="x")))).reason == "model_not_found"


async def test_decode(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder)
    ids = (await stub.Encode(pb.EncodeRequest(texts=["Hello é😀"]))).encodings[0].ids
    rows = [common_pb2.TokenIds(ids=ids), common_pb2.TokenIds()]
    assert list((await stub.Decode(pb.DecodeRequest(rows=rows))).texts) == ["Hello é😀", ""]
    kept = await stub.Decode(pb.DecodeRequest(rows=rows, skip_special_tokens=False))
    assert kept.texts[0] == "<s>Hello é😀"


async def test_get_tokenizer(serve: Serve, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.tokenizer_service.server.CHUNK_BYTES", 1000)
    stub, _ = await serve(chat_folder)
    file = (chat_folder / "tokenizer.json").read_bytes()
    chunks = [chunk async for chunk in stub.GetTokenizer(pb.GetTokenizerRequest())]
    assert b"".join(chunk.data for chunk in chunks) == file
    assert max(len(chunk.data) for chunk in chunks) <= 1000
    fingerprint = hashlib.sha256(file).hexdigest()
    assert {(chunk.fingerprint, chunk.total_bytes) for chunk in chunks} == {(fingerprint, len(file))}
    again = [c async for c in stub.GetTokenizer(pb.GetTokenizerRequest(known_fingerprint=fingerprint))]
    assert [(c.fingerprint, c.data) for c in again] == [(fingerprint, b"")]
    other = [c async for c in stub.GetTokenizer(pb.GetTokenizerRequest(known_fingerprint="old"))]
    assert len(other) == len(chunks)


async def test_get_info(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder, served_model_name=("first", "second"))
    for name in ("", "first", "second"):
        info = await stub.GetInfo(pb.GetTokenizerInfoRequest(model=name))
        assert info.model == "first"
    assert (
        await refusal(stub.GetInfo(pb.GetTokenizerInfoRequest(model="chatty")))
    ).reason == "model_not_found"
    assert dict(info.special_token_ids) == {"bos": 0, "eos": 1, "pad": 1}
    assert info.vocab_size == len(AutoTokenizer.from_pretrained(chat_folder))
    assert info.add_bos_token
    assert not info.supports_tools
    assert {"default", "llama-2-chat", "chatml"} <= set(info.named_templates)
    assert list(info.all_special_ids) == [0, 1, 2, 3, 4, 5, 6]


async def test_a_short_text_does_not_wait_for_a_long_one(
    serve: Serve, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane for long texts is blocked on purpose; short calls are answered meanwhile."""
    stub, _ = await serve(chat_folder)
    begun, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    encode = LoadedTokenizer.encode

    def slow(self: LoadedTokenizer, texts: list[str], *rest: Any) -> Any:
        if len(texts[0]) > 1_000_000:
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(60)
        return encode(self, texts, *rest)

    monkeypatch.setattr(LoadedTokenizer, "encode", slow)
    long = asyncio.ensure_future(stub.Encode(pb.EncodeRequest(texts=["a " * (1 << 19)])))
    await asyncio.wait_for(begun.wait(), 60)
    for _ in range(20):
        assert (await stub.Render(render())).text == PROMPT
        assert (await stub.Encode(pb.EncodeRequest(texts=["short"]))).encodings
    assert not long.done()
    go_on.set()
    assert (await long).encodings[0].ids


async def test_calls_are_counted(serve: Serve, chat_folder: Path) -> None:
    stub, parts = await serve(chat_folder)
    await stub.Render(render())
    await refusal(stub.Render(render([])))
    value = parts.metrics.registry.get_sample_value
    name = "penstock:tokenizer_requests_total"
    assert value(name, {"method": "Render", "code": "ok"}) == 1
    assert value(name, {"method": "Render", "code": "invalid_value"}) == 1
    assert value("penstock:tokenizer_requests_pending") == 0
    assert value("penstock:tokenizer_request_seconds_count", {"method": "Render"}) == 2
    assert value("penstock:tokenizer_renders_waiting") == 0


async def test_random_requests_never_break_the_service(serve: Serve, chat_folder: Path) -> None:
    """Mutated and cut requests: each gets an answer or a refusal of the table, never an internal error."""
    stub, _ = await serve(chat_folder)
    good = json.dumps(
        [{"role": "user", "content": [{"type": "text", "text": "é"}]}, {"role": "assistant"}]
    ).encode()
    codes = set()
    for cut in range(0, len(good), 5):
        for data in (good[:cut], good[cut:], good[:cut] + b"\x00" + good[cut:], good[:cut] + good[cut + 3 :]):
            try:
                await stub.Render(
                    pb.RenderRequest(messages_json=data, tools_json=data[:3], documents_json=data[:2])
                )
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
    assert codes == {grpc.StatusCode.INVALID_ARGUMENT}
    assert (await stub.Render(render())).text == PROMPT
