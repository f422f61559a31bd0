"""Cuts the texts of a score template's prompts, so that what the template writes around them stays whole.
Knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.frontend.pooled import PooledCalls
from penstock.frontend.score_template import ScoreTemplate
from penstock.protos.errors import ApiError

Pair = tuple[str, str]
Spans = Sequence[tuple[int, int]]

# A cut can change how the tokens beside it are formed: then a little more is taken off.
_MAX_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class TemplateFit:
    """limit: tokens of a prompt. keep_last: of a text that is cut the end stays, not the beginning."""

    template: ScoreTemplate
    instruction: str | None
    limit: int
    keep_last: bool

    async def prompts(self, calls: PooledCalls, pairs: Sequence[Pair]) -> list[str]:
        """One for each pair. Where it would be too long the pair is cut as all pairs are, one token at a time
        from the longer side. Raises ApiError where the template alone is too long."""
        kept = list(pairs)
        prompts = [self._prompt(pair) for pair in kept]
        places = list(range(len(kept)))
        for _ in range(_MAX_ROUNDS):
            spans = await calls.token_spans([prompts[place] for place in places])
            over = {place: len(own) - self.limit for place, own in zip(places, spans, strict=True)}
            places = [place for place in places if over[place] > 0]
            if not places:
                return prompts
            sides = await calls.token_spans([text for place in places for text in kept[place]])
            for place, first, second in zip(places, sides[::2], sides[1::2], strict=True):
                kept[place] = self._shorter(kept[place], first, second, over[place])
                prompts[place] = self._prompt(kept[place])
        raise self._no_room()

    def _prompt(self, pair: Pair) -> str:
        return self.template.prompt(*pair, self.instruction)

    def _shorter(self, pair: Pair, first: Spans, second: Spans, tokens: int) -> Pair:
        room = len(first) + len(second) - tokens
        if room < 0:
            raise self._no_room()
        left, right = _shares(len(first), len(second), room)
        return _cut(pair[0], first, left, self.keep_last), _cut(pair[1], second, right, self.keep_last)

    def _no_room(self) -> ApiError:
        message = f"The score template does not fit into {self.limit} tokens."
        return ApiError("context_length_exceeded", message, "prompt")


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that each side keeps."""
    if first <= second:
        left = min(first, room // 2)
        return left, min(second, room - left)
    right = min(second, room // 2)
    return min(first, room - right), right


def _cut(text: str, spans: Spans, keep: int, keep_last: bool) -> str:
    if keep >= len(spans):
        return text
    if keep <= 0:
        return ""
    return text[spans[-keep][0] :] if keep_last else text[: spans[keep - 1][1]]
