"""Everything behind the frontend: engines, tokenizers, the models they make up together, and who gets a
request.

A model is served when an engine names it and a tokenizer has that engine's tokenizer fingerprint. Knows no
HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NoReturn

from penstock.frontend.catalog import Mismatch, Model, listed, pair
from penstock.frontend.connection import CALL_TIMEOUT_S, State
from penstock.frontend.engines import EngineConnection
from penstock.frontend.routing import RetryBudget, choose, prompt_key
from penstock.frontend.targets import AddressBook
from penstock.frontend.text.vocabulary import Vocabulary
from penstock.frontend.tokenizer_client import ModelTokenizer, TokenizerConnection, Vocabularies
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.frontend.services")

_IDLE_CHECK_S = 0.5
# Not asked yet, or loading by its own word.
_LOADING = (engine_pb2.SERVING_STATE_UNSPECIFIED, engine_pb2.SERVING_STATE_LOADING)


class Services:
    """All methods but start and stop are synchronous views on what the connections report, or calls with a
    deadline. Belongs to one event loop."""

    def __init__(
        self,
        engine_targets: Sequence[str],
        tokenizer_targets: Sequence[str],
        *,
        aliases: Mapping[str, str] | None = None,
        silence_seconds: float = 120.0,
        tokenizer_timeout_s: float = 10.0,
        resolve_interval_s: float = 3.0,
    ) -> None:
        """targets: "unix:...", "dns:///host:port" or "host:port". aliases: further names of models. Raises
        ValueError for a malformed target."""
        self._aliases = dict(aliases or {})
        self._silence_seconds = silence_seconds
        self._tokenizer_timeout_s = tokenizer_timeout_s
        self._engines: dict[str, EngineConnection] = {}
        self._tokenizers: dict[str, TokenizerConnection] = {}
        self._vocabularies = Vocabularies()
        self._books = [
            AddressBook(engine_targets, self._add_engine, self._remove_engine, resolve_interval_s),
            AddressBook(tokenizer_targets, self._add_tokenizer, self._remove_tokenizer, resolve_interval_s),
        ]
        self._budget = RetryBudget(time.monotonic)
        self._models: dict[str, Model] = {}
        self._mismatches: list[Mismatch] = []
        self._started = False  # every engine that was there at the start has loaded its model
        self._changed = asyncio.Event()
        self._stopping = False
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving: set[asyncio.Task[None]] = set()

    # ----------------------------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Looks the targets up once and begins to follow them; does not wait for any to be ready."""
        for book in self._books:
            await book.refresh()
            self._tasks.append(asyncio.create_task(book.run()))

    async def stop(self) -> None:
        """Closes every connection; live requests get an error."""
        self._stopping = True
        tasks = [*self._tasks, *self._leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        connections = [*self._engines.values(), *self._tokenizers.values()]
        await asyncio.gather(*(connection.close() for connection in connections))

    def drain(self) -> None:
        """From here on `unready` says shutting_down. Live requests and new ones are still served."""
        self._draining = True
        self._notify()

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Returns when condition() holds, asked again after each change. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    # -------------------------------------------------------------------------------------- views

    @property
    def models(self) -> dict[str, Model]:
        """Served models by name; a model is there under its id and each alias."""
        return self._models

    @property
    def engines(self) -> list[EngineConnection]:
        return list(self._engines.values())

    @property
    def tokenizers(self) -> list[TokenizerConnection]:
        return list(self._tokenizers.values())

    @property
    def num_live(self) -> int:
        """Requests at engines now."""
        return sum(engine.num_live for engine in self._engines.values())

    def unready(self) -> ApiError | None:
        """Why no request can be served now; None when at least one model can, at the start when those of all
        engines within reach can. Asking has the replicas probed: the next answer knows of those that have
        stopped."""
        for connection in (*self._engines.values(), *self._tokenizers.values()):
            connection.touch()
        if self._draining or self._stopping:
            return ApiError("shutting_down", "The server is shutting down.")
        reasons = [self._unready_model(model) for model in self._distinct_models()]
        if None not in reasons:
            return next((reason for reason in reasons if reason is not None), None) or self._nobody()
        if not self._started and self._any_loads_another():
            return ApiError("engine_loading", "One of the models is still loading.")
        return None

    def _any_loads_another(self) -> bool:
        """Whether an engine has yet to load a model that is not served: not one more replica of one."""
        return any(
            engine.state is State.NOT_SERVING
            and engine.info is None
            and engine.load_state in _LOADING
            and not set(engine.promised) & set(self._models)
            for engine in self._engines.values()
        )

    def _unready_model(self, model: Model) -> ApiError | None:
        if not self._ready_engines(model):
            return self._nobody(model)
        if not self._ready_tokenizers(model):
            return ApiError("engine_unavailable", "No tokenizer is reachable right now.")
        return None

    def _distinct_models(self) -> list[Model]:
        return list({model.id: model for model in self._models.values()}.values())

    # ---------------------------------------------------------------------------------- decisions

    def resolve(self, name: str | None) -> Model:
        """The model of a request. Raises ApiError: missing_required_parameter without a name when there are
        several, model_not_found, or engine_unavailable and engine_loading where an engine may yet turn out to
        serve it."""
        models = self._models
        if not models:
            raise self._nobody()
        if not name:
            distinct = self._distinct_models()
            if len(distinct) == 1:
                return distinct[0]
            raise ApiError(
                "missing_required_parameter",
                f"Several models are served; name one of {listed(models)}.",
                "model",
            )
        return models[name] if name in models else self._refuse_unknown(name)

    def _refuse_unknown(self, name: str) -> NoReturn:
        """A name nobody serves is for the caller to mend; one that somebody will serve, or might, is not."""
        wanted = self._aliases.get(name, name)
        for engine in self._engines.values():
            if engine.info is None and wanted in engine.promised:
                raise ApiError("engine_loading", f"The model {name[:128]!r} is still loading.")
            if engine.info is not None and wanted in (engine.info.model, *engine.info.aliases):
                raise ApiError("engine_unavailable", "No tokenizer belongs to the engine's model.")
        if any(engine.info is None and not engine.promised for engine in self._engines.values()):
            raise ApiError(
                "engine_unavailable",
                f"The model {name[:128]!r} is none of {listed(self._models)}, and not every engine has "
                "answered yet.",
            )
        raise ApiError(
            "model_not_found",
            f"The model {name[:128]!r} does not exist. Served here: {listed(self._models)}.",
            "model",
        )

    def pick(self, model: Model, prompt_ids: Sequence[int], salt: str = "") -> EngineConnection:
        """The engine for a new request. Raises ApiError when none is ready."""
        self._budget.count_request()
        return self._choose(self._ready_engines(model), model, prompt_ids, salt)

    def retry_on(
        self, model: Model, prompt_ids: Sequence[int], salt: str, *, exclude: EngineConnection
    ) -> EngineConnection | None:
        """Another engine for a request that one refused, if there is one and the budget allows."""
        others = [engine for engine in self._ready_engines(model) if engine is not exclude]
        if self._stopping or not others or not self._budget.take():
            return None
        return self._choose(others, model, prompt_ids, salt)

    def _choose(
        self, engines: list[EngineConnection], model: Model, prompt_ids: Sequence[int], salt: str
    ) -> EngineConnection:
        if self._stopping:
            raise ApiError("shutting_down", "The server is shutting down.")
        if not engines:
            raise self._nobody(model)
        return choose(engines, prompt_key(prompt_ids, salt), _instance)

    def tokenizer_for(self, model: Model) -> ModelTokenizer:
        """Raises ApiError when no replica is ready."""
        replicas = self._ready_tokenizers(model)
        vocabulary = self._vocabularies.get(model.fingerprint)
        if not replicas or vocabulary is None:
            raise ApiError("engine_unavailable", "No tokenizer is reachable right now.")
        random.shuffle(replicas)
        info = replicas[0].info
        return ModelTokenizer(info or model.tokenizer, vocabulary, replicas, self._tokenizer_timeout_s)

    async def vocabulary(self, model: Model) -> Vocabulary:
        """The model's tokenizer for decoding here. Raises ApiError when it could not be fetched yet."""
        found = self._vocabularies.get(model.fingerprint)
        if found is None:
            raise ApiError("engine_unavailable", "No tokenizer is reachable right now.")
        return found

    def _ready_engines(self, model: Model) -> list[EngineConnection]:
        return [
            engine
            for engine in self._engines.values()
            if engine.ready and engine.info is not None and model.served_by(engine.info)
        ]

    def _ready_tokenizers(self, model: Model) -> list[TokenizerConnection]:
        ready: list[TokenizerConnection] = []
        named: list[TokenizerConnection] = []
        for tokenizer in self._tokenizers.values():
            info = tokenizer.info
            if tokenizer.ready and info is not None and info.fingerprint == model.fingerprint:
                ready.append(tokenizer)
                if model.named_by(info):
                    named.append(tokenizer)
        return named or ready

    def _nobody(self, model: Model | None = None) -> ApiError:
        """Why no engine takes a request: for the model, or at all."""
        engines = [
            engine
            for engine in self._engines.values()
            if model is None or engine.info is None or model.served_by(engine.info)
        ]
        states = {engine.load_state for engine in engines if engine.state is State.NOT_SERVING}
        if engine_pb2.SERVING_STATE_LOADING in states:
            return ApiError("engine_loading", "The model is still loading.")
        if engine_pb2.SERVING_STATE_DRAINING in states:
            return ApiError("shutting_down", "The engine is shutting down.")
        if not any(engine.ready for engine in engines):
            return ApiError("engine_unavailable", "No engine is reachable right now.")
        if self._mismatches:
            return ApiError("engine_unavailable", "No tokenizer belongs to the engine's model.")
        return ApiError("engine_unavailable", "No tokenizer is reachable right now.")

    # ------------------------------------------------------------------------------------ changes

    def _add_engine(self, address: str) -> None:
        engine = EngineConnection(address, self._notify, self._silence_seconds)
        self._engines[address] = engine
        engine.open()

    def _remove_engine(self, address: str) -> None:
        engine = self._engines.pop(address)
        engine.retired = True
        self._later(self._close_when_idle(engine))
        self._notify()

    def _add_tokenizer(self, address: str) -> None:
        tokenizer = TokenizerConnection(address, self._notify, self._vocabularies)
        self._tokenizers[address] = tokenizer
        tokenizer.open()

    def _remove_tokenizer(self, address: str) -> None:
        self._later(self._close_after_calls(self._tokenizers.pop(address)))
        self._notify()

    async def _close_when_idle(self, engine: EngineConnection) -> None:
        try:
            while engine.num_live:
                await asyncio.sleep(_IDLE_CHECK_S)
        finally:
            await engine.close()

    async def _close_after_calls(self, tokenizer: TokenizerConnection) -> None:
        """No new request gets it; a call that has begun ends within the longest time calls have."""
        try:
            await asyncio.sleep(max(CALL_TIMEOUT_S, self._tokenizer_timeout_s))
        finally:
            await tokenizer.close()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _notify(self) -> None:
        engines = [engine.info for engine in self._engines.values() if engine.info is not None]
        tokenizers = [item.info for item in self._tokenizers.values() if item.info is not None]
        self._models, mismatches = pair(engines, tokenizers, self._aliases)
        if None in map(self._unready_model, self._distinct_models()) and not self._any_loads_another():
            self._started = True
        all_told = len(tokenizers) == len(self._tokenizers)  # else the one that fits may be yet to come
        for mismatch in mismatches if all_told else ():
            if mismatch not in self._mismatches:
                log.error(
                    "model %s is not served: its engine's tokenizer is %s, the tokenizers here are %s",
                    mismatch.model,
                    mismatch.engine,
                    ", ".join(mismatch.tokenizers),
                )
        if all_told:
            self._mismatches = mismatches
        self._changed.set()


def _instance(engine: EngineConnection) -> str:
    """The same on every frontend, whatever address each of them uses."""
    return engine.info.instance_id if engine.info is not None else engine.address
