"""The text side of one choice: detokenize, then look for stop strings. Knows no requests and no events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from penstock.frontend.text.detokenize import Detokenizer, make_detokenizer
from penstock.frontend.text.stop import StopStrings
from penstock.frontend.text.vocabulary import Vocabulary


class TextPipeline:
    """feed(token id) -> text, flush() -> text; `hit` is the stop string found, None until then.

    feed is chosen once, so that a choice pays only for what its request asked for.
    """

    __slots__ = (
        "_detokenizer",
        "_last_was_special",
        "_min_tokens",
        "_num_tokens",
        "_special",
        "_stop",
        "feed",
        "hit",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: StopStrings | None,
        min_tokens: int = 0,
        tight_special: Mapping[int, str] | None = None,
    ) -> None:
        """min_tokens: text of the first so many tokens is not searched. tight_special: texts of special
        tokens that follow one another without spaces, None: as the tokenizer writes them."""
        self._detokenizer = detokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._special = tight_special or {}
        self._last_was_special = False
        self.hit: str | None = None
        decode = self._decode_tight if tight_special else detokenizer.feed
        self.feed: Callable[[int], str] = self._searching(decode, stop) if stop else decode

    @classmethod
    def create(
        cls,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> TextPipeline:
        tight = not skip_special_tokens and not spaces_between_special_tokens
        return cls(
            make_detokenizer(vocabulary, prompt_ids, skip_special_tokens),
            StopStrings(stop, include_stop) if stop else None,
            min_tokens,
            vocabulary.special_text if tight else None,
        )

    @property
    def at_start(self) -> bool:
        return self._detokenizer.at_start

    def flush(self) -> str:
        """What is left when the choice has ended: an unfinished character and text held back. May hit."""
        rest = self._detokenizer.flush()
        if self._stop is None:
            return rest
        text = self._stop.feed(rest)
        self.hit = self._stop.hit
        return text if self.hit is not None else text + self._stop.flush()

    def _searching(self, decode: Callable[[int], str], stop: StopStrings) -> Callable[[int], str]:
        def feed(token_id: int) -> str:
            text = decode(token_id)
            self._num_tokens += 1
            if self._num_tokens <= self._min_tokens:
                return text
            if text:
                text = stop.feed(text)
                self.hit = stop.hit
            return text

        return feed

    def _decode_tight(self, token_id: int) -> str:
        text = self._detokenizer.feed(token_id)
        content = self._special.get(token_id)
        if content is not None and self._last_was_special and text.endswith(content):
            text = text[: -len(content)].rstrip(" ") + content
        self._last_was_special = content is not None
        return text
