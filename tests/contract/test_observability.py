"""Metrics, the usage record, the access log and the API's own description."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_counts(serve: Any) -> None:
    served = await serve()
    await served.chat(max_tokens=4, n=2)
    await served.events("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3})
    await served.chat(temperature=9)
    await served.get("/v1/models/fake-model")
    await served.get("/nothing")
    await served.client.request("PROPFIND", "/nothing")
    found = samples((await served.get("/metrics")).text)
    model = (("model_name", "fake-model"),)
    prompt = sum(len(request.prompt_ids.ids) for request in served.engine.requests)
    assert found["penstock:generation_tokens_total", model] == 14
    assert found["penstock:prompt_tokens_total", model] == prompt
    assert found["penstock:time_to_first_token_seconds_count", model] == 2
    assert found["penstock:inter_token_latency_seconds_count", model] == 14 - 4
    assert found["penstock:e2e_request_latency_seconds_count", model] == 2
    assert found["penstock:request_success_total", (("finished_reason", "length"), *model)] == 2
    assert found["penstock:request_params_n_sum", model] == 3
    assert found["penstock:request_params_max_tokens_sum", model] == 7
    assert found["penstock:open_streams", ()] == 0
    http = {
        labels: value for (name, labels), value in found.items() if name == "penstock:http_requests_total"
    }
    assert http[("method", "POST"), ("route", "/chat/completions"), ("status", "200")] == 1
    assert http[("method", "POST"), ("route", "/chat/completions"), ("status", "400")] == 1
    assert http[("method", "GET"), ("route", "/models/*"), ("status", "200")] == 1
    assert http[("method", "GET"), ("route", "unknown"), ("status", "404")] == 1
    assert http[("method", "OTHER"), ("route", "unknown"), ("status", "404")] == 1
    assert not any(name.startswith("vllm:") for name, _ in found)


async def test_vllm_names_on_demand(serve: Any) -> None:
    served = await serve(vllm_metrics=True)
    await served.chat(max_tokens=4)
    found = samples((await served.get("/metrics")).text)
    for name in (
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "prompt_tokens_total",
        "generation_tokens_total",
    ):
        model = (("model_name", "fake-model"),)
        assert found[f"vllm:{name}", model] == found[f"penstock:{name}", model]


async def test_streams_are_counted_while_open(served: Any, tools: Any) -> None:
    served.engine.running.clear()
    connection = await served.connect()
    await connection.send(
        tools.http("POST", "/v1/chat/completions", b'{"messages":"x","stream":true,"max_tokens":1}')
    )
    await served.engine.wait_until(lambda: served.engine.num_live == 1)
    assert samples((await served.get("/metrics")).text)["penstock:open_streams", ()] == 1
    served.engine.running.set()
    await connection.answer()
    await served.idle()
    assert samples((await served.get("/metrics")).text)["penstock:open_streams", ()] == 0


async def test_one_usage_record_per_request(served: Any, fakes: Any, tools: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "penstock.frontend.usage")
    await served.chat(max_tokens=3, headers={"x-request-id": "one"})
    served.engine.step_delay_s = 0.001
    connection = await served.connect()
    body = b'{"messages":"secret words","stream":true,"max_tokens":3000}'
    await connection.send(tools.http("POST", "/v1/chat/completions", body))
    async with asyncio.timeout(60):
        await connection.reader.readuntil(b'"content":"')
        await connection.reader.readuntil(b'"content":"')
    connection.close()
    await served.idle()
    records = [record for record in caplog.records if record.name == "penstock.frontend.usage"]
    assert [record.finished for record in records] == ["length", "abort"]
    assert (records[0].prompt_tokens, records[0].completion_tokens) == (18, 3)
    assert records[1].completion_tokens >= 1
    assert "secret" not in caplog.text


async def test_access_log_is_one_harmless_line(served: Any, tools: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "penstock.frontend.access")
    await served.raw(tools.http("GET", "/v1/models%0aINFO%20forged?key=secret"))
    lines = [record.getMessage() for record in caplog.records if record.name == "penstock.frontend.access"]
    assert len(lines) == 1
    assert re.fullmatch(r"GET /v1/models%0aINFO%20forged 404 [\d.]+ ms", lines[0])


async def test_openapi(served: Any) -> None:
    document = (await served.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    temperature = schemas["ChatRequest"]["properties"]["temperature"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)
    assert schemas["CompletionRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 128
    assert schemas["ChatRequest"]["required"] == ["messages"]
    for reference in re.findall(r'"#/components/schemas/([^"]+)"', (await served.get("/openapi.json")).text):
        assert reference in schemas
    for path, operations in document["paths"].items():
        for method in operations:
            url = path.replace("{model}", "fake-model")
            answer = await served.client.request(method.upper(), url, json={} if method == "post" else None)
            assert answer.status_code in (200, 400), path
    names = [operation["operationId"] for ops in document["paths"].values() for operation in ops.values()]
    assert len(names) == len(set(names))


def test_openapi_is_valid() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    from penstock.frontend.api.openapi import describe

    validator.validate(describe())
