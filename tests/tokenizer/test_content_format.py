"""Detection of the content format, and contents in either form."""

from __future__ import annotations

import pytest

from penstock.tokenizer_service.compiled import CompiledTemplate, Conversation, facts_of

LOOP = "{% for message in messages %}BODY{% endfor %}"
PARTS = "{% for p in SOURCE %}{{ p.text }}{% endfor %}"

OPENAI = {
    "getattr": LOOP.replace("BODY", PARTS.replace("SOURCE", "message.content")),
    "getitem": LOOP.replace("BODY", PARTS.replace("SOURCE", "message['content']")),
    "get": LOOP.replace("BODY", PARTS.replace("SOURCE", "message.get('content')")),
    "set": LOOP.replace("BODY", "{% set c = message.content %}" + PARTS.replace("SOURCE", "c")),
    "set twice": LOOP.replace(
        "BODY",
        "{% set m = message %}{% set c = m['content'] %}{% set d = c %}" + PARTS.replace("SOURCE", "d"),
    ),
    "other loop name": "{% for t in messages %}{% for x in t.content %}{{ x.text }}{% endfor %}{% endfor %}",
    "alias": "{% set r = messages[1:] %}{% for m in r %}{% for x in m.content %}{% endfor %}{% endfor %}",
    "conditional alias": (
        "{% if messages[0].role == 'system' %}{% set all = messages[1:] %}{% else %}{% set all = messages %}"
        "{% endif %}{% for m in all %}{% for x in m.content %}{% endfor %}{% endfor %}"
    ),
    "first message": "{% for x in messages[0]['content'] %}{{ x.text }}{% endfor %}",
    "index": "{% for i in range(9) %}{% for x in messages[i].content %}{% endfor %}{% endfor %}",
    "else branch": LOOP.replace(
        "BODY",
        "{% if message.content is string %}{{ message.content }}{% else %}"
        + PARTS.replace("SOURCE", "message['content']")
        + "{% endif %}",
    ),
    "filter": LOOP.replace(
        "BODY", "{% for x in message['content'] | selectattr('type', 'equalto', 'text') %}{{ x }}{% endfor %}"
    ),
    "macro": "{% macro show(c) %}{% for x in c %}{{ x.text }}{% endfor %}{% endmacro %}"
    + LOOP.replace("BODY", "{{ show(message.content) }}"),
    "macro keyword": "{% macro show(a, c=none) %}{% for x in c %}{% endfor %}{% endmacro %}"
    + LOOP.replace("BODY", "{{ show(1, c=message.content) }}"),
    "namespace": LOOP.replace(
        "BODY",
        "{% set ns = namespace(c=none) %}{% set ns.c = message.content %}{% for x in ns.c %}{% endfor %}",
    ),
    "generation": LOOP.replace(
        "BODY", "{% generation %}" + PARTS.replace("SOURCE", "message.content") + "{% endgeneration %}"
    ),
}

STRING = {
    "plain": LOOP.replace("BODY", "{{ message.content }}"),
    "tool calls": LOOP.replace("BODY", "{% for call in message.tool_calls %}{{ call }}{% endfor %}"),
    "lines of a string": LOOP.replace("BODY", "{% for x in message.content.split('x') %}{{ x }}{% endfor %}"),
    "another content": LOOP.replace(
        "BODY", "{% for x in documents %}{% for y in x.content %}{% endfor %}{% endfor %}"
    ),
    "tools": "{% for tool in tools %}{{ tool }}{% endfor %}"
    + LOOP.replace("BODY", "{{ message.content | trim }}"),
    "assigned string": LOOP.replace(
        "BODY", "{% set c = message.content + '!' %}{% for x in c %}{{ x }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", OPENAI)
@pytest.mark.row("A6.5")
def test_a_loop_over_content_wants_parts(name: str) -> None:
    assert facts_of(OPENAI[name]).content_format == "openai"


@pytest.mark.parametrize("name", STRING)
def test_no_loop_over_content_wants_a_string(name: str) -> None:
    assert facts_of(STRING[name]).content_format == "string"


@pytest.mark.row("A6.4")
def test_parts_and_string_give_the_same_prompt_either_way() -> None:
    as_text = [{"role": "user", "content": "hello"}]
    as_parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    for source in (STRING["plain"], OPENAI["getattr"]):
        template = CompiledTemplate(source)
        answers = [template.render(Conversation(m), "auto", 1000).text for m in (as_text, as_parts)]
        assert answers == ["hello", "hello"]


def test_text_parts_are_joined_by_a_line_break_in_string_format() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    prompt = CompiledTemplate(STRING["plain"]).render(
        Conversation([{"role": "user", "content": parts}]), "auto", 1000
    )
    assert prompt.text == "a\nb\nc"
    assert prompt.content_format == "string"


@pytest.mark.row("A6.6")
def test_a_forced_format_wins() -> None:
    shape = LOOP.replace("BODY", "{{ message.content is string }}")
    template = CompiledTemplate(shape)
    talk = Conversation([{"role": "user", "content": "x"}])
    assert template.render(talk, "string", 100).text == "True"
    assert template.render(talk, "openai", 100).text == "False"
