"""What the endpoints of vectors, scores and classes do alike: run the engine's calls while the client is
there, count them, and give the answer's bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import orjson

from penstock.frontend.accounting import Accounting
from penstock.frontend.api.chat_request import messages_json
from penstock.frontend.api.plan import remaining, timeout_of
from penstock.frontend.api.pooled_request import InputRequest
from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.errors import in_input_names
from penstock.frontend.exchange import Exchange
from penstock.frontend.generation import Usage
from penstock.frontend.pooled import Item, PooledCalls, max_input_tokens
from penstock.protos import tokenizer_pb2
from penstock.protos.errors import ApiError

T = TypeVar("T")

# Numbers in an answer that is made beside the event loop, so that it holds nobody up.
_MANY_NUMBERS = 1 << 16


class _Running:
    """A request that waits for its engine calls, in the task it was made in."""

    def __init__(self) -> None:
        self.error: ApiError | None = None
        self._task = asyncio.current_task()

    def cut(self, error: ApiError) -> None:
        self.error = error
        if self._task is not None:
            self._task.cancel()

    def was_cut(self) -> bool:
        """Whether a cancellation that just came was ours, and ours alone."""
        return self.error is not None and self._task is not None and not self._task.uncancel()


async def run_pooled(
    exchange: Exchange,
    context: Context,
    model: Model,
    work: Callable[[PooledCalls], Awaitable[T]],
    *,
    param: str,
    priority: int | None,
) -> tuple[T, Usage]:
    """work's result and what it took. param: the request's name of its inputs. Raises ApiError."""
    timeout_s = timeout_of(exchange)
    calls = PooledCalls(
        context.services, model, exchange.request_id, lambda: remaining(exchange, timeout_s), priority
    )
    accounting = Accounting(context.metrics, model.id, exchange.arrived, 1, 1)
    running = _Running()
    context.answers.add(running)
    finished = "error"
    try:
        result = await exchange.while_connected(_awaited(work, calls))
        finished = "stop"
        return result, calls.usage
    except asyncio.CancelledError:
        if running.was_cut() and running.error is not None:
            raise running.error from None
        raise
    except ApiError as error:
        if error.reason == "client_disconnected":
            finished = "abort"
        raise in_input_names(error, param) from None
    finally:
        context.answers.discard(running)
        accounting.started(0, calls.usage)
        accounting.ended(finished)


async def _awaited(work: Callable[[PooledCalls], Awaitable[T]], calls: PooledCalls) -> T:
    return await work(calls)


async def items_of(
    request: InputRequest, raw: dict[str, Any], exchange: Exchange, context: Context, model: Model
) -> list[Item]:
    """The request's inputs; its messages as the ids of one. raw: the request as it came. Raises ApiError."""
    if request.messages is None:
        return request.items
    tokenizer = context.services.tokenizer_for(model)
    render = tokenizer_pb2.RenderRequest(
        request_id=exchange.request_id,
        model=tokenizer.info.model,
        messages_json=messages_json(raw["messages"]),
        continue_final_message=bool(request.continue_final_message),
        add_generation_prompt=bool(request.add_generation_prompt),
        add_special_tokens=bool(request.add_special_tokens),
        no_answer=True,
    )
    if request.chat_template_kwargs:
        render.template_kwargs_json = orjson.dumps(request.chat_template_kwargs)
    if request.chat_template is not None:
        render.chat_template = request.chat_template
    if request.truncate_prompt_tokens is None:
        render.max_tokens = max_input_tokens(model)
    answer = await exchange.while_connected(tokenizer.render(render, timeout_of(exchange)))
    if not answer.ids:
        raise ApiError("invalid_value", "The messages make an empty input.", "messages")
    return [list(answer.ids)]


async def respond_numbers(exchange: Exchange, body: Callable[[], Any], numbers: int) -> None:
    """numbers: about so many the body has."""
    if numbers < _MANY_NUMBERS:
        await exchange.respond(200, orjson.dumps(body()))
    else:
        await exchange.respond(200, await asyncio.to_thread(lambda: orjson.dumps(body())))


def pooled_usage(usage: Usage) -> dict[str, int]:
    return {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}


def numbers_in(vectors: Sequence[Any]) -> int:
    """Of embeddings as the engine gives them."""
    return sum(len(vector.vector) for vector in vectors) // 4
