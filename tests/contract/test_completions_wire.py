"""The bytes of completions: prompt shapes, indexes, legacy log-probabilities."""

from __future__ import annotations

import re
from typing import Any

import pytest

from penstock.protos.errors import ApiError

PATH = "/v1/completions"


@pytest.mark.row("A4.8", "D1")
async def test_plain_stream_byte_for_byte(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script([[40, 41]])
    answer = await served.post(PATH, {"prompt": "hi", "stream": True})
    text = re.sub(r'"id":"cmpl-[0-9a-f]{32}"', '"id":"cmpl-*"', answer.text)
    text = re.sub(r'"created":\d{10}', '"created":0', text)
    text = re.sub(r"penstock-0-float32-tp1-[0-9a-f]{12}", "fp", text)
    head = 'data: {"id":"cmpl-*","object":"text_completion","created":0,"model":"fake-model",'
    choice = '"choices":[{"index":0,'
    first, second = served.tokenizer.tokenizer.decode([40]), served.tokenizer.tokenizer.decode([41])
    assert text == (
        head + choice + f'"text":"{first}","logprobs":null,"finish_reason":null}}]}}\n\n'
        + head + choice + f'"text":"{second}","logprobs":null,"finish_reason":null}}]}}\n\n'
        + head + '"system_fingerprint":"fp",' + choice
        + '"text":"","logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("hi there", 1), (["hi", "there"], 2), ([40, 41, 42], 1), ([[40, 41], [42], [43]], 3)],
)
@pytest.mark.row("A4.2", "A2.2")
async def test_prompt_shapes(served: Any, prompt: Any, num_prompts: int) -> None:
    body = (await served.complete(prompt, n=2, max_tokens=3)).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * num_prompts))
    requests = {tuple(request.prompt_ids.ids): request for request in served.engine.requests}
    encode = served.tokenizer.tokenizer.encode
    wanted = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    for index, one in enumerate(wanted):
        ids = encode(one).ids if isinstance(one, str) else one
        request = requests[tuple(ids)]
        for choice in range(2):
            text = served.tokenizer.tokenizer.decode(served.engine.tokens_for(request, choice, 3))
            assert body["choices"][index * 2 + choice]["text"] == text
    assert body["usage"]["completion_tokens"] == 6 * num_prompts
    assert body["usage"]["prompt_tokens"] == sum(len(ids) for ids in requests)

    *chunks, done = await served.events(PATH, {"prompt": prompt, "n": 2, "max_tokens": 3})
    assert done == "[DONE]"
    for choice in body["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]


@pytest.mark.row("A4.4", "D9")
async def test_default_limit_is_16(served: Any) -> None:
    assert (await served.complete()).json()["usage"]["completion_tokens"] == 16
    assert (await served.complete(max_tokens=None)).json()["usage"]["completion_tokens"] == 16


@pytest.mark.row("A4.9", "D6")
async def test_logprobs(served: Any, fakes: Any) -> None:
    fox = served.tokenizer.tokenizer.encode("fox").ids
    ids = [40, *fox, 41]
    served.engine.script = lambda request: fakes.Script([ids])
    body = (await served.complete(logprobs=2)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == body["choices"][0]["text"]
    offsets, at = [], 0
    for token in logprobs["tokens"]:
        offsets.append(at)
        at += len(token)
    assert logprobs["text_offset"] == offsets
    assert logprobs["token_logprobs"] == pytest.approx([fakes.fake_row(i, 0)[0] for i in ids])
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])

    *chunks, _ = await served.events(PATH, {"prompt": "Hello", "logprobs": 2})
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts for value in part[key]] == logprobs[key]

    zero = (await served.complete(logprobs=0)).json()["choices"][0]["logprobs"]
    assert [len(top) for top in zero["top_logprobs"]] == [1] * len(ids)


@pytest.mark.row("D6")
async def test_offsets_advance_by_tokens_not_by_released_text(served: Any, fakes: Any) -> None:
    # "The qui" may begin the stop string, so its text waits; its tokens do not.
    ids = served.tokenizer.tokenizer.encode("The quick brown").ids
    served.engine.script = lambda request: fakes.Script([[*ids, 40]])
    *chunks, _ = await served.events(PATH, {"prompt": "x", "logprobs": 0, "stop": "The quick green"})
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    tokens = [token for part in parts for token in part["tokens"]]
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]
    assert "".join(c["choices"][0]["text"] for c in chunks).startswith("The quick brown")


@pytest.mark.row("A5.3")
async def test_prompt_logprobs_and_token_ids_per_choice(served: Any) -> None:
    body = (
        await served.complete(
            [[40, 41], [42, 43, 44]], max_tokens=1, prompt_logprobs=0, return_token_ids=True
        )
    ).json()
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[40, 41], [42, 43, 44]]
    assert [len(choice["prompt_logprobs"]) for choice in body["choices"]] == [2, 3]
    assert body["choices"][1]["prompt_logprobs"][0] is None
    assert list(body["choices"][1]["prompt_logprobs"][2]) == ["44"]
    assert [len(choice["token_ids"]) for choice in body["choices"]] == [1, 1]


async def test_one_refused_prompt_refuses_all(served: Any, fakes: Any) -> None:
    def script(request: Any) -> Any:
        refuse = ApiError("queue_full", "full") if request.prompt_ids.ids[0] == 43 else None
        return fakes.Script([[40] * 1000], refuse=refuse)

    served.engine.script = script
    for stream in (False, True):
        answer = await served.complete([[42], [43], [44]], stream=stream)
        assert answer.status_code == 429
        await served.idle()


async def test_one_failing_prompt_ends_the_stream_once(served: Any, fakes: Any) -> None:
    def script(request: Any) -> Any:
        error = ApiError("engine_lost", "gone") if request.prompt_ids.ids[0] == 43 else None
        return fakes.Script([[40] * 1000], error=error, error_after=2)

    served.engine.script = script
    events = await served.events(PATH, {"prompt": [[42], [43], [44]], "max_tokens": 1000})
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["code"] == "engine_lost"
    assert sum("error" in event for event in events[:-1]) == 1
    await served.idle()


async def test_empty_prompts(served: Any) -> None:
    for prompt in ("", ["a", ""], [], [[]], [[1], []]):
        answer = await served.complete(prompt)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("prompt")
        assert answer.json()["error"]["code"] == "invalid_value"


async def test_ids_outside_the_vocabulary(served: Any) -> None:
    for prompt in ([1000], [[1, 2], [3, 1000]], [2**31 - 1], [2**40], [-1]):
        answer = await served.complete(prompt)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_value"
        assert answer.json()["error"]["param"].startswith("prompt")
    assert not served.engine.requests
    assert (await served.complete([999], max_tokens=1)).status_code == 200
