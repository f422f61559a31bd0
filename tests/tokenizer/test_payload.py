"""What callers send: checked, bounded, and named in the answer. Fuzzed at the renderer's own entry."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.protos.errors import KINDS
from penstock.tokenizer_service import payload, renderer
from penstock.tokenizer_service.refusal import Refusal
from penstock.tokenizer_service.render_pool import RenderJob

NESTED = b'[{"role":"user","content":' + b"[" * 70 + b"]" * 70 + b"}]"

BAD_MESSAGES: list[tuple[bytes, str, str]] = [
    (b"", "invalid_json", "messages"),
    (b"{", "invalid_json", "messages"),
    (b"\xff\xfe[", "invalid_json", "messages"),
    (b'[{"role":"user","content":NaN}]', "invalid_json", "messages"),
    (b"[" * 100_000, "invalid_value", "messages"),
    (b'[{"x":' + b"9" * 5000 + b"}]", "invalid_json", "messages"),
    (NESTED, "invalid_value", "messages"),
    (b"null", "invalid_type", "messages"),
    (b"{}", "invalid_type", "messages"),
    (b"7", "invalid_type", "messages"),
    (b"[]", "invalid_value", "messages"),
    (b"[1]", "invalid_type", "messages[0]"),
    (b"[{}]", "missing_required_parameter", "messages[0].role"),
    (b'[{"role":1,"content":"x"}]', "invalid_type", "messages[0].role"),
    (b'[{"role":"user"}]', "missing_required_parameter", "messages[0].content"),
    (b'[{"role":"user","content":null}]', "missing_required_parameter", "messages[0].content"),
    (b'[{"role":"user","content":5}]', "invalid_type", "messages[0].content"),
    (b'[{"role":"user","content":{"text":"x"}}]', "invalid_type", "messages[0].content"),
    (b'[{"role":"user","content":[5]}]', "invalid_type", "messages[0].content[0]"),
    (
        b'[{"role":"user","content":[{"type":"text"}]}]',
        "missing_required_parameter",
        "messages[0].content[0].text",
    ),
    (
        b'[{"role":"user","content":[{"type":"text","text":5}]}]',
        "invalid_type",
        "messages[0].content[0].text",
    ),
    (
        b'[{"role":"user","content":[{"type":5,"text":""}]}]',
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
    (b'[{"role":"assistant","tool_calls":5}]', "invalid_type", "messages[0].tool_calls"),
    (b'[{"role":"assistant","tool_calls":[5]}]', "invalid_type", "messages[0].tool_calls[0]"),
    (
        b'[{"role":"assistant","tool_calls":[{"function":{"arguments":5}}]}]',
        "invalid_type",
        "messages[0].tool_calls[0].function.arguments",
    ),
    (json.dumps([{"role": "user", "content": "x"}] * 10_001).encode(), "invalid_value", "messages"),
    (
        json.dumps([{"role": "user", "content": "x", **{str(i): 0 for i in range(10_001)}}]).encode(),
        "invalid_value",
        "messages",
    ),
]


def ask(**fields: Any) -> tuple[dict[str, Any], str]:
    """One frame through the renderer's own code."""
    job = RenderJob(**{"template": "{{ messages | tojson }}", "messages": b'"hi"', **fields})
    head, text = renderer.answer(job.parts())
    return json.loads(head), text.decode("utf-8")


def refusal_of(**fields: Any) -> tuple[str, str, str]:
    error = ask(**fields)[0]["error"]
    return error["reason"], error["param"], error["message"]


@pytest.mark.parametrize(("data", "reason", "param"), BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
def test_bad_messages(data: bytes, reason: str, param: str) -> None:
    got = refusal_of(messages=data)
    assert got[:2] == (reason, param)
    assert len(got[2]) < 500


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video", "file", "input_image"])
def test_parts_that_are_no_text_are_named(kind: str) -> None:
    data = json.dumps(
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {}}]}]
    )
    reason, param, message = refusal_of(messages=data.encode())
    assert (reason, param) == ("unsupported_parameter", "messages[0].content[1].type")
    assert repr(kind) in message


def test_a_plain_string_is_one_user_message() -> None:
    assert json.loads(ask(messages=b'"hello"')[1]) == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("name", sorted(payload.RESERVED))
def test_reserved_template_arguments_are_named(name: str) -> None:
    reason, param, message = refusal_of(arguments=json.dumps({"fine": 1, name: 1}).encode())
    assert (reason, param) == ("invalid_value", "chat_template_kwargs")
    assert name in message
    assert "fine" not in message


