"""Escapes from the sandbox: none reads a file, runs a program, or reaches Python's internals."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.tokenizer_service.compiled import CompiledTemplate, Conversation
from penstock.tokenizer_service.refusal import Refusal

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.__class__}'|string).format_map({'0': ''}) }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ dict.__subclasses__() }}",
    "{{ range.__class__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{% set ns = namespace(_x=1) %}{{ ns }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ (messages | first).pop('role') }}{{ messages.append(1) }}",
    "{{ (messages | map('x') | list).gi_frame }}",
    "{% for x in (messages | select) %}{{ loop.__class__ }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% extends '/etc/passwd' %}",
    "{{ ''.mro }}{{ [].__reduce_ex__(2) }}",
]
TELLTALES = (
    "subclasses",
    "<class",
    "<module",
    "uid=",
    "root:",
    "built-in",
    "<function",
    "popen",
    "0x",
    "environment",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_escape_is_contained(source: str) -> None:
    """Either refused, or rendered to something that is not what the escape was after."""
    messages = [{"role": "user", "content": "x"}]
    try:
        text = CompiledTemplate(source).render(Conversation(messages), "auto", 10_000).text
    except Refusal as refusal:
        text = refusal.message
    assert "/" not in text.replace("'/etc/passwd'", "")
    assert not any(telltale in text for telltale in TELLTALES if telltale not in source), text


def test_templates_cannot_change_the_messages() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(Refusal):
        CompiledTemplate("{{ messages.append(1) }}").render(Conversation(messages), "auto", 10_000)
    with pytest.raises(Refusal):
        CompiledTemplate("{{ messages[0].update(role=1) }}").render(Conversation(messages), "auto", 10_000)


def test_there_is_one_environment_and_it_is_sandboxed() -> None:
    """Nothing else in the project constructs a Jinja environment or template."""
    root = Path(__file__).parents[2]
    rooms = ("protos", "kernels", "engine_service", "tokenizer_service", "frontend", "deploy")
    files = [file for room in rooms for file in (root / room).rglob("*.py")]
    text = {file: file.read_text(encoding="utf-8") for file in files}
    making = [f.name for f, t in text.items() if "Environment(" in t or "jinja2.Template(" in t]
    assert making == ["sandbox.py"]
    assert "ImmutableSandboxedEnvironment(" in text[root / "tokenizer_service" / "sandbox.py"]
    assert [f.name for f, t in text.items() if "import jinja2" in t or "from jinja2" in t].count(
        "sandbox.py"
    ) == 1
