"""How the answers to one chat request are read: which parsers, and the grammar where calls are forced or
strict.

Knows the request and what the template told of its model; knows no wire format.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import orjson

from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.constraint import Asked
from penstock.frontend.api.tool_use import ToolUse
from penstock.frontend.text.message import MessageParser
from penstock.frontend.text.parsers import AUTO, NONE, ParserNames
from penstock.frontend.text.reasoning_formats import ReasoningFormat, find_format
from penstock.frontend.text.tools import FALLBACK, TOOL_PARSERS, ToolParser, grammar
from penstock.frontend.text.vocabulary import Vocabulary
from penstock.protos import engine_pb2, tokenizer_pb2
from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.frontend.reading")


@dataclass(frozen=True, slots=True)
class Reading:
    """messages: one per sequence of the engine; with best_of the answer's choices come first once they are
    chosen. shown: marks that the parsers need to see."""

    messages: list[MessageParser]
    shown: tuple[str, ...]
    named: bool
    legacy: bool

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(message.num_reasoning_tokens for message in self.messages)

    def choose(self, best: Sequence[int]) -> None:
        """best: the sequences that become the choices, in order."""
        rest = [index for index in range(len(self.messages)) if index not in best]
        self.messages[:] = [self.messages[index] for index in (*best, *rest)]

    def finish_reason(self, choice: int, reason: str) -> str:
        """As clients know it: calls that the model chose to make have a reason of their own."""
        if reason != "stop" or self.named or not self.messages[choice].num_calls:
            return reason
        return "function_call" if self.legacy else "tool_calls"


class ReadingPlan:
    """The parsers for one request. `constrained` comes before `reading`: it may change the parser."""

    def __init__(
        self,
        names: ParserNames,
        request: ChatRequest,
        use: ToolUse | None,
        rendered: tokenizer_pb2.RenderResponse,
        vocabulary: Vocabulary,
    ) -> None:
        """Raises ApiError: tools that the operator has turned off."""
        self._use = use
        self._include_reasoning = request.include_reasoning is not False
        self._vocabulary = vocabulary
        self._tool_parser = _tool_parser(names.tools, use, rendered.tool_parser)
        self._reasoning = _reasoning_format(names.reasoning, rendered.reasoning_parser)
        continued = bool(request.continue_final_message)
        self._inside = rendered.ends_in_reasoning
        if (
            self._reasoning is not None
            and self._reasoning.implied
            and names.reasoning != AUTO
            and not continued
        ):
            self._inside = True
        self._may_open = not continued

    def constrained(self, asked: Asked | None) -> Asked | None:
        """The request's constraint, or the one that its tools make, so that it leaves room for reasoning and
        calls. asked: by other fields. Raises ApiError when they exclude each other."""
        use, parser = self._use, self._tool_parser
        if use is not None and use.must_call and asked is not None:
            choice = "function_call" if use.legacy else "tool_choice"
            raise ApiError(
                "invalid_value", f"'{asked.param}' and a forced '{choice}' exclude each other.", asked.param
            )
        made = asked
        answer = None if asked is None else _json_schema(asked.constraint)
        limits_calls = use is not None and (use.must_call or use.has_strict) and asked is None
        if use is not None and parser is not None and (limits_calls or answer is not None):
            param = use.param if asked is None else asked.param
            made = Asked(engine_pb2.Constraint(grammar=self._grammar(use, parser, answer)), param)
        elif asked is not None:
            lark = self._lark(None)
            before = f"{self._thought(lark)} {self._lead(lark)}".strip()
            if before:
                asked.constraint.preamble = lark.written(before)
        if made is not None and self._reasoning is not None and self._inside:
            del made.constraint.starts_after[:]
            made.constraint.starts_after.extend(self._ids(self._reasoning.answer_mark))
        return made

    def reading(self, n: int) -> Reading | None:
        """n: sequences of the engine. None: the answer's text is its content."""
        use, form = self._use, self._reasoning
        if self._tool_parser is None and form is None:
            return None
        tools = use.tools() if use is not None else None
        messages = [
            MessageParser(
                None if form is None else form.parser(inside=self._inside, may_open=self._may_open),
                None if self._tool_parser is None or tools is None else self._tool_parser(tools),
                include_reasoning=self._include_reasoning,
                one_call=use is not None and use.one_call,
            )
            for _ in range(n)
        ]
        shown = self._tool_parser.marks if self._tool_parser is not None else ()
        if form is not None:
            shown += form.marks
        return Reading(
            messages,
            shown,
            named=use is not None and use.mode == "named",
            legacy=use is not None and use.legacy,
        )

    # ------------------------------------------------------------------------------------- parts

    @property
    def _thinks_first(self) -> bool:
        """Whether the model may write a whole reasoning block before its answer."""
        return self._reasoning is not None and not self._inside and self._may_open

    def _grammar(self, use: ToolUse, parser: type[ToolParser], answer: Mapping[str, object] | None) -> str:
        lark = self._lark(parser)
        form = parser.form(lark)
        if form is None:
            parser = self._tool_parser = TOOL_PARSERS[FALLBACK]
            form = parser.form(lark)
        if form is None:
            raise ApiError("internal_error", "The fallback of tool calls has no grammar.")
        calls = []
        for function in use.functions:
            strict = bool(function.strict)
            known = function.parameters if strict or use.must_call else {"additionalProperties": True}
            calls.append(parser.call(lark, function.name, grammar.arguments_schema(known, strict)))
        thought = self._thought(lark)
        if use.must_call:
            return grammar.forced(lark, form, calls, one=use.one_call, thought=thought)
        lead = self._lead(lark)
        return grammar.optional(
            lark, form, calls, one=use.one_call, thought=thought, lead=lead, answer=answer
        )

    def _lark(self, parser: type[ToolParser] | None) -> grammar.Lark:
        marks = parser.marks if parser is not None else ()
        if self._reasoning is not None:
            marks += self._reasoning.marks
        return grammar.Lark(self._vocabulary.added_ids, marks)

    def _thought(self, lark: grammar.Lark) -> str:
        if self._reasoning is None:
            return ""
        if not self._thinks_first:
            return grammar.AFTER_THOUGHT if self._inside else ""
        return self._reasoning.thought(lark)

    def _lead(self, lark: grammar.Lark) -> str:
        return self._reasoning.lead(lark) if self._reasoning is not None and self._thinks_first else ""

    def _ids(self, text: str) -> list[int]:
        found = self._vocabulary.added_ids.get(text)
        if found is not None:
            return [found]
        return list(self._vocabulary.tokenizer.encode(text, add_special_tokens=False).ids)


