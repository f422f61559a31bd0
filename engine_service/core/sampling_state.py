"""What the sampler keeps for a sequence: its parameters in the form the kernels take, and its random stream.

Everything follows from the request and `token_ids`, so it can be dropped and made again at any time.
Knows numpy arrays and Python numbers, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.engine_service.core.logit_edits import Ids, LogitEdits, Penalties
from penstock.engine_service.core.messages import RequestError, Sampling
from penstock.engine_service.core.penalties import TokenCounts
from penstock.engine_service.core.request import Sequence

_GREEDY_BELOW = 1e-5  # temperatures under it are 0
_UINT64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SEEDED, _UNSEEDED = 1, 2  # keep the streams of a seed and of an equal engine seed apart
_NO_IDS: Ids = np.empty(0, np.int64)


@dataclass(slots=True)
class SamplingState:
    """One sequence's parameters. `top_k` is 0 for all; `stream` starts its random numbers."""

    greedy: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stream: int
    penalties: Penalties | None
    bias_ids: Ids
    bias: NDArray[np.float32]
    allowed: Ids
    banned: Ids  # never to be chosen
    phrases: list[tuple[list[int], int]]  # (all but the last id, the last id) of bad words of two ids or more
    constrained: bool  # edited by a mask at every step, which is not made here
    min_new_tokens: int
    end_ids: Ids  # banned until min_new_tokens
    _always_edited: bool = field(init=False)

    def __post_init__(self) -> None:
        self._always_edited = self.penalties is not None or bool(
            self.bias_ids.size or self.allowed.size or self.banned.size
        )

    @classmethod
    def create(cls, sequence: Sequence, vocab_size: int, engine_seed: int) -> SamplingState:
        """Raises RequestError (invalid_value) for an id outside [0, vocab_size)."""
        params, sampling = sequence.request.params, sequence.sampling
        words = [word for word in sampling.bad_words if word]
        _checked([token for word in words for token in word], vocab_size, "bad_words")
        _checked(sampling.logprob_token_ids, vocab_size, "logprob_token_ids")
        ends = {*params.eos_token_ids, *params.stop_token_ids}
        return cls(
            greedy=_is_greedy(sampling.temperature, sampling.top_k, sampling.min_p),
            temperature=sampling.temperature,
            top_k=sampling.top_k if 0 < sampling.top_k < vocab_size else 0,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stream=_stream(sequence, engine_seed),
            penalties=_penalties(sampling, vocab_size),
            bias_ids=_checked(list(sampling.logit_bias), vocab_size, "logit_bias"),
            bias=np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias)),
            allowed=np.unique(_checked(sampling.allowed_token_ids, vocab_size, "allowed_token_ids")),
            banned=np.unique(np.array([word[0] for word in words if len(word) == 1], np.int64)),
            phrases=[(word[:-1], word[-1]) for word in words if len(word) > 1],
            constrained=params.constraint is not None,
            min_new_tokens=params.min_new_tokens,
            end_ids=np.array(sorted(token for token in ends if 0 <= token < vocab_size), np.int64),
        )

    @property
    def filtered(self) -> bool:
        """Whether top_k, top_p or min_p remove anything."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def always_plain(self, position: int) -> bool:
        """Whether no output token from `position` on is edited or drawn."""
        edited = (
            self._always_edited or self.constrained or bool(self.phrases) or position < self.min_new_tokens
        )
        return self.greedy and not edited

    def edits(self, sequence: Sequence, position: int) -> LogitEdits | None:
        """The changes to the logits of the output token at `position`, None if there are none."""
        banned = self._banned_now(sequence, position)
        if not (self._always_edited or banned.size):
            return None
        if self.penalties is not None:
            self.penalties.counts.update(sequence.token_ids, sequence.num_prompt_tokens)
        return LogitEdits(self.penalties, self.bias_ids, self.bias, self.allowed, banned)

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) for the output token at `position`.

        53 bits of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
        """
        return (_scramble(self.stream + (position + 1) * _GOLDEN) >> 11) * 2.0**-53

    def nothing_left(self) -> RequestError:
        """The error of a request whose masks removed every token, naming the narrowest of its parameters."""
        if self.constrained:
            return RequestError("invalid_value", "The constraint and the other parameters leave no token.")
        if self.allowed.size:
            param = "allowed_token_ids"
        elif self.banned.size or self.phrases:
            param = "bad_words"
        else:
            param = "min_tokens"
        return RequestError("invalid_value", "No token is left to choose from.", param)

    def _banned_now(self, sequence: Sequence, position: int) -> Ids:
        if not self.phrases and position >= self.min_new_tokens:
            return self.banned
        longest = max((len(prefix) for prefix, _ in self.phrases), default=0)
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        tokens = output[max(0, len(output) - longest) :].tolist()
        completing = [last for prefix, last in self.phrases if tokens[-len(prefix) :] == prefix]
        ends = self.end_ids if position < self.min_new_tokens else _NO_IDS
        return np.concatenate([self.banned, np.array(completing, np.int64), ends])


def needs_host_tokens(sequence: Sequence) -> bool:
    """Whether the choice of a token depends on the ids before it: through penalties, bad words of several, or
    a constraint."""
    return sequence.request.params.constraint is not None or edits_by_output(sequence)


def edits_by_output(sequence: Sequence) -> bool:
    """Whether edits that are not a mask depend on the ids of the output: they are made for one row a step."""
    sampling = sequence.sampling
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or any(len(word) > 1 for word in sampling.bad_words)
    )


def _is_greedy(temperature: float, top_k: int, min_p: float) -> bool:
    # One token, or the best and its equals: the lowest of them, as with temperature 0.
    return temperature < _GREEDY_BELOW or top_k == 1 or min_p >= 1.0


def _penalties(sampling: Sampling, vocab_size: int) -> Penalties | None:
    repeats = sampling.repetition_penalty != 1.0
    if not repeats and sampling.presence_penalty == 0.0 and sampling.frequency_penalty == 0.0:
        return None
    return Penalties(
        TokenCounts(vocab_size, include_prompt=repeats),
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )


def _checked(token_ids: list[int], vocab_size: int, param: str) -> Ids:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError("invalid_value", f"Token id {token} is outside the vocabulary.", param)
    return np.array(token_ids, np.int64)


def _stream(sequence: Sequence, engine_seed: int) -> int:
    seed = sequence.sampling.seed
    if seed is not None:
        return _fold(_SEEDED, seed, sequence.choice)
    return _fold(_UNSEEDED, engine_seed, sequence.request.id, sequence.choice)


def _fold(*numbers: int) -> int:
    """One 64-bit number that depends on every bit of each of `numbers`."""
    state = 0
    for number in numbers:
        state = _scramble((state + _GOLDEN) ^ _scramble(number))
    return state


def _scramble(number: int) -> int:
    """SplitMix64's mixing function: a bijection on 64 bits."""
    z = number & _UINT64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _UINT64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _UINT64
    return z ^ (z >> 31)
