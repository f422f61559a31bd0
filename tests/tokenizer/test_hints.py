"""What a template's text tells: parsers, turn ends, and the choice among templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.protos.settings import ConfigError
from penstock.tokenizer_service import chat_template, hints
from penstock.tokenizer_service.chat_template import ChatTemplates, read_hints


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("<tool_call> tools", "hermes", ""),
        ("<tool_call><function=name>", "qwen3_coder", ""),
        ("<tool_call><arg_key> <think>", "glm45", "glm45"),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ('<|start_header_id|> "parameters"', "llama3_json", ""),
        ("<|python_tag|>", "llama3_json", ""),
        ("<|python_start|>", "llama4_pythonic", ""),
        ("[func_name1(params_name1=", "pythonic", ""),
        ("<｜tool▁call▁begin｜>```json <think>", "deepseek_v3", "deepseek_r1"),
        ("<｜tool▁call▁begin｜>", "deepseek_v31", ""),
        ("</think> enable_thinking <tool_call>", "hermes", "qwen3"),
        ("<|channel|>commentary analysis", "openai", "openai_gptoss"),
        ("<|tool_call_argument_begin|>", "kimi_k2", ""),
        ("<|im_system|>tool_declare<|im_middle|>", "kimi_k2", ""),
        ("<|tool_call_argument_begin|> <think>", "kimi_k2", "kimi_k2"),
        ("<minimax:tool_call> <think>", "minimax_m2", "minimax_m2"),
        ("nothing", "", ""),
    ],
)
def test_parsers(template: str, tools: str, reasoning: str) -> None:
    assert hints.tool_parser(template) == tools
    assert hints.reasoning_parser(template) == reasoning


def test_turn_ends() -> None:
    ids = {"<|im_end|>": 7, "<|end|>": 8, "<|return|>": 9, "<|eot_id|>": 10}
    assert read_hints("<|im_end|><|eot_id|></s>", ids.get, 10).stop_token_ids == (7,)
    assert read_hints("<|end|>", ids.get, None).stop_token_ids == (8,)
    assert read_hints("<|channel|><|end|><|return|>", ids.get, None).stop_token_ids == (9,)
    assert read_hints("<|user|>", {"<|user|>": 1}.get, None).stop_token_ids == ()


def test_choice_among_templates() -> None:
    both = ChatTemplates("model", {"default": "d", "tool_use": "t"})
    assert (both.choose(False), both.choose(True)) == ("d", "t")
    assert ChatTemplates("model", {"rag": "r"}).choose(True) == "r"
    assert ChatTemplates("model", {"a": "1", "b": "2"}).choose(False) is None
    assert ChatTemplates("none", {}).choose(False) is None


def test_order_of_sources(tmp_path: Path) -> None:
    table = tmp_path / "t.yaml"
    table.write_text("models: {known: {roles: {user: {}}}}")
    model = {"default": "M"}

    def source(option: str = "", path: str = "", names: tuple[str, ...] = (), custom: str = "{{C}}") -> str:
        return chat_template.find(option, path, names, model, custom).source

    assert source("{{ x }}", str(table), ("known",)) == "flag"
    assert source("", str(table), ("known",)) == "role_table"
    assert source("", str(table), ("unknown",)) == "model"
    assert chat_template.find("", "", (), {}, "{{C}}").source == "environment"
    assert chat_template.find("", "", (), {}, "").source == "none"
    with pytest.raises(ConfigError, match="neither a file"):
        source("misspelt")


def test_only_the_template_or_a_continued_message_opens_reasoning() -> None:
    """A caller's text that ends like an opened block does not count where the template writes none."""
    opens = "{{ '<think>\n' }}"
    assert hints.ends_in_reasoning("hi<think>\n", opens, None)
    assert not hints.ends_in_reasoning("<think>\n\n</think>\n\n", opens, None)
    assert not hints.ends_in_reasoning("say <think>", "{{ messages[0].content }}", None)
    assert hints.ends_in_reasoning("<think>hm", "{{ messages[0].content }}", "<think>hm")
    assert not hints.ends_in_reasoning("<think>a</think>b", opens, "<think>a</think>b")
    assert hints.ends_in_reasoning("[THINK]", "[THINK]", None)
