"""Prompts equal to transformers' apply_chat_template, for templates in the style of published ones."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from penstock.tokenizer_service.compiled import CompiledTemplate, Conversation, facts_of
from penstock.tokenizer_service.messages import TemplateFacts, convert
from penstock.tokenizer_service.refusal import Refusal

CHATML = """\
{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_3 = """\
{{ bos_token }}{% for message in messages %}
    {% set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
    {% set content = head + message['content'] | trim + '<|eot_id|>' %}
    {{ content }}
{% endfor %}
{% if add_generation_prompt %}
    {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{% endif %}
"""

MISTRAL_TOOLS = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set users = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- set calls = message.tool_calls is defined and message.tool_calls is not none %}
    {%- if not (message.role == "tool" or calls) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user and assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}{{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' }}
        {{- message.tool_call_id + '"}' }}
    {%- else %}
        {{- raise_exception("unknown role") }}
    {%- endif %}
{%- endfor %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" %}
        {%- set ns.found = true %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning = reasoning.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

FEATURES = """\
{#- Names tool_calls, as templates do that can take a null content. -#}
{%- set ns = namespace(n=0) -%}
{%- for message in messages -%}
  {%- if message.role == 'skip' -%}{%- continue -%}{%- endif -%}
  {%- set ns.n = ns.n + 1 -%}
  {% generation %}{{ ns.n }}:{{ message | tojson(indent=2) }}{% endgeneration %}
  {%- if ns.n > 3 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{{ dict(a=1, b='<é>') | tojson }}{{ strftime_now('%Y') | length }}{{ documents | tojson }}
{{ tools is none }}{{ eos_token }}{{ unk_token }}{{ undefined_name }}
    {% if add_generation_prompt %}
    GO
    {% endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Würzburg's weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "time", "parameters": {}}},
]
USER = {"role": "user", "content": "Hello <there> & é 😀"}
CALL = {
    "id": "abc123xyz",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Köln", "n": [1, 2.5]}'},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "turns": [
        USER,
        {"role": "assistant", "content": " Hi!\n"},
        {"role": "user", "content": "And?", "name": "bob"},
    ],
    "reasoning": [
        USER,
        {"role": "assistant", "content": "ok", "reasoning": "thinking hard"},
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
    ],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "abc123xyz", "content": '{"t": 20}'},
        {"role": "assistant", "content": "20 degrees"},
        USER,
    ],
}
TEMPLATES = {"chatml": CHATML, "llama": LLAMA_3, "mistral": MISTRAL_TOOLS, "qwen": QWEN, "features": FEATURES}
# ChatML and Llama 3 of this style know no tool calls: they would print "None".
PAIRS = [(t, c) for t in TEMPLATES for c in CONVERSATIONS if not (c == "tools" and t in ("chatml", "llama"))]


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **tokens)


def for_oracle(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """transformers takes tool call arguments as objects."""
    copied: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in copied:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copied


def ours(
    oracle: PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]], **options: Any
) -> str:
    variables = {**oracle.special_tokens_map, **options.pop("variables", {})}
    talk = Conversation(copy.deepcopy(messages), variables=variables, **options)
    return CompiledTemplate(template).render(talk, "auto", 1_000_000).text


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize(("template", "conversation"), PAIRS)
def test_equals_transformers(
    oracle: PreTrainedTokenizerFast, template: str, conversation: str, tools: Any, prompt: bool
) -> None:
    source, messages = TEMPLATES[template], CONVERSATIONS[conversation]
    theirs = oracle.apply_chat_template(
        for_oracle(messages), tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
    )
    assert ours(oracle, source, messages, tools=tools, add_generation_prompt=prompt) == theirs


@pytest.mark.parametrize("final", ["The answer is", " spaced \n", "<think>\nwell"])
@pytest.mark.parametrize("template", ["chatml", "llama", "qwen"])
def test_continuing_the_final_message_equals_transformers(
    oracle: PreTrainedTokenizerFast, template: str, final: str
) -> None:
    messages = [USER, {"role": "assistant", "content": final}]
    theirs = oracle.apply_chat_template(
        messages, chat_template=TEMPLATES[template], tokenize=False, continue_final_message=True
    )
    got = ours(oracle, TEMPLATES[template], messages, continue_final_message=True)
    assert got == theirs
    assert got.endswith(final.strip() if template == "llama" else final)


def test_template_arguments_and_documents_equal_transformers(oracle: PreTrainedTokenizerFast) -> None:
    documents = [{"title": "T", "text": "x"}]
    for source, extra in ((QWEN, {"enable_thinking": False}), (FEATURES, {"undefined_name": "set"})):
        theirs = oracle.apply_chat_template(
            [USER],
            chat_template=source,
            tokenize=False,
            documents=documents,
            add_generation_prompt=True,
            **extra,
        )
        assert ours(oracle, source, [USER], documents=documents, variables=extra) == theirs


def test_refusals_of_a_template_reach_the_caller(oracle: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Refusal, match="roles must alternate") as caught:
        ours(oracle, MISTRAL_TOOLS, [USER, USER])
    assert caught.value.reason == "invalid_value"


FACTS = TemplateFacts(
    "string", frozenset(), knows_developer=False, knows_tool_calls=True, tests_for_null=False
)


def test_developer_becomes_system_unless_the_template_knows_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert convert(messages, FACTS, "string")[0]["role"] == "system"
    knows = replace(FACTS, knows_developer=True)
    assert convert(messages, knows, "string")[0]["role"] == "developer"


def test_what_a_message_may_lack_or_carry_on_top() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "x", "tool_calls": [], "colour": "red", "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"broken'}}]},
        {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]},
    ]
    out = convert(messages, FACTS, "string")
    assert "content" not in out[0]
    assert out[0]["tool_calls"][0]["function"]["arguments"] == {"city": "Köln", "n": [1, 2.5]}
    assert out[1] == {"role": "assistant", "content": "x", "colour": "red", "name": "n"}
    assert out[2] == {"role": "assistant", "content": ""}
    assert out[3]["tool_calls"][0]["function"]["arguments"] == {}
    assert out[4]["tool_calls"][0]["function"]["arguments"] == '{"broken'
    assert out[5]["content"] == "a\nb"
    unaware = replace(FACTS, knows_tool_calls=False)
    assert convert(messages[:1], unaware, "string")[0]["content"] == ""
    assert convert(messages[:1], unaware, "openai")[0]["content"] == []
    testing = replace(FACTS, tests_for_null=True)
    assert convert(messages[:1], testing, "string")[0]["content"] is None


def test_an_answer_with_reasoning_text_and_a_call_can_come_back() -> None:
    """gpt-oss' template refuses all three in one message, which is what its model's answer may be."""
    source = (
        "{% for m in messages %}{% if m.content and m.thinking and m.tool_calls %}"
        "{{ raise_exception('Cannot pass both content and thinking!') }}{% endif %}"
        "{{ m.thinking }}|{{ m.content }};{% endfor %}"
    )
    message = {"role": "assistant", "content": "I look.", "reasoning": "Hm."}
    talk = Conversation([{**message, "tool_calls": [CALL]}, message])
    assert CompiledTemplate(source).render(talk, "string", 100).text == "Hm.|;Hm.|I look.;"
    assert not facts_of("{{ messages[0].content }}").takes_thought_or_text


@pytest.mark.parametrize(
    "test", ["message['content'] is none", 'message["content"] is not none', "message.content is None"]
)
def test_templates_that_test_for_null_are_noticed(test: str) -> None:
    assert facts_of("{% if " + test + " %}{% endif %}").tests_for_null
    assert not facts_of("{% if message.content %}{% endif %}").tests_for_null
