"""The tokenizer service's Prometheus metrics, in a registry of their own. Knows no RPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from penstock.protos.errors import ApiError

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class TokenizerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "penstock:tokenizer_requests",
            "Calls by method and answer.",
            ["method", "code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "penstock:tokenizer_request_seconds",
            "Time from a call's arrival to its answer.",
            ["method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._pending = Gauge(
            "penstock:tokenizer_requests_pending", "Calls that wait for their answer.", registry=self.registry
        )
        self._tokens = Counter(
            "penstock:tokenizer_tokens", "Token ids answered, by method.", ["method"], registry=self.registry
        )
        self._kills = Counter(
            "penstock:tokenizer_renderer_kills",
            "Renderer processes replaced, by cause.",
            ["cause"],
            registry=self.registry,
        )

    def watch_waiting(self, waiting: Callable[[], int]) -> None:
        """Shows the length of the line in front of the renderers."""
        gauge = Gauge(
            "penstock:tokenizer_renders_waiting", "Renders that wait for a process.", registry=self.registry
        )
        gauge.set_function(waiting)

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """Counts one call and how it ended."""
        start = time.monotonic()
        code = "ok"
        self._pending.inc()
        try:
            yield
        except ApiError as error:
            code = error.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = "client_disconnected"
            raise
        except BaseException:
            code = "internal_error"
            raise
        finally:
            self._pending.dec()
            self._requests.labels(method, code).inc()
            self._seconds.labels(method).observe(time.monotonic() - start)

    def tokens(self, method: str, count: int) -> None:
        self._tokens.labels(method).inc(count)

    def renderer_killed(self, cause: str) -> None:
        self._kills.labels(cause).inc()
