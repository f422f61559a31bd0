"""One chat answer as a message: reasoning, content and calls, made from its text as it comes. Knows no
tokens' ids, no request types and no wire format.
"""

from __future__ import annotations

from penstock.frontend.text.channels import ChannelParser
from penstock.frontend.text.reasoning import ReasoningParser
from penstock.frontend.text.tools import ToolParser
from penstock.frontend.text.tools.events import Arguments, CallStart, Content, Event, Reasoning


class MessageParser:
    """A sink of the text pipeline; `take` and `finish` give what has become certain.

    num_reasoning_tokens: tokens whose text was reasoning, the tags not counted. num_calls: calls given out.
    """

    __slots__ = ("_events", "_include_reasoning", "_one_call", "_reasoning", "_tools", "num_reasoning_tokens")

    def __init__(
        self,
        reasoning: ReasoningParser | ChannelParser | None,
        tools: ToolParser | None,
        *,
        include_reasoning: bool = True,
        one_call: bool = False,
    ) -> None:
        """include_reasoning: false drops it. one_call: only the first call is given out."""
        self._reasoning = reasoning
        self._tools = tools
        self._include_reasoning = include_reasoning
        self._one_call = one_call
        self._events: list[Event] = []
        self.num_reasoning_tokens = 0

    @property
    def num_calls(self) -> int:
        if self._tools is None:
            return 0
        return min(self._tools.num_calls, 1) if self._one_call else self._tools.num_calls

    @property
    def invalid(self) -> bool:
        """Whether a call could not be read. True only after `finish` for one that was cut off."""
        return self._tools is not None and self._tools.invalid

    def add(self, text: str, num_tokens: int) -> None:
        """The text of so many tokens."""
        reasoning = self._reasoning
        if reasoning is None or reasoning.outside:
            if text:
                self._add_content(text)
            return
        was_inside = reasoning.inside
        thought, content = reasoning.feed(text) if text else ("", "")
        if was_inside and reasoning.inside:
            self.num_reasoning_tokens += num_tokens
        self._add(thought, content)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """The text has ended: what was held back too."""
        if self._reasoning is not None:
            self._add(*self._reasoning.flush())
        if self._tools is not None:
            self._keep(self._tools.flush())
        return self.take()

    def _add(self, thought: str, content: str) -> None:
        if thought and self._include_reasoning:
            self._events.append(Reasoning(thought))
        if content:
            self._add_content(content)

    def _add_content(self, text: str) -> None:
        if self._tools is None:
            self._events.append(Content(text))
        else:
            self._keep(self._tools.feed(text))

    def _keep(self, events: list[Event]) -> None:
        if self._one_call:
            events = [e for e in events if not isinstance(e, CallStart | Arguments) or e.index == 0]
        self._events.extend(events)
