"""What a request may ask of beam search and best_of, checked. Knows no queue and no processes."""

from __future__ import annotations

from penstock.engine_service.core.messages import Beam, Ready
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError

MAX_BEAMS = 32
# Every id that may end a beam can take a place among the continuations that each beam shows.
MAX_END_IDS = 64
MAX_LENGTH_PENALTY = 5.0
_NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def best_of(request: pb.GenerateRequest, n: int, limit: int) -> int:
    """Candidates to rank, 0 for none. Raises ApiError."""
    if not request.HasField("best_of"):
        return 0
    if not n <= request.best_of <= limit:
        raise _invalid(f"best_of must be between n and {limit}.", "best_of")
    if request.HasField("beam_search"):
        raise _invalid("The width of a beam search is beam_search.width.", "best_of")
    if request.best_of > n and request.output.logprob_token_ids:
        raise _unserved("output.logprob_token_ids", "best_of")
    return request.best_of if request.best_of > n else 0


def beam(request: pb.GenerateRequest, n: int, ready: Ready) -> Beam | None:
    """The beam search asked for. Raises ApiError, also for what cannot be had together with it."""
    if not request.HasField("beam_search"):
        return None
    asked = request.beam_search
    if not n <= asked.width <= MAX_BEAMS:
        raise _invalid(f"width must be between n and {MAX_BEAMS}.", "beam_search.width")
    ends = {*request.stop.stop_token_ids, *([] if request.stop.ignore_eos else ready.eos_token_ids)}
    if len(ends) > MAX_END_IDS:
        raise _invalid(f"Beam search takes at most {MAX_END_IDS} ids that end it.", "stop.stop_token_ids")
    if asked.width + len(ends) > ready.vocab_size:
        raise _invalid("width must be below the number of tokens.", "beam_search.width")
    if asked.early_stopping and asked.exhaustive:
        raise _invalid("early_stopping and exhaustive exclude each other.", "beam_search.exhaustive")
    penalty = asked.length_penalty if asked.HasField("length_penalty") else 1.0
    if not -MAX_LENGTH_PENALTY <= penalty <= MAX_LENGTH_PENALTY:
        raise _invalid(
            f"length_penalty must be between -{MAX_LENGTH_PENALTY:g} and {MAX_LENGTH_PENALTY:g}.",
            "beam_search.length_penalty",
        )
    _refuse_what_changes_probabilities(request)
    return Beam(asked.width, penalty, asked.early_stopping, asked.exhaustive)


def _refuse_what_changes_probabilities(request: pb.GenerateRequest) -> None:
    sampling = request.sampling
    for name in ("logit_bias", "allowed_token_ids", "bad_words"):
        if getattr(sampling, name):
            raise _unserved(f"sampling.{name}", "beam search")
    for name, neutral in _NEUTRAL.items():
        if sampling.HasField(name) and getattr(sampling, name) != neutral:  # type: ignore[arg-type]
            raise _unserved(f"sampling.{name}", "beam search")
    if request.output.logprob_token_ids:
        raise _unserved("output.logprob_token_ids", "beam search")
    if request.HasField("constraint"):
        raise _unserved("constraint", "beam search")


def _invalid(message: str, param: str) -> ApiError:
    return ApiError("invalid_value", message, param)


def _unserved(name: str, other: str) -> ApiError:
    return ApiError("unimplemented", f"{name.rpartition('.')[2]} is not served together with {other}.", name)
