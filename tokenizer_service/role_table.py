"""Role tables: a prompt format given as text before and after the messages of each role, instead of Jinja.

    models:
      togethercomputer/LLaMA-2-7B-32K:
        roles:
          user: {pre_message: "[INST] ", post_message: " [/INST]\\n"}
        initial_prompt_value: ""
        final_prompt_value: ""
        bos_token: ""
        eos_token: ""

or one table, without `models:`, for whatever model is served. YAML or JSON. The semantics are LiteLLM's: the
begin token stands at the start and again before a system message that follows an answer; the end token stands
after each answer; a role that is not in the table has only its content. Makes a template; renders nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from penstock.protos.settings import ConfigError, read_yaml

_TEXTS = ("initial_prompt_value", "final_prompt_value", "bos_token", "eos_token")
_SIDES = ("pre_message", "post_message")

_TEMPLATE = """\
{%- set before = BEFORE -%}
{%- set after = AFTER -%}
{%- set bos = BOS -%}
{%- set state = namespace(open=true) -%}
{{- bos + INITIAL -}}
{%- for message in messages -%}
{%- if message.role in ['system', 'human'] and not state.open -%}
{{- bos -}}{%- set state.open = true -%}
{%- endif -%}
{{- before.get(message.role, '') + (message.content or '') + after.get(message.role, '') -}}
{%- if message.role == 'assistant' -%}{{- EOS -}}{%- set state.open = false -%}{%- endif -%}
{%- endfor -%}
{{- FINAL -}}"""
_PLACEHOLDER = re.compile(r"\b(BEFORE|AFTER|BOS|EOS|INITIAL|FINAL)\b")


def load(path: str, model_names: Iterable[str]) -> str | None:
    """The template for the first of model_names in the file, None when the file has none of them.

    Raises ConfigError."""
    data = read_yaml(path)
    tables = data.get("models")
    if tables is None:
        return to_template(data, path)
    if not isinstance(tables, dict):
        raise ConfigError(f"role table {path}: models must map model ids to tables")
    for name in model_names:
        if name in tables:
            return to_template(tables[name], f"{path}, {name}")
    return None


def to_template(table: Any, where: str = "role table") -> str:
    """The Jinja template of one table. Raises ConfigError."""
    roles = table.get("roles") if isinstance(table, dict) else None
    if not isinstance(roles, dict) or not roles:
        raise ConfigError(f"{where}: a role table needs a mapping named roles")
    _only(table, {"roles", *_TEXTS}, where)
    for role, sides in roles.items():
        if not isinstance(sides, dict):
            raise ConfigError(f"{where}: role {role} must have pre_message and post_message")
        _only(sides, set(_SIDES), f"{where}, role {role}")
    texts = {key: _text(table, key, where) for key in _TEXTS}
    values = {
        "BEFORE": {str(role): _text(sides, "pre_message", where) for role, sides in roles.items()},
        "AFTER": {str(role): _text(sides, "post_message", where) for role, sides in roles.items()},
        "BOS": texts["bos_token"],
        "EOS": texts["eos_token"],
        "INITIAL": texts["initial_prompt_value"],
        "FINAL": texts["final_prompt_value"],
    }
    return _PLACEHOLDER.sub(lambda match: _literal(values[match[0]]), _TEMPLATE)


def _literal(value: Any) -> str:
    """A JSON literal is a Jinja one; characters stay themselves, as Jinja cannot join surrogate escapes."""
    return json.dumps(value, ensure_ascii=False)


def _only(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(set(map(str, table)) - allowed)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}")


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {key} must be a string")
    return value
