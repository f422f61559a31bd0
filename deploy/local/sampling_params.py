"""How text is generated offline: the parameters by the names users know from other engines, checked at once.

Knows no engine; the translation to the core's own form is in `offline.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penstock.frontend.api.ranking import MAX_BEAMS, NEUTRAL
from penstock.local.offline_constraint import constraint_of
from penstock.local.offline_kinds import is_whole, whole

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
_INT64 = 2**63
_SWITCHES = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "use_beam_search",
)
_LISTS = ("stop_token_ids", "bad_words", "allowed_token_ids", "guided_choice")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Raises ValueError that begins with the parameter's name for a value out of range, and for a feature
    that is not served: logits_processors, and with beam search what changes probabilities.

    temperature: [0, 2], 0 is greedy. top_p: (0, 1]. top_k: -1 or 0 for all. min_p: [0, 1]. penalties:
    presence and frequency [-2, 2], repetition (0, 2]. seed: the same seed gives the same tokens in any batch;
    -1 is none.
    max_tokens: per choice, None to the end of the context. min_tokens: bans end-of-sequence and stop tokens
    until reached. logprobs, prompt_logprobs: alternatives per token, 0..20. truncate_prompt_tokens: keeps
    the last so many. best_of: so many candidates, of which the n of the highest mean log-probability come
    back, best first; a stop string ends a candidate also here. use_beam_search: with best_of or else n
    beams, at most 32; length_penalty: exponent on the length, [-5, 5]; early_stopping: true, false, "never".
    structured_outputs (or guided_decoding, its older name): a mapping, or an object with such attributes, of
    one of json, regex, choice, grammar, json_object, structural_tag, and beside it whitespace_pattern,
    disable_any_whitespace, disable_additional_properties. guided_json and the others: the same as over HTTP.
    A json is a schema, its text or a pydantic type. Not with beam search.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    structured_outputs: Any = None
    guided_decoding: Any = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Sequence[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None
    logits_processors: Any = None

    def __post_init__(self) -> None:
        if self.logits_processors:
            raise ValueError("logits_processors: not supported by this version")
        self._check_kinds()
        _whole("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            _whole("best_of", self.best_of, self.n, MAX_BEAMS if self.use_beam_search else MAX_N)
        _real("length_penalty", self.length_penalty, -5, 5)
        self._check_beams()
        _real("temperature", self.temperature, 0, 2)
        _real("top_p", self.top_p, 0, 1, low_allowed=False)
        _whole("top_k", self.top_k, -1, 2**31 - 1)
        _real("min_p", self.min_p, 0, 1)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        _real("repetition_penalty", self.repetition_penalty, 0, 2, low_allowed=False)
        if self.seed is not None:
            _whole("seed", self.seed, -_INT64, _INT64 - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        highest = 2**31 - 1 if self.max_tokens is None else self.max_tokens
        _whole("min_tokens", self.min_tokens, 0, highest)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens is not None:
            _whole("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 2**31 - 1)
        self._check_lists()
        self._check_constraint()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_candidates(self) -> int:
        return max(self.n, self.best_of or 1)

    def _check_kinds(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: must be true or false")
        if not isinstance(self.guided_json_object, bool | None):
            raise ValueError("guided_json_object: must be true or false")
        for name in _LISTS:
            if getattr(self, name) is not None and not _is_list(getattr(self, name)):
                raise ValueError(f"{name}: must be a list")
        if not (self.stop is None or isinstance(self.stop, str) or _is_list(self.stop)):
            raise ValueError("stop: must be a string or a list of strings")
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError("logit_bias: must be a mapping of token ids to numbers")

    def _check_beams(self) -> None:
        if self.early_stopping not in (True, False, "never"):
            raise ValueError("early_stopping: true, false or 'never'")
        if not self.use_beam_search:
            for name, off in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != off:
                    raise ValueError(f"{name}: needs use_beam_search")
            return
        _whole("n", self.n, 1, MAX_BEAMS)
        for name, neutral in NEUTRAL.items():
            if getattr(self, name) not in neutral:
                raise ValueError(f"{name}: not supported with beam search")
        for name in ("logit_bias", "allowed_token_ids", "bad_words"):
            if getattr(self, name):
                raise ValueError(f"{name}: not supported with beam search")

    def _check_lists(self) -> None:
        stops = self.stop_strings
        if any(not isinstance(text, str) or not text for text in stops):
            raise ValueError("stop: each stop string is a string of at least one character")
        if len(stops) > MAX_STOP_STRINGS:
            raise ValueError(f"stop: at most {MAX_STOP_STRINGS} strings")
        if stops and not self.detokenize:
            raise ValueError("stop: stop strings need detokenize")
        words = self.bad_words or ()
        if any(not isinstance(word, str) or not word for word in words):
            raise ValueError("bad_words: a list of strings of at least one character")
        if len(words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words: at most {MAX_BAD_WORDS} strings")
        for name in ("stop_token_ids", "allowed_token_ids"):
            if any(not is_whole(token) or token < 0 for token in getattr(self, name) or ()):
                raise ValueError(f"{name}: token ids are whole numbers from 0")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids: at least one id")
        biases = self.logit_bias or {}
        if len(biases) > MAX_BIASES:
            raise ValueError(f"logit_bias: at most {MAX_BIASES} entries")
        for token, bias in biases.items():
            if not is_whole(token) or token < 0:
                raise ValueError("logit_bias: its keys are token ids")
            _real("logit_bias", bias, -100, 100)

    def _check_constraint(self) -> None:
        asked = constraint_of(self)
        if asked is not None and self.use_beam_search:
            raise ValueError(f"{asked.param}: not supported with beam search")


def _is_list(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not low <= whole(name, value) <= high:
        raise ValueError(f"{name}: must be between {low} and {high}, not {value}")


def _real(name: str, value: object, low: float, high: float, *, low_allowed: bool = True) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}: must be a finite number")
    if not (low <= value if low_allowed else low < value) or value > high:
        bound = "from" if low_allowed else "above"
        raise ValueError(f"{name}: must be {bound} {low} to {high}, not {value}")
