"""Requests with many prompts, or much to say about them: how many run at once, and what is too much."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.frontend.api.generate import MAX_IN_FLIGHT
from penstock.frontend.api.plan import MAX_PROMPT_LOGPROBS
from penstock.protos.errors import ApiError

COUNT = 3 * MAX_IN_FLIGHT + 5
FULL = ApiError("queue_full", "Full.", retry_after_s=3)


def watch(served: Any, fakes: Any, refuse: Any = lambda number: None) -> list[int]:
    """Notes how many requests are live whenever one starts. refuse: prompt id -> error."""
    live: list[int] = []

    def script(request: Any) -> Any:
        live.append(served.engine.num_live + 1)
        number = request.prompt_ids.ids[0]
        return fakes.Script([[40 + number % 50]] * request.n, refuse=refuse(number))

    served.engine.script = script
    return live


@pytest.mark.parametrize("n", [1, 2])
async def test_a_long_list_runs_in_a_window_and_keeps_its_order(served: Any, fakes: Any, n: int) -> None:
    live = watch(served, fakes)
    prompts = [[number] for number in range(COUNT)]
    answer = await served.complete(prompts, n=n, max_tokens=1, return_token_ids=True)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(COUNT * n))
    assert [choice["token_ids"] for choice in choices] == [[40 + i // n % 50] for i in range(COUNT * n)]
    assert answer.json()["usage"]["prompt_tokens"] == COUNT
    assert len(live) == COUNT
    assert max(live) <= MAX_IN_FLIGHT


async def test_a_long_list_is_streamed_whole(served: Any, fakes: Any) -> None:
    live = watch(served, fakes)
    body = {"prompt": [[number] for number in range(COUNT)], "max_tokens": 1}
    events = await served.events("/v1/completions", body)
    assert events[-1] == "[DONE]"
    ends = [event["choices"][0]["index"] for event in events[:-1] if event["choices"][0]["finish_reason"]]
    assert sorted(ends) == list(range(COUNT))
    assert max(live) <= MAX_IN_FLIGHT


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_among_the_first_is_the_answer(served: Any, fakes: Any, stream: bool) -> None:
    watch(served, fakes, lambda number: FULL if number == MAX_IN_FLIGHT - 1 else None)
    served.engine.running.clear()
    answer = await served.complete([[number] for number in range(COUNT)], max_tokens=1, stream=stream)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    served.engine.running.set()
    await served.idle()
    assert len(served.engine.requests) == MAX_IN_FLIGHT


async def test_a_later_refusal_ends_a_whole_answer(served: Any, fakes: Any) -> None:
    watch(served, fakes, lambda number: FULL if number == MAX_IN_FLIGHT + 3 else None)
    answer = await served.complete([[number] for number in range(COUNT)], max_tokens=1)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    await served.idle()
    assert len(served.engine.requests) < COUNT


async def test_a_later_refusal_ends_a_stream_with_its_frame(served: Any, fakes: Any) -> None:
    watch(served, fakes, lambda number: FULL if number == MAX_IN_FLIGHT + 3 else None)
    body = {"prompt": [[number] for number in range(COUNT)], "max_tokens": 1}
    events = await served.events("/v1/completions", body)
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["code"] == "queue_full"
    assert len([event for event in events if "error" in event]) == 1
    await served.idle()
    assert len(served.engine.requests) < COUNT


async def test_a_client_that_leaves_ends_those_not_started_too(served: Any, fakes: Any, tools: Any) -> None:
    watch(served, fakes)
    served.engine.running.clear()
    prompts = str([[number] for number in range(COUNT)])
    connection = await served.connect()
    body = b'{"stream":true,"prompt":%s}' % prompts.encode()
    await connection.send(tools.http("POST", "/v1/completions", body))
    await connection.reader.readuntil(b"\r\n\r\n")
    connection.close()
    await served.engine.wait_until(lambda: len(served.engine.aborted) == MAX_IN_FLIGHT)
    await served.idle()
    assert len(served.engine.requests) == MAX_IN_FLIGHT
    served.engine.running.set()


async def test_prompt_logprobs_are_bounded_over_all_prompts(served: Any) -> None:
    tokens = MAX_PROMPT_LOGPROBS // 21 + 1
    prompts = [[5] * 1000 for _ in range(tokens // 1000)] + [[5] * (tokens % 1000)]
    answer = await served.complete(prompts, prompt_logprobs=20, max_tokens=1)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "prompt_logprobs")
    assert str(tokens * 21) in error["message"]
    assert str(MAX_PROMPT_LOGPROBS) in error["message"]
    assert not served.engine.requests
    again = await served.complete([[5] * 100], prompt_logprobs=20, n=100, max_tokens=1)
    assert again.json()["error"]["param"] == "prompt_logprobs"
    fits = await served.complete([[5] * 1000] * 2, prompt_logprobs=20, max_tokens=1)
    assert [len(choice["prompt_logprobs"]) for choice in fits.json()["choices"]] == [1000, 1000]


@pytest.mark.parametrize(
    ("theirs", "completions", "chat"),
    [
        ("sampling.bad_words", "bad_words", "bad_words"),
        ("stop.stop_token_ids", "stop_token_ids", "stop_token_ids"),
        ("stop.max_new_tokens", "max_tokens", "max_tokens"),
        ("stop.min_new_tokens", "min_tokens", "min_tokens"),
        ("cache.salt", "cache_salt", "cache_salt"),
        ("prompt_ids", "prompt", "messages"),
        ("prompt", "prompt", "messages"),
        ("n", "n", "n"),
    ],
)
async def test_the_engines_refusals_name_the_callers_field(
    served: Any, fakes: Any, theirs: str, completions: str, chat: str
) -> None:
    served.engine.script = lambda request: fakes.Script([[]], refuse=ApiError("invalid_value", "No.", theirs))
    assert (await served.complete()).json()["error"]["param"] == completions
    assert (await served.chat()).json()["error"]["param"] == chat
