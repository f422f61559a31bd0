"""Which of several answers a request wants: beam search, best_of, and what else its tokens are to show. Knows
the request types and the engine's contract; knows no service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.frontend.errors import unsupported
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

if TYPE_CHECKING:
    from penstock.frontend.api.constraint import Asked
    from penstock.frontend.api.generation_request import GenerationRequest

MAX_BEAMS = 32

# What changes the probabilities that beams are ranked by, with what leaves them as they are.
NEUTRAL: dict[str, tuple[float, ...]] = {
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
}
_ABSENT = ("logit_bias", "allowed_token_ids", "bad_words", "logprob_token_ids")


def num_candidates(request: GenerationRequest) -> int:
    """Sequences that are computed for a prompt."""
    return max(request.n or 1, request.best_of or 1)


def check_ranking(request: GenerationRequest) -> None:
    """Raises ApiError."""
    if request.best_of is not None and request.best_of < (request.n or 1):
        raise ApiError("invalid_value", "'best_of' must be at least 'n'.", "best_of")
    if request.use_beam_search:
        _check_beams(request)
    else:
        for name, off in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(request, name) not in (None, off):
                raise ApiError(
                    "invalid_value", f"'{name}' is only allowed with 'use_beam_search': true.", name
                )
    if request.logprob_token_ids and request.alternatives is None:
        raise ApiError(
            "invalid_value", "'logprob_token_ids' is only allowed with 'logprobs'.", "logprob_token_ids"
        )


def _check_beams(request: GenerationRequest) -> None:
    if num_candidates(request) > MAX_BEAMS:
        param = "best_of" if request.best_of is not None else "n"
        raise ApiError("invalid_value", f"'{param}': a beam search has at most {MAX_BEAMS} beams.", param)
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise unsupported(name, "has no meaning in a beam search")
    for name in _ABSENT:
        if getattr(request, name):
            raise unsupported(name, "is not supported in a beam search")


def refuse_constraint(request: GenerationRequest, asked: Asked | None) -> None:
    """asked: the form that fields or tools of the request ask for. Raises ApiError naming the field."""
    if request.use_beam_search and asked is not None:
        raise unsupported(asked.param.partition(".")[0], "is not supported in a beam search")


def check_slots(request: GenerationRequest, max_running: int) -> None:
    """max_running: sequences of one step of the engine, 0: unknown. Raises ApiError for more beams than that,
    which run together or not at all."""
    if request.use_beam_search and 0 < max_running < num_candidates(request):
        param = "best_of" if request.best_of is not None else "n"
        raise ApiError(
            "invalid_value", f"'{param}': this engine searches with at most {max_running} beams.", param
        )


def set_ranking(request: GenerationRequest, made: engine_pb2.GenerateRequest) -> None:
    """Beams are ranked by the engine. Candidates of best_of are ranked by best_of.BestOf: only the text tells
    where a stop string ends them."""
    if not request.use_beam_search:
        made.n = num_candidates(request)
        made.output.logprob_token_ids.extend(dict.fromkeys(request.logprob_token_ids or []))
        return
    made.n = request.n or 1
    made.beam_search.width = num_candidates(request)
    made.beam_search.length_penalty = 1.0 if request.length_penalty is None else request.length_penalty
    made.beam_search.early_stopping = request.early_stopping is True
    made.beam_search.exhaustive = request.early_stopping == "never"
