"""The load client against a scripted server, and its arithmetic."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from penstock.local import bench, bench_client, bench_report
from penstock.local.bench import BenchConfig
from penstock.local.bench_client import Endpoint, Sample

MODELS = json.dumps({"data": [{"id": "listed"}]}).encode()


def _events(count: int, prompt: int) -> bytes:
    frames = [json.dumps({"choices": [{"index": 0, "text": f"t{i}"}], "usage": None}) for i in range(count)]
    usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
    frames.append(json.dumps({"choices": [], "usage": usage}))
    return b"".join(f"data: {frame}\n\n".encode() for frame in [*frames, "[DONE]"])


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_events_are_read_wherever_the_stream_is_split(
    size: int, scripted_server: Callable[..., Any], http_chunked: Callable[..., Any]
) -> None:
    data = _events(5, 3)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    server = scripted_server(lambda method, path, body: http_chunked(pieces))
    sample = await bench_client.complete(Endpoint(server.url, "sk-1"), "m", [1, 2, 3], 5)
    assert sample.error == ""
    assert (sample.prompt_tokens, sample.completion_tokens, len(sample.arrivals)) == (3, 5, 5)
    assert sample.started <= sample.arrivals[0] <= sample.arrivals[-1] <= sample.ended
    head, body = server.requests[0]
    assert head.startswith("POST /v1/completions HTTP/1.1")
    assert "Authorization: Bearer sk-1" in head
    asked = json.loads(body)
    assert (asked["prompt"], asked["max_tokens"], asked["ignore_eos"]) == ([1, 2, 3], 5, True)


async def test_what_counts_as_a_failure(
    scripted_server: Callable[..., Any], http_response: Callable[..., bytes], http_chunked: Callable[..., Any]
) -> None:
    refusal = http_response(429, json.dumps({"error": {"message": "busy"}}).encode())
    cases: dict[str, list[bytes]] = {
        "status 429: busy": [refusal],
        "status 500": [http_response(500, b"x")],
        "lost": http_chunked([b'data: {"error": {"message": "lost"}}\n\n']),
        "the stream ended without [DONE]": http_chunked([b"data: {}\n\n"]),
        "the body broke off": http_chunked([b"data: {}\n\n"], end=False),
        "no HTTP answer": [b""],
        "an answer without tokens or without usage": http_chunked([b"data: [DONE]\n\n"]),
    }
    for words, pieces in cases.items():
        server = scripted_server(lambda method, path, body, pieces=pieces: pieces)
        sample = await bench_client.complete(Endpoint(server.url, ""), "m", [1], 5)
        assert words in sample.error


@pytest.mark.parametrize("rate", [0.0, 200.0])
async def test_a_whole_measurement(
    rate: float, scripted_server: Callable[..., Any], http_response: Callable[..., bytes], http_chunked: Any
) -> None:
    def script(method: str, path: str, body: bytes) -> list[bytes]:
        if path == "/v1/models":
            return [http_response(200, MODELS)]
        return http_chunked([_events(4, len(json.loads(body)["prompt"]))])

    server = scripted_server(script)
    config = BenchConfig(
        url=server.url, num_prompts=9, concurrency=3, rate=rate, input_len=6, output_len=4, warmup=2
    )
    report = await bench.measure(config)
    assert (report.requests, report.failures) == (9, 0)
    assert (report.prompt_tokens, report.completion_tokens) == (54, 36)
    assert report.output_tokens_per_s == pytest.approx(36 / report.wall_s)
    bodies = [json.loads(body) for head, body in server.requests if head.startswith("POST")]
    assert len(bodies) == 11
    assert {body["model"] for body in bodies} == {"listed"}
    assert len({tuple(body["prompt"]) for body in bodies}) == 11
    assert "open loop" in report.label if rate else "3 in flight" in report.label


def test_prompts_follow_the_seed() -> None:
    first = bench.prompts_of(BenchConfig(seed=1, num_prompts=4, warmup=0))
    assert first == bench.prompts_of(BenchConfig(seed=1, num_prompts=4, warmup=0))
    assert first != bench.prompts_of(BenchConfig(seed=2, num_prompts=4, warmup=0))
    assert {len(prompt) for prompt in first} == {128}
    assert min(map(min, first)) >= 10
    assert max(map(max, first)) < 1000


def test_percentiles_equal_the_standard_librarys() -> None:
    values = [5.0, 1.0, 9.5, 3.25, 7.0, 2.0, 8.0]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for share in (1, 50, 90, 99):
        assert bench_report.percentile(values, share) == pytest.approx(cuts[share - 1])
    assert bench_report.percentile([4.0], 99) == 4.0
    assert math.isnan(bench_report.percentile([], 50))


def test_a_reports_numbers() -> None:
    good = Sample(10.0, 12.0, [10.5, 11.0, 12.0], prompt_tokens=4, completion_tokens=3)
    slow = Sample(10.0, 14.0, [11.0, 12.0, 14.0], prompt_tokens=4, completion_tokens=7)
    failed = Sample(10.0, 11.0, error="status 500")
    report = bench_report.summarise("label", [good, slow, failed], cpu_s=1.0)
    assert (report.requests, report.failures, report.errors) == (3, 1, {"status 500": 1})
    assert (report.wall_s, report.prompt_tokens, report.completion_tokens) == (4.0, 8, 10)
    assert report.output_tokens_per_s == pytest.approx(2.5)
    assert report.ttft_ms.p50 == pytest.approx(750)
    assert report.inter_token_ms.mean == pytest.approx(1e3 * (0.5 + 1 + 1 + 2) / 4)
    assert report.tpot_ms.mean == pytest.approx(1e3 * (1.5 / 2 + 3 / 6) / 2)
    assert report.client_cpu_share == pytest.approx(0.25)
    text = bench_report.table(report)
    assert "3 requests, 1 failed" in text
    assert "1 x status 500" in text


@pytest.mark.parametrize(
    ("url", "host", "port", "base"),
    [
        ("http://h:81", "h", 81, "/v1"),
        ("h:81/v1", "h", 81, "/v1"),
        ("https://h/openai", "h", 443, "/openai/v1"),
    ],
)
def test_endpoints(url: str, host: str, port: int, base: str) -> None:
    endpoint = Endpoint(url, "")
    assert (endpoint.host, endpoint.port, endpoint.base) == (host, port, base)
