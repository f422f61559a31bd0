"""Requests generated from /openapi.json: none is answered with a 5xx."""

from __future__ import annotations

import re
from collections.abc import Callable

from penstock.local.spawn import Spawned


def test_no_generated_request_is_a_server_error(server: Spawned, run_client: Callable[..., str]) -> None:
    printed = run_client(
        "st",
        "run",
        f"{server.url}/openapi.json",
        "--checks=not_a_server_error",
        "--phases=examples,coverage,fuzzing",
        "--max-examples=5",
        "--seed=1",
        "--request-timeout=60",
        timeout_s=300.0,
    )
    generated = re.search(r"(\d+) generated, (\d+) passed", printed)
    assert generated is not None, printed
    assert int(generated[1]) > 500
    assert generated[1] == generated[2]
