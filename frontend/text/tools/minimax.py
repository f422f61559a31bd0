"""MiniMax M2: one `<minimax:tool_call>` around all calls, each of them
`<invoke name="..."><parameter name="...">value</parameter></invoke>`. Values are bare
text; the schema says what they mean.
"""

from __future__ import annotations

from penstock.frontend.text.tools import typed
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark, Schema, properties_of
from penstock.frontend.text.tools.qwen3_xml import Qwen3Xml


class MiniMax(Qwen3Xml):
    opening, closing = "<minimax:tool_call>", "</minimax:tool_call>"
    function, function_end = "<invoke name=", "</invoke>"
    parameter, parameter_end = "<parameter name=", "</parameter>"
    marks = (opening, closing)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return CallForm(Around(f"{cls.opening}\n", "\n", f"\n{cls.closing}"), cls.opening)

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        parts = [lark.text(f'{cls.function}"{name}">\n')]
        for key, part, required in properties_of(schema):
            opening = lark.text(f'{cls.parameter}"{key}">')
            rule = lark.rule(f"{opening} {typed.grammar(lark, part, cls.parameter_end + chr(10))}")
            parts.append(rule if required else rule + "?")
        parts.append(lark.text(cls.function_end))
        return " ".join(parts)