@pytest.mark.parametrize(
    ("field", "data", "reason", "param"),
    [
        ("tools", b"{}", "invalid_type", "tools"),
        ("tools", b"[1]", "invalid_type", "tools"),
        ("tools", b"[", "invalid_json", "tools"),
        ("tools", json.dumps([{}] * 1025).encode(), "invalid_value", "tools"),
        ("tools", json.dumps([{"x": "y" * (1 << 20)}]).encode(), "invalid_value", "tools"),
        ("documents", b'["x"]', "invalid_type", "documents"),
        ("arguments", b"[]", "invalid_type", "chat_template_kwargs"),
        ("arguments", b"{", "invalid_json", "chat_template_kwargs"),
    ],
)
def test_bad_other_fields(field: str, data: bytes, reason: str, param: str) -> None:
    assert refusal_of(**{field: data})[:2] == (reason, param)


def test_no_tools_in_any_spelling() -> None:
    for data in (b"", b"null", b"[]"):
        assert ask(template="{{ tools is none }}", tools=data)[1] == "True"


def test_sixty_large_tools_pass() -> None:
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "description": "d" * 1700}} for i in range(60)
    ]
    assert ask(template="{{ tools | length }}", tools=json.dumps(tools).encode())[1] == "60"


def test_reasoning_effort_reaches_the_template() -> None:
    template = "{{ reasoning_effort }} {{ enable_thinking }}"
    assert ask(template=template, reasoning_effort="high")[1] == "high True"
    assert ask(template=template, reasoning_effort="none")[1] == "none False"
    given_too = ask(template=template, reasoning_effort="none", arguments=b'{"enable_thinking": true}')
    assert given_too[1] == "none True"


def test_half_of_a_surrogate_pair_becomes_the_replacement_character() -> None:
    assert ask(template="{{ messages[0].content }}", messages=rb'"a\ud800b \ud83d\ude00"')[1] == "a\ufffdb 😀"
    reason, _, message = refusal_of(
        template="{{ raise_exception(messages[0].content) }}", messages=rb'"\udfff"'
    )
    assert reason == "invalid_value"
    assert message.endswith("\ufffd")


def test_error_text_shows_no_addresses_and_no_python() -> None:
    for template in (
        "{{ 1 / 0 }}",
        "{{ raise_exception('at 0x7f0012345678') }}",
        "{{ messages.x.y }}",
        "{{ 'x' + 1 }}",
    ):
        _, _, message = refusal_of(template=template)
        assert "Traceback" not in message
        assert ".py" not in message
        assert "0x7f" not in message


def test_bad_templates_are_the_callers_error() -> None:
    for template in ("{% for %}", "{{", "{% if %}", "{{ x | nosuchfilter }}", "{" * 3 + "(" * 5000):
        reason, param, message = refusal_of(template=template)
        assert (reason, param) == ("invalid_value", "chat_template")
        assert "chat template" in message


def test_long_output_is_refused() -> None:
    reason, param, message = refusal_of(template="{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}")
    assert (reason, param) == ("invalid_value", "messages")
    assert "longer than 4194304" in message


def test_endless_recursion_is_refused() -> None:
    template = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    assert refusal_of(template=template)[0] == "invalid_value"


def test_a_range_without_end_is_refused() -> None:
    assert refusal_of(template="{% for i in range(10**12) %}{% endfor %}")[0] == "invalid_value"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "tool_calls", "function", "arguments", "name", "x"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer", "x"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES}, optional={"content": JSON, "tool_calls": JSON}), max_size=4
)
TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{{ m.tool_calls | tojson if m.tool_calls }}"
    "{{ m.role }}{% endfor %}{{ tools | tojson }}{{ documents | tojson }}"
)


@settings(max_examples=200)
@given(
    messages=(JSON | MESSAGES).map(lambda v: json.dumps(v).encode()) | st.binary(max_size=40),
    tools=JSON.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=10),
    documents=JSON.map(lambda v: json.dumps(v).encode()),
    arguments=JSON.map(lambda v: json.dumps(v).encode()),
    form=st.sampled_from(["auto", "string", "openai"]),
    last=st.booleans(),
)
def test_any_input_has_an_answer(
    messages: bytes, tools: bytes, documents: bytes, arguments: bytes, form: str, last: bool
) -> None:
    head, _ = ask(
        template=TEMPLATE,
        messages=messages,
        tools=tools,
        documents=documents,
        arguments=arguments,
        content_format=form,
        continue_final_message=last,
    )
    error = head.get("error")
    if error is not None:
        assert error["reason"] in KINDS
        assert error["reason"] != "internal_error"
        assert len(error["message"]) <= 600


def test_a_refusal_keeps_its_parts() -> None:
    refusal = Refusal("invalid_value", "text", "field", retire=True)
    assert (refusal.reason, refusal.message, refusal.param, refusal.retire) == (
        "invalid_value",
        "text",
        "field",
        True,
    )
