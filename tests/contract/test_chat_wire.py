"""The bytes of chat answers: order of chunks, null and absent keys, usage, log-probabilities."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
FINGERPRINT = r"penstock-0-float32-tp1-[0-9a-f]{12}"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def golden(text: str) -> str:
    """A stream's text with what differs from run to run taken out."""
    text = re.sub(FINGERPRINT, "fp", text)
    text = re.sub(r'"id":"chatcmpl-[0-9a-f]{32}"', '"id":"chatcmpl-*"', text)
    return re.sub(r'"created":\d{10}', '"created":0', text)


@pytest.mark.row("A3.9", "D1", "D2")
async def test_plain_stream_byte_for_byte(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script(
        [[40, 41, 2]], finish=fakes.STOP, stop_token_id=2, by_eos=True
    )
    answer = await served.post(CHAT, {**HI, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    head = 'data: {"id":"chatcmpl-*","object":"chat.completion.chunk","created":0,"model":"fake-model",'
    first, second = served.tokenizer.tokenizer.decode([40]), served.tokenizer.tokenizer.decode([41])
    running = '"logprobs":null,"finish_reason":null}]}\n\n'
    told = head + '"system_fingerprint":"fp",'
    assert golden(answer.text) == (
        told + '"choices":[{"index":0,"delta":{"role":"assistant","content":""},' + running
        + head + '"choices":[{"index":0,"delta":{"content":"' + first + '"},' + running
        + head + '"choices":[{"index":0,"delta":{"content":"' + second + '"},' + running
        + told + '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop",'
        + '"stop_reason":null}]}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip


@pytest.mark.row("A10.7", "D8")
async def test_whole_answer(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script([[40, 41]], finish=fakes.STOP, cached=4)
    answer = await served.chat("hi", seed=1)
    body = answer.json()
    prompt = body["usage"]["prompt_tokens"]
    assert body.pop("id") == "chatcmpl-" + answer.headers["x-request-id"]
    assert isinstance(body.pop("created"), int)
    assert re.fullmatch(FINGERPRINT, body.pop("system_fingerprint"))
    assert 0 < body.pop("_response_ms") < 60_000
    assert body == {
        "object": "chat.completion",
        "model": "fake-model",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": served.tokenizer.tokenizer.decode([40, 41]),
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 2,
            "total_tokens": prompt + 2,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert prompt == len(served.engine.requests[-1].prompt_ids.ids)
    assert int(answer.headers["openai-processing-ms"]) >= 0


@pytest.mark.row("A3.5", "D2")
async def test_several_choices(served: Any) -> None:
    whole = (await served.post(CHAT, {**HI, "n": 3, "max_tokens": 4})).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert whole["usage"]["completion_tokens"] == 12

    *chunks, done = await served.events(CHAT, {**HI, "n": 3, "max_tokens": 4})
    assert done == "[DONE]"
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert [d["index"] for d in deltas if "role" in d["delta"]] == [0, 1, 2]
    for index in range(3):
        own = [d for d in deltas if d["index"] == index]
        assert "role" in own[0]["delta"]
        assert own[-1]["delta"] == {}
        assert [d["finish_reason"] for d in own] == [None] * (len(own) - 1) + ["length"]
        assert "".join(d["delta"].get("content", "") for d in own) == texts[index]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


@pytest.mark.row("A3.27", "D3")
async def test_usage_only_when_asked(served: Any) -> None:
    plain = await served.events(CHAT, {**HI, "max_tokens": 2})
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain[:-1])

    options = {"include_usage": True}
    *chunks, last, done = await served.events(CHAT, {**HI, "max_tokens": 2, "stream_options": options})
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 2
    assert all(chunk["usage"] is None for chunk in chunks)

    options = {"include_usage": False, "continuous_usage_stats": True}
    *chunks, _ = await served.events(CHAT, {**HI, "max_tokens": 3, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
    assert counts == sorted(counts)
    assert counts[-1] == 3


@pytest.mark.row("D6")
async def test_logprobs(served: Any, fakes: Any) -> None:
    # 200 is half a character: its bytes are right where its text is not.
    served.engine.script = lambda request: fakes.Script([[40, 200, 41]])
    raw = served.frontend.services.models["fake-model"]
    vocabulary = await served.frontend.services.vocabulary(raw)
    body = (await served.post(CHAT, {**HI, "logprobs": True, "top_logprobs": 2})).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert body["choices"][0]["logprobs"]["refusal"] is None
    assert [bytes(entry["bytes"]) for entry in content] == [vocabulary.raw(i) for i in (40, 200, 41)]
    for entry, token in zip(content, (40, 200, 41), strict=True):
        logprob, _, ids, values = fakes.fake_row(token, 2)
        assert entry["logprob"] == pytest.approx(logprob)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(values)
        assert [bytes(top["bytes"]) for top in entry["top_logprobs"]] == [vocabulary.raw(i) for i in ids]

    body = (await served.post(CHAT, {**HI, "logprobs": True})).json()
    assert [entry["top_logprobs"] for entry in body["choices"][0]["logprobs"]["content"]] == [[], [], []]

    *chunks, _ = await served.events(CHAT, {**HI, "logprobs": True, "top_logprobs": 2})
    streamed = [
        e for c in chunks if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content


@pytest.mark.row("D6")
async def test_infinite_logprobs_become_numbers(served: Any, fakes: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        fakes, "fake_row", lambda token, k: (-float("inf"), 9, [token] * k, [-float("inf")] * k)
    )
    served.engine.script = lambda request: fakes.Script([[40]])
    body = (await served.post(CHAT, {**HI, "logprobs": True, "top_logprobs": 1})).json()
    entry = body["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == -9999.0
    assert entry["top_logprobs"][0]["logprob"] == -9999.0


@pytest.mark.row("A3.18", "D7")
async def test_stop_reason(served: Any, fakes: Any) -> None:
    token = served.tokenizer.tokenizer.encode("fox").ids
    served.engine.script = lambda request: fakes.Script([[40, *token, 41, 41, 41]])
    body = (await served.post(CHAT, {**HI, "stop": ["zebra", "fox"]})).json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] == "fox"
    assert body["choices"][0]["message"]["content"] == served.tokenizer.tokenizer.decode([40])
    served.engine.script = lambda request: fakes.Script([[40, 41]], finish=fakes.STOP, stop_token_id=41)
    body = (await served.post(CHAT, {**HI, "stop_token_ids": [41]})).json()
    assert body["choices"][0]["stop_reason"] == 41


@pytest.mark.row("D8")
async def test_no_text_is_an_empty_string_and_not_absent(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script(
        [[2]], finish=fakes.STOP, stop_token_id=2, by_eos=True
    )
    body = (await served.post(CHAT, HI)).json()
    assert body["choices"][0]["message"]["content"] == ""
    *chunks, _ = await served.events(CHAT, HI)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]


async def test_token_ids_on_demand(served: Any) -> None:
    body = (await served.post(CHAT, {**HI, "max_tokens": 3, "return_token_ids": True})).json()
    request = served.engine.requests[-1]
    assert body["prompt_token_ids"] == list(request.prompt_ids.ids)
    assert body["choices"][0]["token_ids"] == served.engine.tokens_for(request, 0, 3)
    *chunks, _ = await served.events(CHAT, {**HI, "max_tokens": 3, "return_token_ids": True})
    assert chunks[0]["prompt_token_ids"] == list(request.prompt_ids.ids)
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == body["choices"][0][
        "token_ids"
    ]


@pytest.mark.row("A5.1")
async def test_prompt_logprobs(served: Any, fakes: Any) -> None:
    body = (await served.post(CHAT, {**HI, "max_tokens": 1, "prompt_logprobs": 2})).json()
    ids = list(served.engine.requests[-1].prompt_ids.ids)
    rows = body["prompt_logprobs"]
    assert rows[0] is None
    assert len(rows) == len(ids)
    for token, row in zip(ids[1:], rows[1:], strict=True):
        logprob, _, others, _ = fakes.fake_row(token, 2)
        assert list(row) == [str(other) for other in others]
        assert row[str(token)]["logprob"] == pytest.approx(logprob)
        assert row[str(token)]["rank"] == 1
        assert isinstance(row[str(token)]["decoded_token"], str)


@pytest.mark.row("D2")
async def test_no_chunk_before_the_prompt_is_computed(served: Any, tools: Any) -> None:
    served.engine.running.clear()
    connection = await served.connect()
    await connection.send(tools.http("POST", CHAT, b'{"messages":"hi","stream":true,"max_tokens":1}'))
    async with asyncio.timeout(60):
        await connection.reader.readuntil(b"\r\n\r\n")
    await served.engine.wait_until(lambda: served.engine.num_live == 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await connection.reader.readexactly(1)
    served.engine.running.set()
    async with asyncio.timeout(60):
        body, whole = await connection._chunks()
    assert whole
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.row("D1")
async def test_comments_keep_a_silent_stream_open(serve: Any, tools: Any) -> None:
    served = await serve(sse_keepalive_seconds=0.05)
    served.engine.running.clear()
    connection = await served.connect()
    await connection.send(tools.http("POST", CHAT, b'{"messages":"hi","stream":true,"max_tokens":1}'))
    async with asyncio.timeout(60):
        await connection.reader.readuntil(b": keep-alive\n\n")
        await connection.reader.readuntil(b": keep-alive\n\n")
    served.engine.running.set()
    async with asyncio.timeout(60):
        await connection.reader.readuntil(b"data: [DONE]\n\n")


async def test_effective_parameters(serve: Any) -> None:
    served = await serve(
        generation_defaults={"temperature": 0.6, "top_p": 0.9},
        override_generation_config='{"top_p": 0.5, "max_new_tokens": 2}',
    )
    body = (await served.post(CHAT, {**HI, "top_k": 5, "return_effective_params": True})).json()
    effective = body["effective_params"]
    assert effective["temperature"] == {"value": 0.6, "source": "model"}
    assert effective["top_p"] == {"value": 0.5, "source": "server"}
    assert effective["top_k"] == {"value": 5, "source": "request"}
    assert effective["min_p"] == {"value": 0.0, "source": "default"}
    assert body["usage"]["completion_tokens"] == 2
    sampling = served.engine.requests[-1].sampling
    assert sampling.temperature == pytest.approx(0.6)
    assert sampling.top_p == pytest.approx(0.5)
    chunks = await served.events(CHAT, {**HI, "max_tokens": 1, "return_effective_params": True})
    assert chunks[0]["effective_params"]["top_p"]["source"] == "server"
