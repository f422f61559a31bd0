"""Batch files: what is refused before anything runs, how a run is continued, what a server gets and gives."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.local import batch, batch_client
from penstock.local.batch import BatchConfig
from penstock.local.batch_file import BatchError, Results, check, read_items
from penstock.local.cli import main


def _line(custom_id: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


def _write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _results(path: Path) -> dict[str, dict[str, Any]]:
    return {found["custom_id"]: found for found in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"url": "/v1/completions", "body": {}}', "custom_id"),
        ('{"custom_id": 7, "url": "/v1/completions", "body": {}}', "custom_id"),
        ('{"custom_id": "b", "method": "GET", "url": "/v1/models", "body": {}}', "method"),
        ('{"custom_id": "b", "url": "http://elsewhere/v1", "body": {}}', "url"),
        ('{"custom_id": "b", "url": "/v1 HTTP/1.1", "body": {}}', "url"),
        ('{"custom_id": "b", "url": "/v1/completions", "body": []}', "body"),
        ('{"custom_id": "b", "url": "/v1/\\u0001", "body": {}}', "url"),
        ('{"custom_id": "b", "url": "/v1/\\ud83d", "body": {}}', "url"),
        ('{"custom_id": "b", "url": "/%s", "body": {}}' % ("x" * 70_000), "url"),
        ('{"custom_id": "\\ud83d", "url": "/v1/completions", "body": {}}', "half of a character"),
        (_line("b", prompt="\ud83d"), "half of a character"),
        (_line("b", temperature=float("nan")), "not valid JSON"),
        (_line("b", temperature=float("inf")), "not valid JSON"),
        (_line("b", stream=True), "stream"),
        (_line("a"), "is that of line 1"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_runs(
    line: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = _write(tmp_path / "in", _line("a"), "", line), tmp_path / "out"
    with pytest.raises(BatchError, match=complaint) as raised:
        check(source)
    assert "line 3" in str(raised.value)
    assert main(["batch", "-i", str(source), "-o", str(target), "--url", "127.0.0.1:1"]) == 2
    assert complaint in capsys.readouterr().err
    assert not target.exists()


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    source = _write(tmp_path / "in", _line("a"))
    words = ["batch", "-i", str(source)]
    assert main(words) == 2
    assert main([*words, "-o", str(source)]) == 2
    assert main([*words, "-o", str(tmp_path / "out"), "some-model", "--url", "127.0.0.1:1"]) == 2
    assert main([*words, "-o", str(tmp_path / "out"), "--url", "ftp://x"]) == 2
    assert main(["batch", "-i", str(tmp_path / "absent"), "-o", str(tmp_path / "out")]) == 2
    assert main([*words, "-o", str(tmp_path / "no" / "folder")]) == 2


def test_a_result_file_cut_anywhere_is_continued(tmp_path: Path) -> None:
    source = _write(tmp_path / "in", *[_line(f"r{i}") for i in range(3)])
    whole = tmp_path / "whole"
    results = Results(whole)
    for item in read_items(source):
        results.add(item, 200, "x", {"text": "ü\n", "half": "\ud83d"}, None)
    results.close()
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        part = tmp_path / "part"
        part.write_bytes(data[:cut])
        continued = Results(part)
        assert continued.done == {f"r{i}" for i, end in enumerate(ends) if end <= cut}
        for item in read_items(source):
            if item.custom_id not in continued.done:
                continued.add(item, 200, "x", {"text": "ü\n", "half": "\ud83d"}, None)
        continued.close()
        assert part.read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "part", "whole"]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    target = _write(tmp_path / "out", "dear diary")
    with pytest.raises(BatchError, match="something else"):
        Results(target)
    assert target.read_text() == "dear diary\n"


def test_failures_can_be_asked_for_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    results = Results(target)
    for number, item in enumerate(read_items(_write(tmp_path / "in", *[_line(c) for c in "abc"]))):
        results.add(item, [200, 0, 400][number], "x", None, None)
    results.close()
    unchanged = Results(target)
    unchanged.close()
    assert unchanged.done == {"a", "b", "c"}
    again = Results(target, retry_failed=True)
    again.close()
    assert again.done == {"a"}
    assert list(_results(target)) == ["a"]


def test_a_server_that_is_full_is_asked_again_and_errors_are_kept(
    scripted_server: Callable[..., Any],
    http_response: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_client, "_FIRST_WAIT_S", 0.0)
    full = {"a"}

    def script(method: str, path: str, body: bytes) -> list[bytes]:
        name = json.loads(body)["prompt"]
        if name in full:
            full.remove(name)
            return [http_response(429, b"{}")]
        if name == "b":
            return [http_response(400, b'{"error": {"message": "no"}}')]
        return [http_response(200, json.dumps({"usage": {"prompt_tokens": 2}}).encode())]

    server = scripted_server(script)
    source = _write(tmp_path / "in", *[_line(name, prompt=name) for name in "abc"])
    config = BatchConfig(
        input_file=str(source), output_file=str(tmp_path / "out"), url=server.url + "/v1", api_key="k"
    )
    assert batch.run(config) == 1
    found = _results(tmp_path / "out")
    assert {name: line["response"]["status_code"] for name, line in found.items()} == {
        "a": 200,
        "b": 400,
        "c": 200,
    }
    assert found["b"]["response"]["body"]["error"]["message"] == "no"
    assert all("authorization: Bearer k" in head for head, _ in server.requests)
    assert len(server.requests) == 4
    assert batch.run(config) == 0
    assert len(server.requests) == 4


def test_a_server_that_goes_away_is_an_error_of_each_request(
    scripted_server: Callable[..., Any],
    http_response: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_client, "_MAX_RETRIES", 1)
    monkeypatch.setattr(batch_client, "_FIRST_WAIT_S", 0.0)
    post = httpx.AsyncClient.post

    async def until_c(client: httpx.AsyncClient, url: str, content: bytes) -> httpx.Response:
        if json.loads(content)["prompt"] == "c":
            raise httpx.ConnectError("away")
        return await post(client, url, content=content)

    monkeypatch.setattr(httpx.AsyncClient, "post", until_c)
    server = scripted_server(lambda method, path, body: [http_response(200, b"{}")])
    source = _write(tmp_path / "in", *[_line(name, prompt=name) for name in "abc"])
    words = ["batch", "-i", str(source), "-o", str(tmp_path / "out"), "--url", server.url]
    assert main([*words, "--concurrency", "1"]) == 1
    found = _results(tmp_path / "out")
    assert sorted(found) == ["a", "b", "c"]
    assert found["c"]["response"] is None
    assert found["c"]["error"] == {"code": "no_answer", "message": "away"}


def test_without_a_server_nothing_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write(tmp_path / "in", _line("a"), _line("b"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        words = ["batch", "-i", str(source), "-o", str(tmp_path / "out"), "--url", url]
        assert main(words) == 1
    assert f"no server at {url}" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == ""


def test_the_bundled_model_runs_a_file(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    chat = {"custom_id": "t", "url": "/v1/chat/completions", "body": {"messages": talk, "temperature": 0}}
    lines = [_line(f"p{i}", prompt="Hello", max_tokens=i + 1) for i in range(6)]
    source = _write(tmp_path / "in", json.dumps(chat), *lines)
    assert main(["batch", "-i", str(source), "-o", str(tmp_path / "out"), "--concurrency", "3"]) == 0
    found = _results(tmp_path / "out")
    assert "Paris" in found["t"]["response"]["body"]["choices"][0]["message"]["content"]
    counts = [found[f"p{i}"]["response"]["body"]["usage"]["completion_tokens"] for i in range(6)]
    assert counts == [1, 2, 3, 4, 5, 6]
