"""One offline request: from sampling parameters to the core's message, and from its events to an output.

Knows ids, text pipelines and the core's messages; knows no model and no loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from penstock.engine_service.core.messages import (
    LENGTH,
    AddRequest,
    Beam,
    Constraint,
    Finish,
    Logprobs,
    Ready,
    Sampling,
)
from penstock.frontend.text.pipeline import TextPipeline
from penstock.frontend.text.vocabulary import Vocabulary
from penstock.local.outputs import CompletionOutput, Logprob, RequestOutput
from penstock.local.sampling_params import SamplingParams


def core_request(
    request_id: int,
    prompt: Sequence[int],
    params: SamplingParams,
    ready: Ready,
    encode_word: Callable[[str], list[list[int]]],
    turn_ends: Sequence[int] = (),
    constraint: Constraint | None = None,
) -> AddRequest:
    """The core's form of a request, checked against the model's limits. encode_word: the id sequences that
    spell a word. turn_ends: ids that end an answer as the end of sequence does. Raises ValueError.

    The candidates of best_of are choices for the core: they are ranked here, where their text is known."""
    _check_ids("prompt", prompt, ready.vocab_size)
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        _check_ids(name, list(getattr(params, name) or ()), ready.vocab_size)
    ids = list(prompt)
    if params.truncate_prompt_tokens is not None:
        ids = ids[-params.truncate_prompt_tokens :]
    if not ids:
        raise ValueError("prompt: it has no tokens")
    room = ready.max_model_len - len(ids)
    if room < 1:
        raise ValueError(
            f"prompt: it has {len(ids)} tokens; this model takes at most {ready.max_model_len - 1}"
        )
    new_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    return AddRequest(
        id=request_id,
        prompt=ids,
        sampling=_sampling(params, encode_word),
        n=params.n if params.use_beam_search else params.num_candidates,
        max_new_tokens=new_tokens,
        min_new_tokens=min(params.min_tokens, new_tokens),
        stop_token_ids=list(params.stop_token_ids or ()),
        eos_token_ids=[] if params.ignore_eos else [*ready.eos_token_ids, *turn_ends],
        beam=_beam(params),
        constraint=constraint,
    )


def _beam(params: SamplingParams) -> Beam | None:
    if not params.use_beam_search:
        return None
    return Beam(
        params.num_candidates,
        float(params.length_penalty),
        params.early_stopping is True,
        params.early_stopping == "never",
    )


def _sampling(params: SamplingParams, encode_word: Callable[[str], list[list[int]]]) -> Sampling:
    return Sampling(
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=max(0, params.top_k),
        min_p=float(params.min_p),
        seed=None if params.seed == -1 else params.seed,
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        logit_bias={token: float(bias) for token, bias in (params.logit_bias or {}).items()},
        allowed_token_ids=list(params.allowed_token_ids or ()),
        bad_words=[ids for word in params.bad_words or () for ids in encode_word(word)],
        logprobs=0 if params.logprobs is None and _ranks(params) else params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def _ranks(params: SamplingParams) -> bool:
    return not params.use_beam_search and params.num_candidates > params.n


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"{name}: {token!r} is not a token id of this model (0 to {vocab_size - 1})")


class Collector:
    """Receives one request's events and fills its RequestOutput."""

    def __init__(
        self,
        request: AddRequest,
        text: str | None,
        params: SamplingParams,
        vocabulary: Vocabulary,
    ) -> None:
        self._params = params
        self._vocabulary = vocabulary
        self._pipelines = [self._pipeline(request.prompt) for _ in range(request.n)]
        self._sums = [0.0] * request.n  # of log-probabilities
        logprobs = params.logprobs is not None
        self._choices = [
            CompletionOutput(index=i, logprobs=[] if logprobs else None) for i in range(request.n)
        ]
        self.output = RequestOutput(str(request.id), text, list(request.prompt), list(self._choices))

    def _pipeline(self, prompt: Sequence[int]) -> TextPipeline | None:
        if not self._params.detokenize:
            return None
        return TextPipeline.create(
            self._vocabulary,
            prompt,
            skip_special_tokens=self._params.skip_special_tokens,
            spaces_between_special_tokens=self._params.spaces_between_special_tokens,
            stop=self._params.stop_strings,
            include_stop=self._params.include_stop_str_in_output,
            min_tokens=self._params.min_tokens,
        )

    @property
    def done(self) -> bool:
        return self.output.finished

    def on_started(self, cached_tokens: int, rows: Logprobs | None) -> None:
        self.output.num_cached_tokens = cached_tokens
        if rows is not None:
            ids = self.output.prompt_token_ids
            self.output.prompt_logprobs = [
                None if math.isnan(rows.logprobs[i]) else self._alternatives(token, rows, i)
                for i, token in enumerate(ids)
            ]

    def on_token(self, choice: int, token: int, row: Logprobs | None, *, is_end: bool) -> None:
        """is_end: the token is the end of sequence, whose text is shown only with special tokens."""
        output, pipeline = self._choices[choice], self._pipelines[choice]
        if output.finish_reason is not None:
            return  # a stop string ended the choice; the core learns it when all choices have ended
        output.token_ids.append(token)
        if row is not None:
            self._sums[choice] += row.logprobs[0]
        if row is not None and output.logprobs is not None:
            output.logprobs.append(self._alternatives(token, row, 0))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + row.logprobs[0]
        if pipeline is None or (is_end and self._params.skip_special_tokens):
            return
        output.text += pipeline.feed(token)
        if pipeline.hit is not None:
            self._end(output, "stop", pipeline.hit)

    def on_finish(self, finish: Finish) -> None:
        output, pipeline = self._choices[finish.choice], self._pipelines[finish.choice]
        if output.finish_reason is not None:
            return
        if pipeline is not None:
            output.text += pipeline.flush()
            if pipeline.hit is not None:
                self._end(output, "stop", pipeline.hit)
                return
        if finish.reason == LENGTH:
            self._end(output, "length", None)
        else:
            self._end(output, "stop", None if finish.stopped_by_eos else finish.stop_token_id)

    def _end(self, output: CompletionOutput, reason: str, stop_reason: int | str | None) -> None:
        output.finish_reason = reason
        output.stop_reason = stop_reason
        self.output.finished = all(choice.finish_reason for choice in self._choices)
        if self.output.finished and _ranks(self._params):
            self._rank()

    def _rank(self) -> None:
        """Leaves the n best by the mean log-probability of their tokens; of equal ones the first."""
        candidates = self._choices
        means = [
            total / max(1, len(own.token_ids)) for total, own in zip(self._sums, candidates, strict=True)
        ]
        best = sorted(range(len(candidates)), key=lambda index: -means[index])[: self._params.n]
        self.output.outputs = [candidates[index] for index in best]
        for place, choice in enumerate(self.output.outputs):
            choice.index = place

    def _alternatives(self, token: int, rows: Logprobs, index: int) -> dict[int, Logprob]:
        """The token itself first, then the best ones by rank."""
        width = rows.num_alternatives
        found = {token: self._logprob(token, rows.logprobs[index], rows.ranks[index])}
        for place in range(width):
            other = rows.alternative_ids[index * width + place]
            value = rows.alternative_logprobs[index * width + place]
            found.setdefault(other, self._logprob(other, value, place + 1))
        return found

    def _logprob(self, token: int, value: float, rank: int) -> Logprob:
        return Logprob(value, rank, self._vocabulary.text(token))
