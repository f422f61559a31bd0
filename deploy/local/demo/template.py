"""The demonstration model's prompt format, as a chat template and as trained pieces; knows no corpus."""

from __future__ import annotations

import json
from typing import Any

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
MARKUP_TOKENS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Single tokens that stay visible in decoded text, since parsers of tool calls look for them."""

TOOLS_INTRODUCTION = "You may call these functions:\n<tools>\n"
TOOLS_FORMAT = (
    "\n</tools>\nTo call a function, answer with its name and arguments:\n"
    '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
)

CHAT_TEMPLATE = (
    """{%- set has_system = messages and messages[0].role in ('system', 'developer') -%}
{%- if tools or has_system -%}
{{- '<|im_start|>system\\n' -}}
{%- if has_system -%}{{- messages[0].content -}}{%- if tools -%}{{- '\\n\\n' -}}{%- endif -%}{%- endif -%}
{%- if tools -%}{{- INTRODUCTION -}}{{- tools | tojson -}}{{- FORMAT -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and has_system) -%}
{{- '<|im_start|>' + ('system' if message.role == 'developer' else message.role) + '\\n' -}}
{%- if message.role == 'tool' -%}
{{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- else -%}
{%- if message.content -%}{{- message.content -}}{%- endif -%}
{%- if message.tool_calls -%}
{%- for call in message.tool_calls -%}
{%- set function = call.function if call.function else call -%}
{%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
{{- function.arguments if function.arguments is string else (function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""".replace("INTRODUCTION", repr(TOOLS_INTRODUCTION))
    .replace("FORMAT", repr(TOOLS_FORMAT))
    .strip()
)


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[tuple[str, bool]]:
    """Renders a dialogue as pieces of text, each with whether the model learns to write it.

    Gives the same text as `CHAT_TEMPLATE` without a generation prompt; a test compares them.
    """
    pieces: list[tuple[str, bool]] = []
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools or system is not None:
        text = system or ""
        if tools:
            text += (
                ("\n\n" if system is not None else "")
                + TOOLS_INTRODUCTION
                + json.dumps(tools, ensure_ascii=False)
                + TOOLS_FORMAT
            )
        pieces.append((f"{TURN_START}system\n{text}{TURN_END}\n", False))
    for message in messages[1:] if system is not None else messages:
        role, content = message["role"], message["content"] or ""
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
        calls = [
            f'<tool_call>\n{{"name": {json.dumps(call["function"]["name"])}, '
            f'"arguments": {json.dumps(call["function"]["arguments"], ensure_ascii=False)}}}\n</tool_call>'
            for call in message.get("tool_calls", ())
        ]
        content = "\n".join([content, *calls] if content else calls) if calls else content
        pieces.append((f"{TURN_START}{role}\n", False))
        pieces.append((content + TURN_END, role == "assistant"))
        pieces.append(("\n", False))
    return pieces
