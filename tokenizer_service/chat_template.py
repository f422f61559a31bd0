"""Which chat template is used, and what its text tells. Compiles and renders nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.protos.settings import ConfigError
from penstock.tokenizer_service import hints, role_table, templates
from penstock.tokenizer_service.tokenizer_files import ModelFilesError, read_template

NO_TEMPLATE = (
    "This model has no chat template, so it cannot take chat messages; use the completions API, or start the "
    "server with --chat-template."
)


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The templates of one model by name. source: "model", "flag", "environment", "role_table",
    "named:NAME" or "none"."""

    source: str
    by_name: Mapping[str, str]

    def choose(self, with_tools: bool) -> str | None:
        """As transformers chooses: the one named tool_use when tools are given, else the one named default,
        else the only one."""
        if with_tools and "tool_use" in self.by_name:
            return self.by_name["tool_use"]
        if "default" in self.by_name:
            return self.by_name["default"]
        return next(iter(self.by_name.values())) if len(self.by_name) == 1 else None

    def texts(self) -> list[str]:
        return [text for tools in (False, True) if (text := self.choose(tools)) is not None]


@dataclass(frozen=True, slots=True)
class TemplateHints:
    tool_parser: str = ""
    reasoning_parser: str = ""
    stop_token_ids: tuple[int, ...] = ()


def find(
    option: str,
    table_path: str,
    model_names: Iterable[str],
    model_templates: Mapping[str, str],
    custom: str,
) -> ChatTemplates:
    """option: --chat-template (a path, the name of a shipped template, or the template itself). table_path:
    a role table. custom: used only when the model has no template; as option. Raises ConfigError."""
    if option:
        source, text = _given(option, "flag", "--chat-template")
        return ChatTemplates(source, {"default": text})
    if table_path and (text_of_table := role_table.load(table_path, model_names)) is not None:
        return ChatTemplates("role_table", {"default": text_of_table})
    if model_templates:
        return ChatTemplates("model", model_templates)
    if custom:
        _, text = _given(custom, "environment", "CUSTOM_CHAT_TEMPLATE")
        return ChatTemplates("environment", {"default": text})
    return ChatTemplates("none", {})


def _given(value: str, source: str, option: str) -> tuple[str, str]:
    if value in templates.names():
        return f"named:{value}", templates.load(value)
    if not any(mark in value for mark in "{}\n"):
        return source, _from_file(value, option)
    return source, value


def _from_file(path: str, option: str) -> str:
    try:
        if Path(path).is_file():
            return read_template(Path(path))
    except ModelFilesError as error:
        raise ConfigError(f"{option}: {error}") from error
    except (OSError, ValueError):
        pass
    raise ConfigError(f"{option}: {path[:200]!r} is neither a file, a template, nor a shipped name")


def read_hints(
    template: str, added_token_id: Callable[[str], int | None], eos_id: int | None
) -> TemplateHints:
    """Suggestions by the template's text. Turn ends count when they are tokens of their own and not eos."""
    ends = (added_token_id(mark) for mark in hints.turn_ends(template))
    stops = tuple(token for token in ends if token is not None and token != eos_id)
    return TemplateHints(hints.tool_parser(template), hints.reasoning_parser(template), stops)
