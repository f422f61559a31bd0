"""From an Embed or Score request to what the core gets: every field checked, as for Generate.

Knows no queue and no processes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.engine_service.core.messages import (
    CLASSIFY,
    EMBED,
    SIMILARITY,
    AddPooled,
    PooledFacts,
    Sampling,
)
from penstock.engine_service.scoring import ScoreParts
from penstock.engine_service.validation import (
    MAX_LOGPROB_TOKEN_IDS,
    Validator,
    after,
    check_request_id,
    check_scheduling,
    check_size,
    checked_salt,
    invalid,
    unserved,
)
from penstock.protos import common_pb2
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError

MAX_BATCH_INPUTS = 2048
# Of an answer's numbers: it is one message, whose limit is 64 MiB.
MAX_ANSWER_BYTES = 48 * 1024 * 1024
POOLINGS: dict[str, pb.PoolingType] = {
    "cls": pb.POOLING_TYPE_CLS,
    "mean": pb.POOLING_TYPE_MEAN,
    "last": pb.POOLING_TYPE_LAST,
    "all": pb.POOLING_TYPE_ALL,
}
_NAMES = {value: name for name, value in POOLINGS.items()}


@dataclass(frozen=True, slots=True)
class Arrival:
    """Of every request that a call becomes: when it came, and until when it must be answered."""

    now_us: int
    timeout_us: int = 0  # 0: no deadline

    @property
    def deadline_us(self) -> int:
        return after(self.now_us, self.timeout_us)


@dataclass(frozen=True, slots=True)
class BatchValidator:
    """common: what every request is measured against."""

    common: Validator

    def embed(self, request: pb.EmbedRequest, request_id: int, arrival: Arrival) -> AddPooled:
        """Raises ApiError."""
        self._check_call(request)
        self.common.check_task("embed")
        _check_count(len(request.inputs), "inputs")
        params = self._pooled(request.inputs, "inputs", request_id, request.scheduling, arrival)
        params.pooling = _pooling(request)
        params.dimensions = self._dimensions(request)
        params.normalize = request.normalize if request.HasField("normalize") else None
        rows = len(params.prompt) if params.pooling == "all" else len(params.lengths)
        _check_answer(rows * (params.dimensions or self._facts.dimensions))
        return params

    def pooled_score(self, request: pb.ScoreRequest, request_id: int, arrival: Arrival) -> AddPooled:
        """A Score call on a model that does not generate. Of a similarity input 0 is the query. Raises
        ApiError."""
        task = request.WhichOneof("task")
        scheduling = request.scheduling
        if task == "similarity":
            self.common.check_task("embed")
            documents = request.similarity.documents
            _check_count(len(documents), "similarity.documents")
            inputs = [request.similarity.query, *documents]
            params = self._pooled(inputs, "similarity", request_id, scheduling, arrival)
            params.kind = SIMILARITY
            return params
        self.common.check_task("score" if task == "pairs" else "classify")
        own = request.pairs if task == "pairs" else request.classify
        name = f"{task}.inputs"
        _check_count(len(own.inputs), name)
        params = self._pooled(own.inputs, name, request_id, scheduling, arrival)
        params.kind = CLASSIFY
        params.activate = own.apply_activation if own.HasField("apply_activation") else True
        _check_answer(len(params.lengths) * len(self._facts.labels))
        return params

    def labels(self, request: pb.ScoreRequest, arrival: Arrival) -> ScoreParts:
        """A part for each prompt, whose first token has the labels' log-probabilities. Raises ApiError."""
        asked = request.labels
        _check_count(len(asked.prompts), "labels.prompts")
        if not asked.label_ids:
            raise invalid("There are no labels.", "labels.label_ids")
        label_ids = self.common.ids(asked.label_ids, "labels.label_ids", MAX_LOGPROB_TOKEN_IDS)
        prompts = [
            self._ids(prompt, "Prompt", number, 0, "labels.prompts")
            for number, prompt in enumerate(asked.prompts)
        ]
        sampling = Sampling(temperature=0.0, logprobs=0, logprob_token_ids=label_ids)
        return self._parts(request, array("i"), prompts, sampling, 1, arrival)

    def continuations(self, request: pb.ScoreRequest, arrival: Arrival) -> ScoreParts:
        """A part for each continuation, as the end of a prompt of which it is scored. Raises ApiError."""
        asked = request.continuations
        name = "continuations.continuations"
        _check_count(len(asked.continuations), name)
        context = self._ids(asked.context, "Context", 0, 0, "continuations.context")
        tails = [
            self._ids(continuation, "Continuation", number, len(context), name)
            for number, continuation in enumerate(asked.continuations)
        ]
        sampling = Sampling(temperature=0.0, prompt_logprobs=0, prompt_logprobs_from=len(context))
        return self._parts(request, context, tails, sampling, 0, arrival)

    def check_score(self, request: pb.ScoreRequest) -> str:
        """The kind of task. Raises ApiError."""
        self._check_call(request)
        task = request.WhichOneof("task")
        if task is None:
            raise ApiError("missing_required_parameter", "A task is needed.", "task")
        if task in ("labels", "continuations"):
            self.common.check_task("generate")
        return task

    # ------------------------------------------------------------------ inside

    @property
    def _facts(self) -> PooledFacts:
        facts = self.common.ready.pooled
        if facts is None:
            raise ApiError("internal_error", "An internal error occurred.")
        return facts

    def _check_call(self, request: pb.EmbedRequest | pb.ScoreRequest) -> None:
        check_request_id(request.request_id)
        self.common.check_model(request.model)
        check_scheduling(request.scheduling)
        checked_salt(request.cache.salt)

    def _pooled(
        self,
        inputs: Sequence[pb.EmbedInput],
        name: str,
        request_id: int,
        scheduling: pb.SchedulingOptions,
        arrival: Arrival,
    ) -> AddPooled:
        ids, lengths = array("i"), array("i")
        limit = self.common.ready.max_model_len
        for number, item in enumerate(inputs):
            if item.media:
                raise unserved(f"{name}.media")
            row = list(item.token_ids)  # twice as fast to look through
            size = len(row)
            if not size:
                raise invalid(f"Input {number} has no tokens.", name)
            if size > limit:
                raise ApiError(
                    "context_length_exceeded",
                    f"This model's maximum input length is {limit} tokens. Input {number} has {size} tokens.",
                    name,
                )
            self.common.check_ids(row, name)
            ids.fromlist(row)
            lengths.append(size)
        return AddPooled(
            request_id,
            ids,
            lengths,
            self._token_types(inputs, name),
            EMBED,
            priority=scheduling.priority,
            arrival_us=arrival.now_us,
            queue_deadline_us=after(arrival.now_us, self.common.queue_timeout(scheduling)),
            deadline_us=arrival.deadline_us,
        )

    def _token_types(self, inputs: Sequence[pb.EmbedInput], name: str) -> array[int]:
        types = array("i")
        # A model without types takes those of any tokenizer: many number the texts of a pair all the same.
        if self._facts.type_vocab_size <= 1 or not any(item.token_type_ids for item in inputs):
            return types
        name = f"{name}.token_type_ids"
        for number, item in enumerate(inputs):
            given, size = item.token_type_ids, len(item.token_ids)
            if given and len(given) != size:
                raise invalid(f"Input {number} has {size} tokens and {len(given)} token types.", name)
            if given and max(given) >= self._facts.type_vocab_size:
                raise invalid(f"Token type {max(given)} is not below {self._facts.type_vocab_size}.", name)
            types.extend(given or bytes(size))
        return types

    def _dimensions(self, request: pb.EmbedRequest) -> int:
        if not request.HasField("dimensions"):
            return 0
        facts, asked = self._facts, request.dimensions
        if asked == facts.dimensions or asked in facts.matryoshka:
            return asked
        if facts.any_dimensions:
            if 1 <= asked <= facts.dimensions:
                return asked
            raise invalid(f"dimensions must be between 1 and {facts.dimensions}.", "dimensions")
        allowed = ", ".join(map(str, sorted({*facts.matryoshka, facts.dimensions})))
        raise invalid(f"dimensions must be one of {allowed} for this model.", "dimensions")

    def _ids(
        self, given: common_pb2.TokenIds, what: str, number: int, num_before: int, name: str
    ) -> array[int]:
        """The ids of a part of a call, behind num_before others. Raises ApiError, which names it."""
        limit, size = self.common.ready.max_model_len, num_before + len(given.ids)
        if not given.ids:
            raise invalid(f"{what} {number} has no tokens.", name)
        if size >= limit:
            raise ApiError(
                "context_length_exceeded",
                f"This model's maximum context length is {limit} tokens, of which one must be left. "
                f"{what} {number} comes to {size} tokens.",
                name,
            )
        self.common.check_ids(given.ids, name)
        return array("i", given.ids)

    def _parts(
        self,
        request: pb.ScoreRequest,
        shared: array[int],
        tails: list[array[int]],
        sampling: Sampling,
        max_new_tokens: int,
        arrival: Arrival,
    ) -> ScoreParts:
        ready = self.common.ready
        caches = "prefix_caching" in ready.capabilities and not request.cache.skip_read
        return ScoreParts(
            shared,
            tails,
            sampling,
            max_new_tokens,
            request.scheduling.priority,
            request.cache.salt,
            request.cache.skip_read,
            self.common.queue_timeout(request.scheduling),
            arrival.deadline_us,
            ready.kv_block_size if caches else 0,
        )


def _pooling(request: pb.EmbedRequest) -> str:
    if not request.HasField("pooling") or request.pooling == pb.POOLING_TYPE_UNSPECIFIED:
        return ""
    if request.pooling not in _NAMES:
        raise invalid("The pooling is unknown.", "pooling")
    return _NAMES[request.pooling]


def _check_count(count: int, name: str) -> None:
    if not count:
        raise invalid("There are no inputs.", name)
    check_size(count, MAX_BATCH_INPUTS, name)


def _check_answer(numbers: int) -> None:
    if 4 * numbers > MAX_ANSWER_BYTES:
        raise invalid(
            f"The answer would have {4 * numbers} bytes, more than {MAX_ANSWER_BYTES}: send fewer inputs.",
            "inputs",
        )
