"""One chat template, compiled: renders checked messages to a prompt under an output limit.

Runs only inside a renderer process. Knows no tokens and no wire.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta

from penstock.tokenizer_service import content_format, hints
from penstock.tokenizer_service.messages import TemplateFacts, convert
from penstock.tokenizer_service.refusal import Refusal
from penstock.tokenizer_service.sandbox import TemplateRefusal, make_environment

# Appended to the last message to find where its text ends in the prompt. The trailing space tells whether the
# template trims contents: the trick is the one transformers uses.
_END_MARK = "\ue000END OF THE FINAL MESSAGE\ue001 "
_NULL_TEST = re.compile(r"content['\"\]]* +is +(not +)?none", re.IGNORECASE)
_EITHER = "both content and thinking"  # from what gpt-oss' template says when it refuses
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")

_ENVIRONMENT = make_environment()


@dataclass(slots=True)
class Conversation:
    """All that one render needs besides the template. variables: special tokens and template arguments."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    content_format: str
    ends_in_reasoning: bool


class CompiledTemplate:
    def __init__(self, source: str) -> None:
        """Raises Refusal when the source is not valid Jinja."""
        self.source = source
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise Refusal("invalid_value", syntax_message(error), "chat_template") from error
        self.facts = facts_of(source)

    def render(self, talk: Conversation, form: str, max_chars: int) -> Prompt:
        """form: "auto", "string" or "openai". Raises Refusal for messages that the template or the limits
        refuse; MemoryError and RecursionError are the caller's."""
        used = self.facts.content_format if form == "auto" else form
        messages = convert(talk.messages, self.facts, used)
        final_text = mark_final(messages) if talk.continue_final_message else None
        variables = {
            **talk.variables,
            "messages": messages,
            "tools": talk.tools,
            "documents": talk.documents,
            "add_generation_prompt": talk.add_generation_prompt and not talk.continue_final_message,
        }
        text = self._run(variables, max_chars)
        if final_text is not None:
            text = cut_at_mark(text)
        inside = hints.ends_in_reasoning(text, self.source, final_text)
        return Prompt(text, used, inside)

    def _run(self, variables: dict[str, Any], max_chars: int) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > max_chars:
                    raise _refused(f"The rendered prompt is longer than {max_chars} characters.")
                pieces.append(piece)
        except TemplateRefusal as error:
            raise _refused(f"The chat template refuses this: {_clean(error)}") from error
        except (Refusal, MemoryError, RecursionError):
            raise
        except jinja2.TemplateError as error:
            raise _refused(f"The chat template failed: {_clean(error)}") from error
        except Exception as error:
            # Messages of Python's own errors may name what is none of the caller's business.
            raise _refused(f"The chat template failed on this ({type(error).__name__}).") from error
        return "".join(pieces)


@lru_cache(maxsize=16)
def compile_template(source: str) -> CompiledTemplate:
    return CompiledTemplate(source)


def facts_of(source: str) -> TemplateFacts:
    """Raises Refusal when the source is not valid Jinja."""
    try:
        tree = _ENVIRONMENT.parse(source)
        form = content_format.detect(tree)
        variables = frozenset(meta.find_undeclared_variables(tree))
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        raise Refusal("invalid_value", syntax_message(error), "chat_template") from error
    return TemplateFacts(
        content_format=form,
        variables=variables,
        knows_developer="developer" in source,
        knows_tool_calls="tool_calls" in source,
        tests_for_null=_NULL_TEST.search(source) is not None,
        takes_thought_or_text=_EITHER in source,
    )


def syntax_message(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"The chat template is not valid Jinja: line {error.lineno}: {_clean(error)}"
    return "The chat template is nested too deeply."


def mark_final(messages: list[dict[str, Any]]) -> str:
    """Appends the end mark to the text of the last message and returns the text it had."""
    final = messages[-1]
    content = final.get("content")
    if isinstance(content, list) and content:
        text: str = content[-1]["text"]
        final["content"] = [*content[:-1], {**content[-1], "text": text + _END_MARK}]
        return text
    if isinstance(content, str):
        final["content"] = content + _END_MARK
        return content
    raise Refusal(
        "invalid_value", "continue_final_message needs a final message with text.", "continue_final_message"
    )


def cut_at_mark(text: str) -> str:
    at = text.rfind(_END_MARK.rstrip())
    if at < 0:
        raise Refusal(
            "invalid_value",
            "continue_final_message cannot be used: the template does not write the final message as it is.",
            "continue_final_message",
        )
    kept = text[:at]
    return kept if text.startswith(_END_MARK, at) else kept.rstrip()


def _refused(message: str) -> Refusal:
    return Refusal("invalid_value", message, "messages")


def _clean(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error)
    return _ADDRESS.sub("0x…", str(text))[:500]
