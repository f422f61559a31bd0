"""Sends the requests of a batch file and writes down the answers. Knows HTTP and no endpoint's meaning."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from penstock.local.batch_file import BatchError, Item, Results, read_items

# A server that is full, or restarts: the request is sent again. Anything else is an answer.
_RETRIED = (429, 502, 503)
_MAX_RETRIES = 20
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Tally:
    """outcomes: number of requests by status, 0: no answer. tokens: prompt and completion. reached: there was
    a connection to the server."""

    outcomes: Counter[int] = field(default_factory=Counter)
    reached: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, status: int, body: Any) -> None:
        self.outcomes[status] += 1
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            self.prompt_tokens += usage.get("prompt_tokens") or 0
            self.completion_tokens += usage.get("completion_tokens") or 0

    @property
    def failed(self) -> int:
        return sum(count for status, count in self.outcomes.items() if status != 200)


async def run_all(
    source: Path, results: Results, total: int, url: str, api_key: str, concurrency: int
) -> Tally:
    """Every request that has no result yet, `concurrency` at a time, each written as it comes.

    url: the server's, without /v1. Raises BatchError when a result cannot be written, and when there is no
    server at all, before any request has a result; one that goes away later is waited for."""
    tally = Tally()
    items = (item for item in read_items(source) if item.custom_id not in results.done)
    bar = tqdm(total=total, initial=len(results.done), desc="requests", unit="", dynamic_ncols=True)
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    try:
        async with (
            httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(concurrency, total)):
                group.create_task(_work(client, items, results, tally, bar))
    except* httpx.TransportError as errors:
        raise BatchError(f"no server at {url}: {errors.exceptions[0]}") from errors
    except* OSError as errors:
        raise BatchError(f"cannot write the results: {errors.exceptions[0]}") from errors
    finally:
        bar.close()
    return tally


async def _work(
    client: httpx.AsyncClient, items: Iterator[Item], results: Results, tally: Tally, bar: tqdm[Any]
) -> None:
    for item in items:
        status, request_id, body, error = await _ask(client, item, tally)
        results.add(item, status, request_id, body, error)
        tally.add(status, body)
        bar.update()


async def _ask(
    client: httpx.AsyncClient, item: Item, tally: Tally
) -> tuple[int, str, Any, dict[str, str] | None]:
    """(status, request id, body, error) of one request; status 0 when no answer came. Raises TransportError
    when the first thing that is heard of the server is that it cannot be reached."""
    wait = _FIRST_WAIT_S
    for attempt in range(_MAX_RETRIES + 1):
        try:
            answer = await client.post(item.path, content=item.body)
        except httpx.HTTPError as error:
            if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                tally.reached = True
            elif not tally.reached:
                raise
            if attempt == _MAX_RETRIES:
                message = str(error) or type(error).__name__
                return 0, "", None, {"code": "no_answer", "message": message}
        else:
            tally.reached = True
            if answer.status_code not in _RETRIED or attempt == _MAX_RETRIES:
                return answer.status_code, answer.headers.get("x-request-id", ""), _body(answer), None
            wait = _retry_after(answer) or wait
        await asyncio.sleep(min(wait, _LONGEST_WAIT_S))
        wait *= 2
    raise RuntimeError("unreachable: the last attempt returns")


def _body(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return answer.text[:10_000]


def _retry_after(answer: httpx.Response) -> float:
    try:
        return max(0.0, float(answer.headers.get("retry-after", "")))
    except ValueError:
        return 0.0
