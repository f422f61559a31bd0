"""Whether a request may join the queue now, and when to come back if not. Knows no fields of requests."""

from __future__ import annotations

from penstock.engine_service.client import EngineClient
from penstock.engine_service.core_keeper import State
from penstock.protos.errors import ApiError

MIN_RETRY_S = 1.0
MAX_RETRY_S = 30.0


class Admission:
    """The door of the engine. Once `draining` is set nobody comes in any more."""

    def __init__(self, client: EngineClient, max_requests: int, max_tokens: int) -> None:
        self._client = client
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self.draining = False

    def check_open(self) -> None:
        """Raises ApiError unless the engine is there and takes requests at all."""
        if self.draining:
            raise self._refusal("shutting_down", "The engine is shutting down.")
        if self._client.state is State.LOADING:
            raise self._refusal("engine_loading", "The engine is loading the model.")
        if self._client.state is State.DOWN or self._client.ready is None:
            raise self._refusal("engine_unavailable", "The engine is not available.")

    def check_queue(self, prompt_tokens: int) -> None:
        """Raises ApiError when the queue has no room for one more request with so many prompt tokens."""
        queue = self._client.queue()
        if queue.has_slot:
            return
        if queue.requests >= self._max_requests:
            raise self._refusal("queue_full", f"{queue.requests} requests are waiting already.")
        # One long prompt may always wait alone, or it could never be served.
        if queue.tokens and queue.tokens + prompt_tokens > self._max_tokens:
            raise self._refusal("queue_full", f"{queue.tokens} prompt tokens are waiting already.")

    def estimated_wait_s(self) -> float:
        """For a request that arrives now: how long the queue before it takes at the present rate."""
        waiting = self._client.queue().requests
        if not waiting:
            return 0.0
        rate = self._client.totals.start_rate.per_second()
        return min(MAX_RETRY_S, waiting / rate) if rate > 0 else MAX_RETRY_S

    def _refusal(self, reason: str, message: str) -> ApiError:
        self._client.totals.rejected[reason] += 1
        retry_after = max(MIN_RETRY_S, self.estimated_wait_s()) if reason == "queue_full" else None
        return ApiError(reason, message, retry_after_s=retry_after)
