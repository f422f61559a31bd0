"""How models write reasoning, by name: what parses it, and the grammar of what may stand before an answer of
a given form. Knows no tokens and no requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.frontend.text.channels import ANALYSIS, FINAL, ChannelParser
from penstock.frontend.text.reasoning import ReasoningParser
from penstock.frontend.text.tools import grammar, harmony, kimi_k2


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A pair of tags. implied: the output begins inside the reasoning even where neither prompt nor model
    wrote the tag. interrupt: a mark that ends the reasoning too, "" for none."""

    opening: str
    closing: str
    implied: bool = False
    interrupt: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that are shown to the parser even where they are special tokens."""
        return self.opening, self.closing

    @property
    def answer_mark(self) -> str:
        """The text behind which the answer begins."""
        return self.closing

    def parser(self, *, inside: bool, may_open: bool = True) -> ReasoningParser | ChannelParser:
        """inside: the output begins inside the reasoning. may_open: it may begin with the opening tag."""
        return ReasoningParser(self.opening, self.closing, self.interrupt, inside=inside, may_open=may_open)

    def thought(self, lark: grammar.Lark) -> str:
        """What may come before an answer or a call."""
        return grammar.thought(lark, self.opening, self.closing)

    def lead(self, lark: grammar.Lark) -> str:
        """What must come before an answer that is no call, behind the thought; "" for nothing."""
        return ""


class HarmonyFormat(ReasoningFormat):
    """Channels: reasoning and remarks are messages of their own, and so is the answer."""

    __slots__ = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return harmony.MARKS

    @property
    def answer_mark(self) -> str:
        return FINAL + harmony.MESSAGE

    def parser(self, *, inside: bool, may_open: bool = True) -> ReasoningParser | ChannelParser:
        return ChannelParser(inside=inside, may_open=may_open)

    def thought(self, lark: grammar.Lark) -> str:
        # No remarks: they are content, and an answer of a given form is to be that alone.
        return f"({lark.text(self.opening)} {lark.until(harmony.NEXT)})*"

    def lead(self, lark: grammar.Lark) -> str:
        return lark.text(self.answer_mark)


_THINK = ReasoningFormat("<think>", "</think>")
_HARMONY = HarmonyFormat(ANALYSIS + harmony.MESSAGE, harmony.END)

REASONING_PARSERS: dict[str, ReasoningFormat] = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", implied=True),
    "qwen3": _THINK,
    "think": _THINK,
    "glm45": _THINK,
    "kimi_k2": ReasoningFormat("<think>", "</think>", interrupt=kimi_k2.SECTION_BEGIN),
    "minimax_m2": _THINK,
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
    "openai_gptoss": _HARMONY,
    "harmony": _HARMONY,
}
_PAIR = "tags:"


def find_format(name: str) -> ReasoningFormat | None:
    """By name, or a pair of tags of one's own as `tags:OPENING,CLOSING`. None: there is none of that name."""
    if name.startswith(_PAIR):
        opening, _, closing = name.removeprefix(_PAIR).partition(",")
        return ReasoningFormat(opening, closing) if opening and closing else None
    return REASONING_PARSERS.get(name)
