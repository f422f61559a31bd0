"""The text side of one choice: detokenize, look for stop strings, and show the text to a sink that reads
reasoning and tool calls from it. Knows no requests and no events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from penstock.frontend.text.detokenize import Detokenizer, make_detokenizer
from penstock.frontend.text.options import TextOptions, TextSink
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
        "_sink",
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
        sink: TextSink | None = None,
    ) -> None:
        """min_tokens: text of the first so many tokens is not searched. tight_special: texts of special
        tokens that follow one another without spaces, None: as the tokenizer writes them. sink: is shown
        every text that comes out."""
        self._detokenizer = detokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._special = tight_special or {}
        self._last_was_special = False
        self.hit: str | None = None
        decode = self._decode_tight if tight_special else detokenizer.feed
        feed: Callable[[int], str] = self._searching(decode, stop) if stop else decode
        self._sink = sink
        self.feed: Callable[[int], str] = feed if sink is None else _showing(feed, sink)

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
        sink: TextSink | None = None,
        shown_special: Sequence[str] = (),
    ) -> TextPipeline:
        """shown_special: special tokens that are shown although the others are skipped."""
        tight = not skip_special_tokens and not spaces_between_special_tokens
        return cls(
            make_detokenizer(
                vocabulary,
                prompt_ids,
                skip_special_tokens,
                vocabulary.special_among(shown_special) if shown_special else frozenset(),
            ),
            StopStrings(stop, include_stop) if stop else None,
            min_tokens,
            vocabulary.special_text if tight else None,
            sink,
        )

    @classmethod
    def of(
        cls,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        options: TextOptions,
        choice: int,
        min_tokens: int,
    ) -> TextPipeline:
        """The pipeline of one of a request's choices."""
        return cls.create(
            vocabulary,
            prompt_ids,
            skip_special_tokens=options.skip_special_tokens,
            spaces_between_special_tokens=options.spaces_between_special_tokens,
            stop=options.stop,
            include_stop=options.include_stop,
            min_tokens=min_tokens,
            sink=options.sinks[choice] if options.sinks else None,
            shown_special=options.shown_special,
        )

    @property
    def at_start(self) -> bool:
        return self._detokenizer.at_start

    def flush(self) -> str:
        """What is left when the choice has ended: an unfinished character and text held back. May hit."""
        text = self._detokenizer.flush()
        if self._stop is not None:
            text = self._stop.feed(text)
            self.hit = self._stop.hit
            if self.hit is None:
                text += self._stop.flush()
        if self._sink is not None:
            self._sink.add(text, 0)
        return text

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


def _showing(feed: Callable[[int], str], sink: TextSink) -> Callable[[int], str]:
    def feed_and_show(token_id: int) -> str:
        text = feed(token_id)
        sink.add(text, 1)
        return text

    return feed_and_show
