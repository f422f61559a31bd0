"""The official client as the judge, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from penstock.protos.errors import KINDS, ApiError


@contextmanager
def sync_client(served: Any, **options: Any) -> Iterator[openai.OpenAI]:
    base_url = options.pop("base_url", served.base_url)
    with openai.OpenAI(base_url=base_url, **{"api_key": "EMPTY", "max_retries": 0, **options}) as client:
        yield client


async def in_thread(served: Any, work: Callable[[openai.OpenAI], Any], **options: Any) -> Any:
    def run() -> Any:
        with sync_client(served, **options) as client:
            return work(client)

    return await asyncio.to_thread(run)


MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.mark.row("A2.3", "A10.1", "A11.1")
async def test_chat(served: Any) -> None:
    def work(client: openai.OpenAI) -> Any:
        whole = client.chat.completions.create(model="fake-model", messages=MESSAGES, max_tokens=6, seed=3)
        chunks = list(
            client.chat.completions.create(
                model="fake-model",
                messages=MESSAGES,
                max_tokens=6,
                seed=3,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        return whole, chunks

    whole, chunks = await in_thread(served, work)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert whole._request_id == whole.id.removeprefix("chatcmpl-")


@pytest.mark.row("D2", "A11.1")
async def test_stream_helper(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script([[40] * 5, [41] * 5], finish=fakes.STOP)
    async with (
        openai.AsyncOpenAI(base_url=served.base_url, api_key="EMPTY") as client,
        client.chat.completions.stream(
            model="fake-model", messages=MESSAGES, max_tokens=5, n=2, logprobs=True, top_logprobs=1
        ) as stream,
    ):
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "content.delta" in kinds
    assert [choice.message.role for choice in final.choices] == ["assistant", "assistant"]
    assert all(choice.logprobs and len(choice.logprobs.content or []) == 5 for choice in final.choices)


@pytest.mark.row("A2.2", "A4.8")
async def test_completions(served: Any) -> None:
    def work(client: openai.OpenAI) -> Any:
        created = client.completions.create(
            model="fake-model", prompt="San Francisco is a", max_tokens=7, temperature=0
        )
        chunks = list(
            client.completions.create(
                model="fake-model", prompt="San Francisco is a", max_tokens=7, temperature=0, stream=True
            )
        )
        return created, chunks

    created, chunks = await in_thread(served, work)
    assert created.usage.completion_tokens == 7
    assert "".join(chunk.choices[0].text for chunk in chunks) == created.choices[0].text
    assert served.engine.requests[-1].sampling.temperature == 0


@pytest.mark.row("A5.9", "A10.3")
async def test_extra_body_and_request_id(served: Any) -> None:
    def work(client: openai.OpenAI) -> Any:
        return client.completions.create(
            model="fake-model",
            prompt="x",
            extra_headers={"x-request-id": "completion-test"},
            extra_body={"top_k": 1, "min_tokens": 3, "metadata": {"trace": {"id": 1}}},
        )

    created = await in_thread(served, work)
    assert created._request_id == "completion-test"
    assert created.id == "cmpl-completion-test"
    assert served.engine.requests[-1].sampling.top_k == 1
    assert served.engine.requests[-1].request_id == "completion-test"


@pytest.mark.row("A2.7")
async def test_without_v1(served: Any) -> None:
    answer = await in_thread(
        served,
        lambda c: c.chat.completions.create(model="fake-model", messages=MESSAGES, max_tokens=1),
        base_url=served.url,
    )
    assert answer.choices


@pytest.mark.row("A1.15")
async def test_prefixed_base_url(serve: Any) -> None:
    served = await serve(root_path="/v2/ID/openai")
    for base_url in (served.url + "/v2/ID/openai/v1", served.base_url):
        models = await in_thread(served, lambda c: list(c.models.list()), base_url=base_url)
        assert [model.id for model in models] == ["fake-model"]


@pytest.mark.parametrize("name", ["llama2:70b", "org/model", "openchat/openchat-3.5-0106"])
@pytest.mark.row("A1.13", "A2.1")
async def test_models(serve: Any, name: str) -> None:
    served = await serve({"model": name, "aliases": ["short"]})
    models = await in_thread(served, lambda c: list(c.models.list()))
    assert [model.id for model in models] == [name, "short"]
    assert models[0].created == 1_700_000_000
    found = await in_thread(served, lambda c: c.models.retrieve(name))
    assert found.id == name
    answer = await in_thread(
        served, lambda c: c.chat.completions.create(model="short", messages=MESSAGES, max_tokens=1)
    )
    assert answer.model == name


# What the client raises for each status; for what has no class of its own, the class of them all.
CLASSES: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
    504: openai.InternalServerError,
}


@pytest.mark.row("A10.2", "D5")
async def test_exceptions(served: Any, fakes: Any) -> None:
    """Every row of the error table, whole and streamed."""

    def work(client: openai.OpenAI, stream: bool) -> openai.APIStatusError | None:
        try:
            client.chat.completions.create(model="fake-model", messages=MESSAGES, stream=stream)
        except openai.APIStatusError as error:
            return error
        return None

    for reason, kind in KINDS.items():
        if reason == "client_disconnected":
            continue
        refusal = ApiError(reason, "why", "field")
        served.engine.script = lambda request, refusal=refusal: fakes.Script([[]], refuse=refusal)
        for stream in (False, True):
            error = await in_thread(served, lambda client, stream=stream: work(client, stream))
            assert type(error) is CLASSES.get(kind.http_status, openai.APIStatusError), reason
            code = "unsupported_parameter" if reason == "unimplemented" else reason
            assert (error.status_code, error.code, error.type) == (kind.http_status, code, kind.type)
            assert (error.param, error.body["message"]) == ("field", "why")
            assert error.request_id


@pytest.mark.row("A1.7", "A10.2")
async def test_wrong_key(serve: Any) -> None:
    served = await serve(api_key=("right",))
    with pytest.raises(openai.AuthenticationError) as caught:
        await in_thread(served, lambda c: c.models.list(), api_key="wrong")
    assert caught.value.code == "invalid_api_key"
    assert await in_thread(served, lambda c: list(c.models.list()), api_key="right")


@pytest.mark.row("D5")
async def test_error_in_mid_stream_raises(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script(
        [[40] * 9], error=ApiError("engine_lost", "gone"), error_after=3
    )

    def work(client: openai.OpenAI) -> Any:
        seen = []
        with pytest.raises(openai.APIError) as caught:
            for chunk in client.chat.completions.create(model="fake-model", messages=MESSAGES, stream=True):
                seen.append(chunk.choices[0].delta.content)
        return seen, caught.value

    seen, error = await in_thread(served, work)
    assert len([text for text in seen if text]) == 3
    assert (error.code, error.type, error.message) == ("engine_lost", "service_unavailable_error", "gone")


async def test_many_at_once_are_told_apart(served: Any) -> None:
    async with openai.AsyncOpenAI(base_url=served.base_url, api_key="EMPTY") as client:

        async def one(i: int, stream: bool) -> str:
            kind: Any = {"model": "fake-model", "prompt": [40 + i, 41], "max_tokens": 30, "seed": i}
            if not stream:
                return (await client.completions.create(**kind)).choices[0].text
            chunks = await client.completions.create(**kind, stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        together = await asyncio.gather(*(one(i, i % 2 == 0) for i in range(40)))
        alone = [await one(i, False) for i in range(40)]
    assert together == alone
    assert len(set(together)) == 40