def _tool_parser(chosen: str, use: ToolUse | None, suggested: str) -> type[ToolParser] | None:
    if use is None:
        return None
    if chosen == NONE:
        raise ApiError("unsupported_parameter", f"'{use.param}' is turned off on this server.", use.param)
    name = suggested if chosen == AUTO else chosen
    if name and name not in TOOL_PARSERS:
        _warn_of(name)
    return TOOL_PARSERS.get(name, TOOL_PARSERS[FALLBACK])


@cache
def _warn_of(name: str) -> None:
    log.warning("no parser reads the calls of this template (%s): they stay content", name)


def _reasoning_format(chosen: str, suggested: str) -> ReasoningFormat | None:
    if chosen == NONE:
        return None
    return find_format(suggested if chosen == AUTO else chosen)


def _json_schema(constraint: engine_pb2.Constraint) -> Mapping[str, object] | None:
    """The schema that the answer must fit, as a part of a grammar; None where it is something else."""
    kind = constraint.WhichOneof("kind")
    if kind not in ("json_object", "json_schema"):
        return None
    schema = {"type": "object"} if kind == "json_object" else orjson.loads(constraint.json_schema)
    spaces = constraint.whitespace_pattern if constraint.HasField("whitespace_pattern") else None
    return grammar.json_schema(schema, spaces)
