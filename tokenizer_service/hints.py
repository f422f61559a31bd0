"""What the text of a chat template tells about its model: turn ends, reasoning marks, tool call format.

Plain substring searches over the template and the prompt; knows no Jinja and no tokenizer. The parser names
are vLLM's, which users already know.
"""

from __future__ import annotations

# Each row: the marks that must all occur in the template, and the parser that reads what such a model writes.
# The first row that fits wins, so rows with more particular marks come first.
_TOOL_PARSERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<|tool_call_argument_begin|>",), "kimi_k2"),
    (("<|im_system|>tool_declare",), "kimi_k2"),
    (("<｜tool▁call▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁call▁begin｜>",), "deepseek_v31"),
    (("<|channel|>", "commentary"), "openai"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<tool_call>",), "hermes"),
    (("<|action_start|>",), "internlm"),
    (("<|tool_call|>",), "granite"),
    (("<tool_calls>",), "jamba"),
    (("functools[",), "phi4_mini_json"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("[func_name1(",), "pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("<|start_header_id|>", '"parameters"'), "llama3_json"),
)

_REASONING_PARSERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "analysis"), "openai_gptoss"),
    (("[THINK]",), "mistral"),
    (("<seed:think>",), "seed_oss"),
    (("<think>", "<arg_key>"), "glm45"),
    (("<|tool_call_argument_begin|>", "think>"), "kimi_k2"),
    (("<minimax:tool_call>", "<think>"), "minimax_m2"),
    (("think>", "enable_thinking"), "qwen3"),
    (("think>",), "deepseek_r1"),
)

_REASONING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))

# Tokens that close a turn. In templates with channels `<|end|>` closes only a part of one.
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<|user|>",
    "<|observation|>",
)
# Role marks that a model writes when its turn is over; only GLM's template relies on them.
_ROLE_MARKS = ("<|user|>", "<|observation|>")


def tool_parser(template: str) -> str:
    """The suggested parser's name, or ""."""
    return _first_match(template, _TOOL_PARSERS)


def reasoning_parser(template: str) -> str:
    """The suggested parser's name, or ""."""
    return _first_match(template, _REASONING_PARSERS)


def turn_ends(template: str) -> list[str]:
    """The tokens that end a turn according to the template."""
    skipped = set() if "[gMASK]" in template else set(_ROLE_MARKS)
    if "<|channel|>" in template:
        skipped.add("<|end|>")
    return [mark for mark in _TURN_ENDS if mark in template and mark not in skipped]


def ends_in_reasoning(prompt: str, template: str, final_text: str | None) -> bool:
    """Whether the model goes on inside a reasoning block.

    final_text: the text of a final message that is being continued. Marks inside other messages do not
    count: callers could write them. So the prompt must end with the opening mark, and the template must be
    the one that wrote it; or the continued text itself opened the block.
    """
    tail = prompt.rstrip()
    for opening, closing in _REASONING_MARKS:
        if final_text is not None:
            if final_text.rfind(opening) > final_text.rfind(closing):
                return True
        elif opening in template and tail.endswith(opening):
            return True
    return False


def _first_match(template: str, rows: tuple[tuple[tuple[str, ...], str], ...]) -> str:
    return next((name for marks, name in rows if all(mark in template for mark in marks)), "")
