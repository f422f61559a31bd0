"""The loop that suits what has been built. Knows no models."""

from __future__ import annotations

from typing import Protocol, cast

from penstock.engine_service.core.base_loop import BaseLoop
from penstock.engine_service.core.constraints import Constraints
from penstock.engine_service.core.inbox import Inbox, Outbox
from penstock.engine_service.core.loop import EngineLoop
from penstock.engine_service.core.messages import Configure, Ready
from penstock.engine_service.core.plan import Runner
from penstock.engine_service.core.pooled_loop import PooledLoop, PooledRunner


class Built(Protocol):
    """A loaded model. runner: a PooledRunner where `ready` has pooled facts, else a Runner."""

    @property
    def runner(self) -> Runner | PooledRunner: ...

    @property
    def ready(self) -> Ready: ...

    @property
    def constraints(self) -> Constraints | None: ...


def make_loop(configure: Configure, built: Built, inbox: Inbox, outbox: Outbox) -> BaseLoop:
    """The loop of a model that has been built as `configure` asked."""
    ready = built.ready
    if ready.pooled is None:
        runner = cast(Runner, built.runner)
        return EngineLoop.of_model(configure, ready, runner, inbox, outbox, built.constraints)
    pooled = cast(PooledRunner, built.runner)
    return PooledLoop(
        pooled,
        inbox,
        outbox,
        tasks=ready.tasks,
        max_batched_tokens=min(configure.max_num_batched_tokens, pooled.max_step_tokens),
        max_inputs=configure.max_num_seqs,
        max_input_tokens=ready.max_model_len,
    )
