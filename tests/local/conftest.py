"""A scripted HTTP server: it answers with the bytes a test gives it, piece by piece."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

Script = Callable[[str, str, bytes], list[bytes]]


class ScriptedServer:
    """Calls script(method, path, body) for each request and sends the pieces it returns, one write each; then
    it closes the connection. `requests` keeps (head, body)."""

    def __init__(self, script: Script) -> None:
        self.requests: list[tuple[str, bytes]] = []
        self._script = script
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(60)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                lines = []
                while (line := reader.readline()) not in (b"\r\n", b""):
                    lines.append(line.decode().strip())
                if not lines:
                    return
                sizes = [
                    int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")
                ]
                body = reader.read(sizes[0]) if sizes else b""
                self.requests.append(("\n".join(lines), body))
                method, path, _ = lines[0].split(" ")
                try:
                    for piece in self._script(method, path, body):
                        connection.sendall(piece)
                    connection.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # the client has all it wanted
                return


@pytest.fixture
def scripted_server() -> Iterator[Callable[[Script], ScriptedServer]]:
    made: list[ScriptedServer] = []

    def make(script: Script) -> ScriptedServer:
        made.append(ScriptedServer(script))
        return made[-1]

    yield make
    for server in made:
        server.close()


def response(status: int, body: bytes, kind: str = "application/json") -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}"]
    return _head(lines) + body


def _head(lines: list[str]) -> bytes:
    return "\r\n".join([*lines, "connection: close", "", ""]).encode()


def chunked(pieces: list[bytes], end: bool = True) -> list[bytes]:
    """An event stream in chunks of HTTP/1.1, without its end when told so."""
    head = _head(["HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked"])
    chunks = [f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces]
    return [head, *chunks, *([b"0\r\n\r\n"] if end else [])]


@pytest.fixture
def http_response() -> Callable[..., bytes]:
    return response


@pytest.fixture
def http_chunked() -> Callable[..., list[bytes]]:
    return chunked
