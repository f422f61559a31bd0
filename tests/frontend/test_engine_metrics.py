from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.frontend.engine_metrics import with_engine_metrics

OWN = b"# HELP a_total mine\n# TYPE a_total counter\na_total 1.0\n"


class _Source(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = (
            "# HELP a_total theirs\n# TYPE a_total counter\na_total 9.0\n"
            f'# HELP b engines\n# TYPE b gauge\nb{{engine="{self.server.server_port}"}} 2.0\n'
        ).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def sources() -> Iterator[list[str]]:
    servers = [HTTPServer(("127.0.0.1", 0), _Source) for _ in range(2)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    yield [f"127.0.0.1:{server.server_port}" for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


async def test_families_of_engines_come_once_and_never_over_our_own(sources: list[str]) -> None:
    text = (await with_engine_metrics(OWN, sources)).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE b gauge") == 1
    assert len(families["b"].samples) == 2
    assert [sample.value for sample in families["a"].samples] == [1.0]


async def test_an_engine_that_is_down_is_left_out(sources: list[str]) -> None:
    text = (await with_engine_metrics(OWN, ["127.0.0.1:9", sources[0]])).decode()
    assert text.startswith(OWN.decode())
    assert "b{engine=" in text


async def test_no_source_changes_nothing() -> None:
    assert await with_engine_metrics(OWN, ()) == OWN
