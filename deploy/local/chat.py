"""`penstock chat`: a conversation in the terminal with any server of the OpenAI API. Knows only that API."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import Field

from penstock.local.listing import generators
from penstock.protos.settings import Config

if TYPE_CHECKING:
    import httpx

HELP = "Ctrl-C stops an answer, Ctrl-D leaves, /reset starts over, /help shows this."
CONNECT_TIMEOUT_S = 5.0
# Between two pieces of an answer: longer than a server's keep-alive comments and a long prefill.
READ_TIMEOUT_S = 300.0


class ChatConfig(Config):
    """Settings of the terminal client."""

    url: str = Field("http://127.0.0.1:8000", description="the server, with or without /v1")
    model: str = Field("", description="model id; default: the first listed one that generates text")
    system: str = Field("", description="system message")
    api_key: str = Field(
        "",
        description="key of the server",
        json_schema_extra={"env": ["VLLM_API_KEY", "OPENAI_API_KEY"], "secret": True, "metavar": "KEY"},
    )
    max_tokens: int = Field(0, ge=0, description="longest answer in tokens, 0 for the server's limit")
    temperature: float | None = Field(None, ge=0, le=2, description="default: the model's")


class ServerError(Exception):
    """The server's refusal, or why it cannot be reached: one line for people."""


class Conversation:
    """The messages so far, and one answer at a time."""

    def __init__(self, client: httpx.Client, base: str, config: ChatConfig, model: str) -> None:
        self._client = client
        self._base = base
        self._config = config
        self.model = model
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._config.system}] if self._config.system else []

    def answer(self, text: str) -> Generator[str, None, None]:
        """The pieces of the answer. What has arrived is kept in the conversation, also when the caller closes
        the iterator early; a question that got no answer is taken back. Raises ServerError."""
        self.messages.append({"role": "user", "content": text})
        body: dict[str, Any] = {"model": self.model, "messages": self.messages, "stream": True}
        if self._config.max_tokens:
            body["max_tokens"] = self._config.max_tokens
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        pieces: list[str] = []
        try:
            for piece in self._stream(body):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        import httpx

        try:
            with self._client.stream("POST", f"{self._base}/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ServerError(_refusal(response))
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise ServerError(_unreachable(self._base, error)) from error


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """The text of an event stream. Raises ServerError for an error frame and for a stream without an end."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            frame = json.loads(data)
        except ValueError as error:
            raise ServerError("the server sent something that is not JSON") from error
        if "error" in frame:
            raise ServerError(str(frame["error"].get("message", "the server reported an error")))
        for choice in frame.get("choices", []):
            if text := choice.get("delta", {}).get("content"):
                yield text
    raise ServerError("the answer broke off: the connection was closed early")


def _refusal(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered with status {response.status_code}"
    return str(message)


def _unreachable(base: str, error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"no server answers at {base} (start one with `penstock serve`)"
    if isinstance(error, httpx.TimeoutException):
        return "the server did not answer in time"
    return "the connection to the server broke"


def base_url(url: str) -> str:
    url = url.rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    return url if url.endswith("/v1") else f"{url}/v1"


def run(config: ChatConfig, source: TextIO | None = None, sink: TextIO | None = None) -> int:
    """Reads turns from `source` (stdin) until its end. Returns 0, or 1 when a piped question failed or the
    server cannot be reached."""
    import httpx

    source, sink = source or sys.stdin, sink or sys.stdout
    base = base_url(config.url)
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with httpx.Client(headers=headers, timeout=timeout, trust_env=False) as client:
        try:
            model = config.model or _first_model(client, base)
        except ServerError as error:
            print(f"penstock chat: {error}", file=sys.stderr)
            return 1
        return _converse(Conversation(client, base, config, model), source, sink)


def _first_model(client: httpx.Client, base: str) -> str:
    import httpx

    try:
        response = client.get(f"{base}/models")
    except httpx.HTTPError as error:
        raise ServerError(_unreachable(base, error)) from error
    if response.status_code != 200:
        raise ServerError(_refusal(response))
    try:
        return generators(response.json())[0]
    except (ValueError, IndexError) as error:
        raise ServerError(f"{base} lists no model that generates text") from error


def _converse(conversation: Conversation, source: TextIO, sink: TextIO) -> int:
    interactive = source.isatty() and sink.isatty()
    if interactive:
        print(f"{conversation.model}. {HELP}", file=sink)
    code = 0
    while (line := _read(source, sink, interactive)) is not None:
        text = line.strip()
        if text == "/reset":
            conversation.reset()
            print("The conversation starts over.", file=sink)
        elif text == "/help":
            print(HELP, file=sink)
        elif text and not _say(conversation, text, sink):
            code = 1
    return 0 if interactive else code


def _read(source: TextIO, sink: TextIO, interactive: bool) -> str | None:
    """The next line; None at the end of the input."""
    if not interactive:
        return source.readline() or None
    try:
        if source is sys.stdin:
            import readline  # noqa: F401  (line editing and history for input())

            return input("> ")
        print("> ", end="", file=sink, flush=True)
        return source.readline() or None
    except EOFError:
        print(file=sink)
        return None
    except KeyboardInterrupt:
        print(file=sink)
        return ""


def _say(conversation: Conversation, text: str, sink: TextIO) -> bool:
    """Writes one answer as it comes. False when it failed."""
    answer = conversation.answer(text)
    try:
        for piece in answer:
            sink.write(piece)
            sink.flush()
    except KeyboardInterrupt:
        # A second Ctrl-C while the connection closes must not end the program.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            answer.close()
        finally:
            signal.signal(signal.SIGINT, previous)
        print(" [stopped]", file=sink, flush=True)
        return True
    except ServerError as error:
        sink.flush()
        print(f"penstock chat: {error}", file=sys.stderr)
        return False
    print(file=sink, flush=True)
    return True
