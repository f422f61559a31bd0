"""The terminal client against a scripted server."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest

from penstock.local import chat
from penstock.local.chat import ChatConfig

LISTED = [{"id": "embedder", "tasks": ["embed"]}, {"id": "first", "tasks": ["generate"]}, {"id": "second"}]
MODELS = json.dumps({"object": "list", "data": LISTED}).encode()


def _events(*texts: str, done: bool = True) -> list[bytes]:
    frames = [{"choices": [{"index": 0, "delta": {"role": "assistant"}}]}]
    frames += [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    lines = [f"data: {json.dumps(frame)}\n\n".encode() for frame in frames]
    return [b": keep-alive\n\n", *lines, *([b"data: [DONE]\n\n"] if done else [])]


def _run(url: str, text: str, **options: Any) -> tuple[int, str]:
    sink = io.StringIO()
    code = chat.run(ChatConfig(url=url, **options), io.StringIO(text), sink)
    return code, sink.getvalue()


def test_a_conversation_remembers_its_turns(
    scripted_server: Callable[..., Any], http_response: Callable[..., bytes], http_chunked: Callable[..., Any]
) -> None:
    def script(method: str, path: str, body: bytes) -> list[bytes]:
        if path == "/v1/models":
            return [http_response(200, MODELS)]
        count = len(json.loads(body)["messages"])
        return http_chunked(_events("an", f"swer {count}"))

    server = scripted_server(script)
    code, shown = _run(
        server.url, "one\ntwo\n/reset\nthree\n", system="be kind", api_key="sk-1", max_tokens=7
    )
    assert code == 0
    assert shown.splitlines() == ["answer 2", "answer 4", "The conversation starts over.", "answer 2"]
    bodies = [json.loads(body) for _, body in server.requests[1:]]
    assert bodies[1] == {
        "model": "first",
        "stream": True,
        "max_tokens": 7,
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "answer 2"},
            {"role": "user", "content": "two"},
        ],
    }
    assert all("authorization: bearer sk-1" in head.lower() for head, _ in server.requests)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("refused", "no such model"),
        ("html", "status 502"),
        ("error frame", "the engine was lost"),
        ("no end", "broke off"),
        ("cut", "broke"),
        ("not json", "not JSON"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(
    case: str,
    words: str,
    scripted_server: Callable[..., Any],
    http_response: Callable[..., bytes],
    http_chunked: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = {
        "refused": [http_response(404, json.dumps({"error": {"message": "no such model"}}).encode())],
        "html": [http_response(502, b"<html>")],
        "error frame": http_chunked(
            [*_events("par", done=False), b'data: {"error": {"message": "the engine was lost"}}\n\n']
        ),
        "no end": http_chunked(_events("par", done=False)),
        "cut": http_chunked(_events("par", done=False), end=False),
        "not json": http_chunked([b"data: nonsense\n\n"]),
    }
    server = scripted_server(lambda method, path, body: answers[case])
    code, _ = _run(server.url, "hello\n", model="m")
    error = capsys.readouterr().err
    assert code == 1
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_question_that_got_no_answer_is_taken_back(
    scripted_server: Callable[..., Any], http_response: Callable[..., bytes], http_chunked: Callable[..., Any]
) -> None:
    replies = iter([[http_response(429, b'{"error": {"message": "busy"}}')], http_chunked(_events("yes"))])
    server = scripted_server(lambda method, path, body: next(replies))
    code, shown = _run(server.url, "first\nsecond\n", model="m")
    assert (code, shown) == (1, "yes\n")
    assert json.loads(server.requests[1][1])["messages"] == [{"role": "user", "content": "second"}]


class _Interrupting(io.StringIO):
    """Ctrl-C while the second piece is written."""

    def write(self, text: str) -> int:
        if text == "two":
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    scripted_server: Callable[..., Any], http_chunked: Callable[..., Any]
) -> None:
    server = scripted_server(lambda method, path, body: http_chunked(_events("one", "two", "three")))
    sink = _Interrupting()
    code = chat.run(ChatConfig(url=server.url, model="m"), io.StringIO("a\nb\n"), sink)
    assert code == 0
    assert sink.getvalue() == "one [stopped]\none [stopped]\n"
    assert json.loads(server.requests[1][1])["messages"][1] == {"role": "assistant", "content": "onetwo"}


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("h:1", "http://h:1/v1"),
        ("https://h/openai/v1", "https://h/openai/v1"),
    ],
)
def test_addresses(given: str, base: str) -> None:
    assert chat.base_url(given) == base
