"""What an answer tells beside its text: the fingerprint of what made it, its duration, the caller's marks."""

from __future__ import annotations

import logging
from typing import Any

import openai
import pytest

MARKS = {"generation_name": "one", "trace_user_id": "me"}
NESTED = {"generation_name": "one", "trace": {"id": ["a", 1, None], "nested": {"deep": True}}}
SENDERS = ["chat", "complete"]


@pytest.mark.parametrize("kind", SENDERS)
@pytest.mark.row("A10.3")
async def test_metadata_of_any_form_is_taken_and_texts_come_back(served: Any, kind: str) -> None:
    send = getattr(served, kind)
    for metadata in (MARKS, {}, {str(i): "x" * 1000 for i in range(100)}, NESTED):
        answer = await send(max_tokens=1, metadata=metadata)
        assert answer.status_code == 200, answer.text
        # The client's type for it knows texts only.
        assert answer.json().get("metadata") == (None if metadata is NESTED else metadata)
        assert "x-penstock-ignored" not in answer.headers
    assert "metadata" not in (await send(max_tokens=1)).json()
    assert (await send(max_tokens=1, metadata=NESTED, stream=True)).status_code == 200


@pytest.mark.row("A3.13", "A4.16", "A10.3")
async def test_the_record_has_the_callers_marks_on_one_line(served: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "penstock.frontend.usage")
    await served.chat(max_tokens=1, user="a\nb" * 100, metadata={**NESTED, "long": "y\n" * 5000})
    await served.complete(max_tokens=1)
    first, second = (record for record in caplog.records if record.name == "penstock.frontend.usage")
    assert first.user == ("a?b" * 100)[:128]
    assert first.metadata.startswith('{"generation_name":"one","trace":{"id":["a",1,null]')
    assert len(first.metadata) == 1024
    assert "\n" not in first.metadata
    assert not hasattr(second, "user")
    assert not hasattr(second, "metadata")


@pytest.mark.parametrize("kind", SENDERS)
@pytest.mark.row("A10.7")
async def test_an_answer_tells_its_milliseconds(served: Any, kind: str) -> None:
    served.engine.step_delay_s = 0.02
    answer = await getattr(served, kind)(max_tokens=3)
    told = answer.json()["_response_ms"]
    assert isinstance(told, float)
    assert told >= 60
    # Headers are made after the body.
    assert int(answer.headers["openai-processing-ms"]) >= int(told)


@pytest.mark.row("A10.7")
async def test_the_official_client_takes_all_of_it(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script([[40, 41]], finish=fakes.STOP)
    async with openai.AsyncOpenAI(base_url=served.base_url, api_key="EMPTY", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hi"}]
        whole = await client.chat.completions.create(
            model="fake-model", messages=messages, max_tokens=2, extra_body={"metadata": MARKS}
        )
        assert whole.model_dump()["_response_ms"] > 0
        assert whole.metadata == MARKS
        async with client.chat.completions.stream(
            model="fake-model", messages=messages, stream_options={"include_usage": True}
        ) as stream:
            final = await stream.get_final_completion()
        text = await client.completions.create(model="fake-model", prompt="hi", max_tokens=2)
    prints = {whole.system_fingerprint, final.system_fingerprint, text.system_fingerprint}
    assert len(prints) == 1
    assert str(whole.system_fingerprint).startswith("penstock-0-float32-tp1-")


@pytest.mark.row("A10.7")
async def test_the_fingerprint_is_that_of_the_computation(serve: Any) -> None:
    async def told(**options: Any) -> str:
        served = await serve(options.pop("engine", None), **options)
        return str((await served.complete(max_tokens=1)).json()["system_fingerprint"])

    first = await told()
    # Another process, with another instance id and another name for the same thing.
    assert await told(engine={"aliases": ["short"]}) == first
    assert await told(generation_defaults={"temperature": 0.5}) != first
    assert await told(engine={"vocab_size": 900, "model": "another"}) != first
