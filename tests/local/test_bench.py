"""`penstock bench serve`: the load client against a scripted server, and its arithmetic."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import statistics
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.local import bench, bench_drive, bench_report, cli
from penstock.local.bench import BenchConfig
from penstock.local.bench_client import Client, Endpoint, Sample
from penstock.local.bench_drive import Load, LoadFailed, Outcome
from penstock.protos.settings import ConfigError

MODELS = json.dumps({"data": [{"id": "no", "tasks": ["embed", "score"]}, {"id": "listed"}]}).encode()


def in_process(load: Load) -> Outcome:
    return asyncio.run(bench_drive.drive(load))


def _stream(frames: list[Any]) -> bytes:
    texts = [frame if isinstance(frame, str) else json.dumps(frame) for frame in frames]
    return b"".join(f"data: {text}\n\n".encode() for text in [*texts, "[DONE]"])


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def _events(count: int, prompt: int, tokens: int | None = None) -> bytes:
    """`count` chunks that carry `tokens` tokens by usage."""
    frames = [{"choices": [{"index": 0, "text": f"t{i}"}], "usage": None} for i in range(count)]
    return _stream([*frames, _usage(prompt, count if tokens is None else tokens)])


async def _ask(url: str, kind: str = "completions", key: str = "") -> Sample:
    endpoint = Endpoint(url, key, kind)
    client = Client(endpoint)
    try:
        return await client.complete(endpoint.request("m", "words" if kind == "chat" else [1, 2, 3], 5))
    finally:
        client.close()


# ------------------------------------------------------------------------------------------- the client
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_events_are_read_wherever_the_stream_is_split(
    size: int, scripted_server: Callable[..., Any], http_chunked: Callable[..., Any]
) -> None:
    data = _events(5, 3)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    server = scripted_server(lambda method, path, body: http_chunked(pieces))
    sample = await _ask(server.url, key="sk-1")
    assert sample.error == ""
    assert (sample.prompt_tokens, sample.completion_tokens, len(sample.arrivals)) == (3, 5, 5)
    assert sample.started <= sample.arrivals[0] <= sample.arrivals[-1] <= sample.ended
    head, body = server.requests[0]
    assert head.startswith("POST /v1/completions HTTP/1.1")
    assert "Authorization: Bearer sk-1" in head
    asked = json.loads(body)
    assert (asked["prompt"], asked["max_tokens"], asked["ignore_eos"]) == ([1, 2, 3], 5, True)


async def test_tokens_are_counted_by_usage_never_by_chunks(
    scripted_server: Callable[..., Any], http_chunked: Callable[..., Any]
) -> None:
    server = scripted_server(lambda method, path, body: http_chunked([_events(2, 3, tokens=9)]))
    sample = await _ask(server.url)
    assert (sample.completion_tokens, len(sample.arrivals)) == (9, 2)
    report = bench_report.summarise("x", [sample], 0.0)
    assert (report.completion_tokens, report.chunk_tokens) == (9, 4.5)


def _chat(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None}


@pytest.mark.parametrize("spaces", [True, False])
async def test_a_chat_answer_begins_with_its_first_text(
    spaces: bool, scripted_server: Callable[..., Any], http_chunked: Callable[..., Any]
) -> None:
    frames = [
        _chat({"role": "assistant", "content": ""}),
        _chat({"content": "a"}),
        _chat({"reasoning_content": 'say "usage":{'}),
        _chat({"content": ""}),  # a token whose bytes wait for the next one
        _chat({"content": 'x "error" \n "text": "y"'}),
        _chat({"content": ""}, "length"),
        _chat({}, "length"),
        _usage(7, 4),
    ]
    separators = None if spaces else (",", ":")
    data = _stream([json.dumps(frame, separators=separators) for frame in frames])
    server = scripted_server(lambda method, path, body: http_chunked([data]))
    sample = await _ask(server.url, "chat")
    assert sample.error == ""
    assert (len(sample.arrivals), sample.completion_tokens) == (4, 4)
    assert server.requests[0][0].startswith("POST /v1/chat/completions")
    assert json.loads(server.requests[0][1])["messages"] == [{"role": "user", "content": "words"}]


async def test_an_answer_without_text_still_has_a_first_token(
    scripted_server: Callable[..., Any], http_chunked: Callable[..., Any]
) -> None:
    """One special token: the only chunk is the one that ends it."""
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": None}
    data = _stream([end, _usage(3, 1)])
    server = scripted_server(lambda method, path, body: http_chunked([data]))
    sample = await _ask(server.url)
    assert (sample.error, len(sample.arrivals), sample.completion_tokens) == ("", 1, 1)


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
        "an event that is not the API's": http_chunked([b'data: {"usage":{"prompt_tokens":1}}\n\n']),
    }
    for words, pieces in cases.items():
        server = scripted_server(lambda method, path, body, pieces=pieces: pieces)
        assert words in (await _ask(server.url)).error
    assert (await _ask("http://127.0.0.1:9")).error


async def test_a_connection_is_kept_and_one_closed_meanwhile_is_made_again() -> None:
    """The server answers two requests on each connection, then closes it while nobody asks."""
    answer = _events(1, 3)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(answer)}\r\n\r\n"
    served: list[int] = []
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(served)
        served.append(0)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while served[number] < 2:
                lines = await reader.readuntil(b"\r\n\r\n")
                size = int(lines.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(size)
                served[number] += 1
                writer.write(head.encode() + answer)
            await writer.drain()
        writer.close()
        closed.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "")
    client = Client(endpoint)
    async with server:
        for index in range(5):
            sample = await client.complete(endpoint.request("m", [1], 1))
            assert sample.error == ""
            if index % 2:
                await closed.wait()
                closed.clear()
        client.close()
        await closed.wait()
    assert served == [2, 2, 1]


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


# ------------------------------------------------------------------------------------------------ loads
def test_prompts_follow_the_seed_and_share_only_the_prefix() -> None:
    load = Load("u", num_prompts=3, warmup=1, seed=1, input_len=20, shared_prefix=12)
    prompts = bench_drive.prompts_of(load)
    assert prompts == bench_drive.prompts_of(load)
    assert prompts != bench_drive.prompts_of(Load("u", num_prompts=3, warmup=1, seed=2, input_len=20))
    assert [len(prompt) for prompt in prompts] == [32] * 4
    assert len({tuple(prompt[:12]) for prompt in prompts}) == 1
    assert len({tuple(prompt[12:]) for prompt in prompts}) == 4
    ids = [id for prompt in prompts for id in prompt]
    assert all(isinstance(id, int) and 10 <= id < 1000 for id in ids)
    words = bench_drive.prompts_of(
        Load("u", kind="chat", num_prompts=2, warmup=0, input_len=5, shared_prefix=3)
    )
    assert [len(str(text).split()) for text in words] == [8, 8]


def test_arrivals_are_a_poisson_process() -> None:
    times = bench_drive.arrival_times(50.0, 4000, seed=3)
    assert times == bench_drive.arrival_times(50.0, 4000, seed=3)
    assert times != bench_drive.arrival_times(50.0, 4000, seed=4)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0.0
    # An exponential's mean equals its deviation; the share above the mean is 1/e.
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.1)


def test_levels_have_prompts_of_their_own() -> None:
    loads = bench.loads_of(BenchConfig(concurrency=(1, 8, 32), seed=5))
    assert [(load.concurrency, load.num_prompts) for load in loads] == [(1, 8), (8, 32), (32, 128)]
    assert len({load.seed for load in loads}) == 3
    loads = bench.loads_of(BenchConfig(rate=(0.5, 10)))
    assert [(load.rate, load.num_prompts) for load in loads] == [(0.5, 32), (10.0, 200)]
    assert {load.num_prompts for load in bench.loads_of(BenchConfig(num_prompts=7, rate=(1, 2)))} == {7}


def _scripted(scripted_server: Any, http_response: Any, http_chunked: Any) -> Any:
    def script(method: str, path: str, body: bytes) -> list[bytes]:
        if path == "/v1/models":
            return [http_response(200, MODELS)]
        asked = json.loads(body)
        if asked["max_tokens"] == 13:
            return [http_response(500, b"{}")]
        return http_chunked([_events(4, len(asked.get("prompt", ())))])

    return scripted_server(script)


@pytest.mark.parametrize("rate", [(), (200.0,)])
def test_a_whole_measurement(
    rate: tuple[float, ...], scripted_server: Any, http_response: Any, http_chunked: Any
) -> None:
    server = _scripted(scripted_server, http_response, http_chunked)
    config = BenchConfig(
        url=server.url, num_prompts=9, concurrency=(3,), rate=rate, input_len=6, output_len=4, warmup=2
    )
    [report] = bench.measure(config, drive=in_process)
    assert (report.requests, report.failures) == (9, 0)
    assert (report.prompt_tokens, report.completion_tokens) == (54, 36)
    assert report.output_tokens_per_s == pytest.approx(36 / report.wall_s)
    bodies = [json.loads(body) for head, body in server.requests if head.startswith("POST")]
    assert len(bodies) == 11
    assert {body["model"] for body in bodies} == {"listed"}
    assert len({tuple(body["prompt"]) for body in bodies}) == 11
    assert "open loop" in report.label if rate else "3 in flight" in report.label
    assert (report.late_ms is not None) == bool(rate)


def test_the_command_from_client_process_to_files(
    scripted_server: Any, http_response: Any, http_chunked: Any, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    server = _scripted(scripted_server, http_response, http_chunked)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    core = str(min(os.sched_getaffinity(0)))
    words = ["--url", server.url, "--concurrency", "1,3", "--num-prompts", "5", "--output-len", "4"]
    words += ["--goodput", "ttft:60000,e2e:60000", "--client-cores", core, "--api-key", "sk-secret"]
    code = cli.main(["bench", "serve", *words, "--output", str(out), "--plot", str(picture)])
    assert code == 0
    text = out.read_text()
    assert "sk-secret" not in text
    found = json.loads(text)
    assert found["schema"] == 1
    assert found["settings"]["concurrency"] == [1, 3]
    assert [level["level"] for level in found["levels"]] == [1, 3]
    for level in found["levels"]:
        assert (level["requests"], level["failures"], level["completion_tokens"]) == (5, 0, 20)
        assert level["goodput"]["share"] == 1.0
        assert set(level["ttft_ms"]) == set(level["e2e_ms"]) == {"mean", "p50", "p90", "p99"}
        assert level["settings"]["model"] == "listed"
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    assert min(width, height) > 300
    said = capsys.readouterr().out
    assert "3 in flight" in said
    assert "goodput" in said


def test_failures_are_counted_and_end_the_command_with_1(
    scripted_server: Any, http_response: Any, http_chunked: Any, tmp_path: Path, capsys: Any
) -> None:
    server = _scripted(scripted_server, http_response, http_chunked)
    out = tmp_path / "out.json"
    words = ["--url", server.url, "--num-prompts", "3", "--output-len", "13", "--json", str(out)]
    assert cli.main(["bench", "serve", *words]) == 1
    [level] = json.loads(out.read_text())["levels"]
    assert (level["failures"], level["errors"]) == (3, {"status 500": 3})
    assert level["ttft_ms"]["p50"] is None
    assert "3 x status 500" in capsys.readouterr().out


def test_a_client_process_that_finds_no_server_says_so() -> None:
    with pytest.raises(LoadFailed, match="refused"):
        bench_drive.run_process(Load("http://127.0.0.1:9"))


@pytest.mark.parametrize(
    "words",
    [
        ["--goodput", "ttft:fast"],
        ["--goodput", "itl:5"],
        ["--goodput", "e2e:-5"],
        ["--concurrency", "0"],
        ["--rate", "-1"],
        ["--client-cores", "100000"],
        ["--output", "/nowhere/at/all/out.json"],
    ],
)
def test_bad_options_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve", *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.bench_plot, "available", lambda: False)
    with pytest.raises(ConfigError, match=r"penstock\[bench\]"):
        bench.run(BenchConfig(url="http://127.0.0.1:9", plot="x.png"))


# ------------------------------------------------------------------------------------------- arithmetic
def test_percentiles_equal_the_standard_librarys() -> None:
    values = [5.0, 1.0, 9.5, 3.25, 7.0, 2.0, 8.0]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for share in (1, 50, 90, 99):
        assert bench_report.percentile(values, share) == pytest.approx(cuts[share - 1])
    assert bench_report.percentile([4.0], 99) == 4.0
    assert math.isnan(bench_report.percentile([], 50))


GOOD = Sample(10.0, 12.0, [10.5, 11.0, 12.0], prompt_tokens=4, completion_tokens=3)
SLOW = Sample(10.0, 14.0, [11.0, 12.0, 14.0], prompt_tokens=4, completion_tokens=7)
FAILED = Sample(10.0, 11.0, error="status 500")


def test_a_reports_numbers() -> None:
    report = bench_report.summarise("label", [GOOD, SLOW, FAILED], cpu_s=1.0)
    assert (report.requests, report.failures, report.errors) == (3, 1, {"status 500": 1})
    assert (report.wall_s, report.prompt_tokens, report.completion_tokens) == (4.0, 8, 10)
    assert report.output_tokens_per_s == pytest.approx(2.5)
    assert report.ttft_ms.p50 == pytest.approx(750)
    assert report.inter_token_ms.mean == pytest.approx(1e3 * (0.5 + 1 + 1 + 2) / 4)
    assert report.tpot_ms.mean == pytest.approx(1e3 * (1.5 / 2 + 3 / 6) / 2)
    assert report.client_cpu_share == pytest.approx(0.25)
    assert report.client_us_per_chunk == pytest.approx(1e6 / 6)
    text = bench_report.table(report)
    assert "3 requests, 1 failed" in text
    assert "1 x status 500" in text
    assert "saturated" not in text


@pytest.mark.parametrize(
    ("goals", "met"),
    [("ttft:600", 1), ("ttft:1000", 2), ("ttft:1000,tpot:600", 1), ("e2e:4000", 2), ("tpot:500,e2e:3999", 0)],
)
def test_goodput_counts_what_meets_every_goal(goals: str, met: int) -> None:
    found = bench_report.summarise("x", [GOOD, SLOW, FAILED], 0.0, goals=bench_report.goals_of(goals)).goodput
    assert found is not None
    assert (found.requests, found.share, found.requests_per_s) == (met, pytest.approx(met / 3), met / 4)


def test_a_saturated_client_is_said() -> None:
    assert "saturated" in bench_report.table(bench_report.summarise("x", [GOOD, SLOW], cpu_s=3.9))
