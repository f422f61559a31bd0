"""From a GenerateRequest to what the core gets: every field checked again, every default resolved.

The gRPC port is open to callers that never saw the frontend's checks, so nothing is taken on trust. A field
of the contract that this engine does not serve is refused by name. Knows no queue and no processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.engine_service import ranking
from penstock.engine_service.constraint_source import MAX_STARTS_AFTER, constraint_source
from penstock.engine_service.core.messages import AddRequest, ConstraintSource, Ready, Sampling
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError

MAX_REQUEST_ID_BYTES = 128
MAX_SALT_BYTES = 128
MAX_N = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
# Callers over HTTP may send 128 words; a word has an encoding with and one without a leading space.
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROB_TOKEN_IDS = 128
# Log-probabilities of a prompt, its tokens' own included: they come in one message.
MAX_PROMPT_LOGPROB_NUMBERS = 1 << 20
MAX_TRACE_ENTRIES = 8
MAX_TRACE_BYTES = 512
_VERBS = {"generate": "generate", "embed": "embed", "score": "score pairs", "classify": "classify"}
# 30 days: beyond that a deadline says nothing, and clocks must not overflow.
_MAX_TIMEOUT_US = 30 * 24 * 3600 * 10**6


@dataclass(frozen=True, slots=True)
class Validator:
    """What requests are measured against. ready: the loaded model's facts."""

    models: frozenset[str]  # the id and its aliases
    ready: Ready
    queue_timeout_us: int  # when a request brings none; 0: no limit

    def to_core(
        self, request: pb.GenerateRequest, request_id: int, now_us: int, timeout_us: int = 0
    ) -> AddRequest:
        """The core's form of a request that arrives now with `timeout_us` to live (0: no deadline).
        Raises ApiError."""
        check_request_id(request.request_id)
        self.check_model(request.model)
        self.check_task("generate")
        _refuse_unserved(request)
        prompt = self._prompt(request)
        n = _within(request.n if request.HasField("n") else 1, 1, MAX_N, "n")
        _check_prompt_rows(len(prompt), _count(request.output, "prompt_logprobs"))
        stop = request.stop
        max_new, min_new = self._lengths(stop, len(prompt))
        return AddRequest(
            id=request_id,
            prompt=prompt,
            sampling=self._sampling(request.sampling, request.output),
            n=n,
            max_new_tokens=max_new,
            min_new_tokens=min_new,
            stop_token_ids=self.ids(stop.stop_token_ids, "stop.stop_token_ids", MAX_STOP_TOKEN_IDS),
            eos_token_ids=[] if stop.ignore_eos else self.ready.eos_token_ids,
            priority=request.scheduling.priority,
            cache_salt=checked_salt(request.cache.salt),
            skip_cache_read=request.cache.skip_read,
            arrival_us=now_us,
            queue_deadline_us=after(now_us, self.queue_timeout(request.scheduling)),
            deadline_us=after(now_us, timeout_us),
            best_of=ranking.best_of(request, n, MAX_N),
            beam=ranking.beam(request, n, self.ready),
        )

    def constraint(self, request: pb.GenerateRequest) -> ConstraintSource | None:
        """What a request's constraint is to be made of. Raises ApiError."""
        if not request.HasField("constraint"):
            return None
        if "constraints" not in self.ready.capabilities:
            raise unserved("constraint")
        after = request.constraint.starts_after
        self.ids(after, "constraint.starts_after", MAX_STARTS_AFTER)
        return constraint_source(request.constraint)

    def check_model(self, model: str) -> None:
        if model and model not in self.models:
            raise ApiError("model_not_found", f"The model {model[:200]!r} does not exist.", "model")

    def check_task(self, task: str) -> None:
        """Raises ApiError, which says what the model can do, unless that is among it."""
        if task not in self.ready.tasks:
            served = ", ".join(self.ready.tasks)
            raise invalid(f"This model serves {served}; it cannot {_VERBS[task]}.", "model")

    def _prompt(self, request: pb.GenerateRequest) -> list[int]:
        if request.WhichOneof("prompt") is None:
            raise ApiError("missing_required_parameter", "A prompt is needed.", "prompt")
        prompt = list(request.prompt_ids.ids)
        if not prompt:
            raise invalid("The prompt is empty.", "prompt")
        limit = self.ready.max_model_len
        if len(prompt) >= limit:
            raise ApiError(
                "context_length_exceeded",
                f"This model's maximum context length is {limit} tokens, of which at least one must be left "
                f"for the output. The prompt has {len(prompt)} tokens.",
                "prompt",
            )
        self.check_ids(prompt, "prompt")
        return prompt

    def _lengths(self, stop: pb.StopCriteria, prompt_tokens: int) -> tuple[int, int]:
        """(max_new_tokens clamped to the context, min_new_tokens within it)."""
        room = self.ready.max_model_len - prompt_tokens
        asked = stop.max_new_tokens if stop.HasField("max_new_tokens") else room
        if stop.min_new_tokens > asked:
            raise invalid(f"min_new_tokens must not be more than {asked}.", "stop.min_new_tokens")
        return min(asked, room), min(stop.min_new_tokens, room)

    def _sampling(self, sampling: pb.SamplingParams, output: pb.OutputOptions) -> Sampling:
        return Sampling(
            temperature=_number(sampling, "temperature", 1.0, 0.0, 2.0),
            top_p=_number(sampling, "top_p", 1.0, 0.0, 1.0, above=True),
            top_k=self._top_k(sampling),
            min_p=_number(sampling, "min_p", 0.0, 0.0, 1.0),
            seed=sampling.seed if sampling.HasField("seed") else None,
            presence_penalty=_number(sampling, "presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=_number(sampling, "frequency_penalty", 0.0, -2.0, 2.0),
            repetition_penalty=_number(sampling, "repetition_penalty", 1.0, 0.0, 2.0, above=True),
            logit_bias=self._logit_bias(sampling),
            allowed_token_ids=self.ids(
                sampling.allowed_token_ids, "sampling.allowed_token_ids", self.ready.vocab_size
            ),
            bad_words=self._bad_words(sampling),
            logprobs=_count(output, "logprobs"),
            prompt_logprobs=_count(output, "prompt_logprobs"),
            logprob_token_ids=self.ids(
                output.logprob_token_ids, "output.logprob_token_ids", MAX_LOGPROB_TOKEN_IDS
            ),
        )

    def _top_k(self, sampling: pb.SamplingParams) -> int:
        top_k = sampling.top_k if sampling.HasField("top_k") else 0
        if top_k < -1:
            raise invalid("top_k must be at least 1, or 0 or -1 for all.", "sampling.top_k")
        return 0 if top_k >= self.ready.vocab_size else max(0, top_k)

    def _logit_bias(self, sampling: pb.SamplingParams) -> dict[int, float]:
        name = "sampling.logit_bias"
        check_size(len(sampling.logit_bias), MAX_LOGIT_BIAS, name)
        bias = dict(sampling.logit_bias)
        self.check_ids(list(bias), name)
        for value in bias.values():
            _check_range(value, -100.0, 100.0, name)
        return bias

    def _bad_words(self, sampling: pb.SamplingParams) -> list[list[int]]:
        name = "sampling.bad_words"
        check_size(len(sampling.bad_words), MAX_BAD_WORDS, name)
        words = [self.ids(word.ids, name, MAX_BAD_WORD_TOKENS) for word in sampling.bad_words]
        if not all(words):
            raise invalid("A bad word has no tokens.", name)
        return words

    def ids(self, ids: Sequence[int], name: str, limit: int) -> list[int]:
        check_size(len(ids), limit, name)
        found = list(ids)
        self.check_ids(found, name)
        return found

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        if ids and max(ids) >= self.ready.vocab_size:
            raise invalid(
                f"Token id {max(ids)} is outside the vocabulary of {self.ready.vocab_size} tokens.", name
            )

    def queue_timeout(self, scheduling: pb.SchedulingOptions) -> int:
        if scheduling.HasField("queue_timeout_us"):
            return scheduling.queue_timeout_us
        return self.queue_timeout_us


def _refuse_unserved(request: pb.GenerateRequest) -> None:
    if request.WhichOneof("prompt") == "prompt_embeds":
        raise unserved("prompt_embeds")
    for name in ("media", "kv_transfer"):
        if getattr(request, name):
            raise unserved(name)
    check_scheduling(request.scheduling)
    check_size(len(request.trace), MAX_TRACE_ENTRIES, "trace")
    for key, value in request.trace.items():
        if len(key) + len(value) > MAX_TRACE_BYTES or not (_is_plain(key) and _is_plain(value)):
            raise invalid("The trace context is malformed.", "trace")


def check_scheduling(scheduling: pb.SchedulingOptions) -> None:
    if scheduling.tenant:
        raise unserved("scheduling.tenant")
    if scheduling.HasField("weight"):
        raise unserved("scheduling.weight")


def check_request_id(request_id: str) -> None:
    if len(request_id.encode()) > MAX_REQUEST_ID_BYTES or not request_id.isprintable():
        raise invalid(f"request_id must be printable and at most {MAX_REQUEST_ID_BYTES} bytes.", "request_id")


def checked_salt(salt: str) -> str:
    if len(salt) > MAX_SALT_BYTES or not _is_plain(salt):
        raise invalid(f"A cache salt is at most {MAX_SALT_BYTES} printable ASCII characters.", "cache.salt")
    return salt


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _number(
    sampling: pb.SamplingParams, name: str, default: float, low: float, high: float, *, above: bool = False
) -> float:
    """An optional float within [low, high], or (low, high] with `above`."""
    if not sampling.HasField(name):  # type: ignore[arg-type]
        return default
    value = float(getattr(sampling, name))
    _check_range(value, low, high, f"sampling.{name}")
    if above and value <= low:
        raise invalid(f"{name} must be above {low:g}.", f"sampling.{name}")
    return value


def _check_range(value: float, low: float, high: float, name: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise invalid(f"{name.rpartition('.')[2]} must be between {low:g} and {high:g}.", name)


def _count(output: pb.OutputOptions, name: str) -> int | None:
    if not output.HasField(name):  # type: ignore[arg-type]
        return None
    return _within(getattr(output, name), 0, MAX_LOGPROBS, f"output.{name}")


def _check_prompt_rows(num_tokens: int, alternatives: int | None) -> None:
    if alternatives is not None and num_tokens * (alternatives + 1) > MAX_PROMPT_LOGPROB_NUMBERS:
        raise invalid(
            f"The prompt's tokens times (prompt_logprobs + 1) must be at most {MAX_PROMPT_LOGPROB_NUMBERS}.",
            "output.prompt_logprobs",
        )


def _within(value: int, low: int, high: int, name: str) -> int:
    if not low <= value <= high:
        raise invalid(f"{name.rpartition('.')[2]} must be between {low} and {high}.", name)
    return value


def check_size(size: int, limit: int, name: str) -> None:
    if size > limit:
        raise invalid(f"{name.rpartition('.')[2]} may have at most {limit} entries.", name)


def after(now_us: int, timeout_us: int) -> int:
    return now_us + min(timeout_us, _MAX_TIMEOUT_US) if timeout_us > 0 else 0


def invalid(message: str, param: str) -> ApiError:
    return ApiError("invalid_value", message, param)


def unserved(name: str) -> ApiError:
    return ApiError("unimplemented", f"{name} is not served by this engine.", name)
