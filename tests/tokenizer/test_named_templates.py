"""Golden prompts of the shipped templates and of role tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.protos.settings import ConfigError
from penstock.tokenizer_service import role_table, templates
from penstock.tokenizer_service.compiled import CompiledTemplate, Conversation

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]

LLAMA_2 = (
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n [/INST]\n[INST] Hi [/INST]\nYes?\n</s>[INST] Bye [/INST]\n"
)
GOLDEN = {
    "default": "Be brief. Hi Yes? Bye",
    "llama-2-chat": LLAMA_2,
    "codellama-instruct": LLAMA_2,
    "falcon-instruct": "Be brief.user:Hi\n\nassistant:Yes?\n\nuser:Bye\n\n",
    "falcon-180b-chat": "System: Be brief.User: HiFalcon: Yes?User: Bye",
    "mpt-chat": (
        "<|im_start|>systemBe brief.<|im_end|>\n<|im_start|>userHi<|im_end|>\n"
        "<|im_start|>assistantYes?<|im_end|>\n<|im_start|>userBye<|im_end|>\n"
    ),
    "wizardcoder": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nBye\n\n",
    "phind-codellama": (
        "### System Prompt\nBe brief.\n\n### User Message\nHi\n\n### Assistant\nYes?\n\n"
        "### User Message\nBye\n\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?"
        "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    ),
    "chatml-tools": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?"
        "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    ),
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nBye\n\n### Response:\n"
    ),
    "vicuna": "Be brief. USER: Hi ASSISTANT: Yes?</s>USER: Bye ASSISTANT:",
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYes?</s>\n<|user|>\nBye</s>\n"
        "<|assistant|>\n"
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes?<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n"
    ),
    "llama-3-instruct": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral-instruct": "<s>[INST] Be brief.\n\nHi [/INST] Yes?</s>[INST] Bye [/INST]",
    "gemma": (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    ),
}


def rendered(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return CompiledTemplate(template).render(Conversation(messages, **options), "auto", 100_000).text


@pytest.mark.parametrize("name", sorted(GOLDEN))
@pytest.mark.row("A6.9", "A6.10", "A6.11", "A6.12", "A6.13", "A6.14")
def test_golden_prompt(name: str) -> None:
    assert rendered(templates.load(name), CHAT) == GOLDEN[name]


@pytest.mark.row("A6.7")
def test_every_shipped_template_has_a_golden_prompt() -> None:
    aliases = {"hermes", "falcon-chat"}
    assert set(templates.names()) - aliases == set(GOLDEN)
    assert all(templates.load(name) for name in templates.names())


@pytest.mark.row("A6.8")
def test_default_joins_contents_with_one_space() -> None:
    assert rendered(templates.load("default"), [{"role": "user", "content": c} for c in "ab"]) == "a b"


@pytest.mark.row("A6.9")
def test_llama_2_writes_bos_again_only_before_a_later_system_message() -> None:
    later = [*CHAT[1:3], CHAT[0], CHAT[3]]
    assert rendered(templates.load("llama-2-chat"), later) == (
        "<s>[INST] Hi [/INST]\nYes?\n</s>"
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n [/INST]\n[INST] Bye [/INST]\n"
    )


@pytest.mark.row("A6.10")
def test_falcon_instruct_collapses_line_breaks() -> None:
    chat = [{"role": "user", "content": "a\r\nb\n\nc"}]
    assert rendered(templates.load("falcon-instruct"), chat) == "user:a\nb\nc\n\n"


def test_tools_template_writes_tools_calls_and_results() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    text = rendered(templates.load("chatml-tools"), chat, tools=tools)
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in text
    one = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert f"<|im_start|>assistant{one}{one}<|im_end|>\n" in text
    results = "\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    assert text.endswith(f"<|im_start|>user{results}<|im_end|>\n<|im_start|>assistant\n")


# The table of the togethercomputer/LLaMA-2-7B-32K example.
TABLE = {
    "roles": {
        "system": {"pre_message": "[INST] <<SYS>>\n", "post_message": "\n<</SYS>>\n [/INST]\n"},
        "user": {"pre_message": "[INST] ", "post_message": " [/INST]\n"},
        "assistant": {"pre_message": "\n", "post_message": "\n"},
    }
}


@pytest.mark.row("A6.15")
def test_role_table_golden_prompt() -> None:
    assert rendered(role_table.to_template(TABLE), CHAT) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n [/INST]\n[INST] Hi [/INST]\n\nYes?\n[INST] Bye [/INST]\n"
    )


def test_role_table_with_all_values() -> None:
    """Values are text, whatever Jinja or placeholder words they hold."""
    nasty = "{{ BOS }} %} 'q' \"d\" \\ \n 😀 "
    table = {
        **TABLE,
        "initial_prompt_value": nasty,
        "final_prompt_value": "END",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    chat = [*CHAT[1:3], CHAT[0], {"role": "stranger", "content": "x"}]
    assert rendered(role_table.to_template(table), chat) == (
        f"<s>{nasty}[INST] Hi [/INST]\n\nYes?\n</s><s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n [/INST]\nxEND"
    )


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.row("A6.15")
def test_role_table_file_by_model_id(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table.{suffix}"
    path.write_text(json.dumps({"models": {"togethercomputer/LLaMA-2-7B-32K": TABLE}}))
    found = role_table.load(str(path), ["x", "togethercomputer/LLaMA-2-7B-32K"])
    assert found == role_table.to_template(TABLE)
    assert role_table.load(str(path), ["other"]) is None
    path.write_text(json.dumps(TABLE))
    assert role_table.load(str(path), ["whatever"]) == found


@pytest.mark.parametrize(
    "table",
    [
        None,
        [],
        {},
        {"roles": []},
        {"roles": {"user": "x"}},
        {"roles": {"user": {"pre": "x"}}},
        {"roles": {"user": {"pre_message": 1}}},
        {**TABLE, "bos_token": 3},
        {**TABLE, "surprise": ""},
    ],
)
def test_role_table_that_is_wrong(table: Any) -> None:
    with pytest.raises(ConfigError):
        role_table.to_template(table)
