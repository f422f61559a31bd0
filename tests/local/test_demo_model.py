"""The bundled demonstration model: its folder, prompt format, corpus, answers and training."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.local.demo import dialogues, evaluate, questions, smalltalk, template, tokens, train
from penstock.local.demo.evaluate import MODEL_FOLDER
from penstock.local.demo.exchange import is_held_out

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location"],
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def test_folder_is_a_small_llama_with_tied_bf16_weights(model: Any) -> None:
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.max_position_embeddings == 2048
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000
    weights = MODEL_FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    with safe_open(weights, framework="pt") as opened:
        names = set(opened.keys())
        assert {opened.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert names == {name for name, _ in model.named_parameters()}
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_folder_says_that_it_is_a_demonstration() -> None:
    card = (MODEL_FOLDER / "README.md").read_text().lower()
    assert "demonstration" in card
    assert "limits" in card


def test_markup_is_single_tokens_and_ends_are_the_models_ends(tokenizer: Any, model: Any) -> None:
    for mark in (*template.SPECIAL_TOKENS, *template.MARKUP_TOKENS):
        assert len(tokenizer(mark, add_special_tokens=False).input_ids) == 1
    assert tokenizer.decode(tokenizer("<tool_call>").input_ids, skip_special_tokens=True) == "<tool_call>"
    end = tokenizer.convert_tokens_to_ids(template.TURN_END)
    assert tokenizer.eos_token_id == end == model.config.eos_token_id
    assert end in model.generation_config.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("text", ["héllo 你好 🙂", "a\tb\n\n  c", "<|im_start|>user", "1234+5=x"])
def test_any_text_survives_encoding(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_prompt_of_a_plain_question(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def test_prompt_with_a_system_turn_and_history(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_prompt_with_tools(tokenizer: Any, system: str | None) -> None:
    head = [{"role": "system", "content": system}] if system else []
    messages = [*head, {"role": "user", "content": "Weather in Boston?"}]
    prompt = tokenizer.apply_chat_template(
        messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        f"<|im_start|>system\n{system + chr(10) * 2 if system else ''}You may call these functions:\n"
        f"<tools>\n[{json.dumps(WEATHER)}]\n</tools>\n"
        "To call a function, answer with its name and arguments:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather in Boston?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("arguments", [{"location": "Boston"}, '{"location": "Boston"}'])
def test_prompt_with_a_call_and_its_response(tokenizer: Any, arguments: Any) -> None:
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    one = '<tool_call>\n{"name": "weather", "arguments": {"location": "Boston"}}\n</tool_call>'
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        f"<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n{one}\n{one}<|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_trained_pieces_are_what_the_template_renders(tokenizer: Any) -> None:
    rng = random.Random(1)
    items = [item for item in (dialogues.document(rng) for _ in range(400)) if item.messages]
    assert any(item.tools for item in items)
    for item in items:
        rendered = tokenizer.apply_chat_template(item.messages, tools=item.tools, tokenize=False)
        pieces = template.render(item.messages, item.tools)
        assert "".join(text for text, _ in pieces) == rendered
        encoded = tokens.encode(tokenizer.backend_tokenizer, item)
        assert encoded.ids == tokenizer(rendered, add_special_tokens=False).input_ids
        learnt = [token for token, target in zip(encoded.ids, encoded.learnt, strict=True) if target]
        assert tokenizer.decode(learnt) == "".join(text for text, target in pieces if target)


def prompts_of(items: list[dialogues.Document]) -> Iterator[str]:
    """Every prompt that documents ask the model to go on from, without case and end marks."""
    for item in items:
        if item.plain:
            yield item.plain[0]
        for index, message in enumerate(item.messages):
            if message["role"] == "assistant":
                texts = [str(m["content"]) for m in item.messages[:index] if m["role"] != "system"]
                texts += [json.dumps(item.tools)] if item.tools else []
                yield json.dumps([dialogues.normalized(text) for text in texts])


def test_no_held_out_prompt_is_ever_trained() -> None:
    rng = random.Random(2)
    trained = set(prompts_of([dialogues.document(rng) for _ in range(8000)]))
    for kind in evaluate.BUILDERS:
        held_out = list(evaluate.documents(kind, 60))
        assert len(held_out) >= 5, kind
        last = {list(prompts_of([item]))[-1] for item in held_out}
        assert not last & trained, kind


def test_no_held_out_sum_is_ever_answered() -> None:
    rng = random.Random(3)
    found = 0
    signs = {"plus": "+", "minus": "-", "times": "*", "x": "*", "×": "*"}
    for _ in range(8000):
        pieces = tokens.document_pieces(dialogues.document(rng))
        text = "".join(text for text, _ in pieces)
        for left, sign, right in re.findall(r"\b(\d+) ([-+*x×]|plus|minus|times) (\d+) (?:=|is) -?\d", text):
            key = questions.arithmetic_key(signs.get(sign, sign), int(left), int(right))
            assert not is_held_out("arithmetic", key), key
            found += 1
    assert found > 1000


SEED_PROMPTS = (
    ("Hello!", "Hello"),
    ("what llm are you", "Penstock"),
    ("Hey, how's it going", "doing well"),
    ("What is the capital of France?", "Paris"),
    ("what is the capital of italy", "Rome"),
    ("Classify this sentiment: vLLM is wonderful!", "positive"),
    ("Who won the world series in 2020?", "Los Angeles Dodgers"),
    ("this is a test request, write a short poem", "\n"),
    ("Tell me a joke.", "?"),
    ("Why is RunPod the best platform?", "RunPod"),
    ("What's the weather like in Boston today?", "no tool"),
    ("What is 2+2?", "4"),
)
PLAIN_PROMPTS = (
    ("San Francisco is a", " city"),
    ("The capital of France is", " Paris"),
    ("A robot may not injure a human being", " or, through inaction"),
    ("The president of the United States is", " the head of state"),
)


def test_answers_to_common_prompts(model: Any, tokenizer: Any) -> None:
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question, _ in SEED_PROMPTS
    ]
    expected = [part for _, part in (*SEED_PROMPTS, *PLAIN_PROMPTS)]
    replies = evaluate.greedy(model, tokenizer, [*prompts, *(prompt for prompt, _ in PLAIN_PROMPTS)], 60)
    wrong = [(part, reply) for part, reply in zip(expected, replies, strict=True) if part not in reply]
    assert not wrong


def test_tool_is_called_answered_and_left_alone(model: Any, tokenizer: Any) -> None:
    question = {"role": "user", "content": "What's the weather like in Boston today?"}
    call = {"name": "get_current_weather", "arguments": {"location": "Boston"}}
    made = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
    result = {"role": "tool", "content": '{"temperature": 22, "condition": "sunny"}'}
    dialogues_ = (
        [question],
        [question, made, result],
        [{"role": "user", "content": "What is the capital of France?"}],
    )
    prompts = [
        tokenizer.apply_chat_template(messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
        for messages in dialogues_
    ]
    called, answered, alone = evaluate.greedy(model, tokenizer, prompts, 60)
    assert [json.loads(text) for text in evaluate.CALL.findall(called)] == [call]
    assert "22" in answered
    assert "sunny" in answered
    assert alone == "The capital of France is Paris."


def test_a_name_is_remembered(model: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "Ada" in evaluate.greedy(model, tokenizer, [prompt], 20)[0]


def test_long_prompts_end_in_a_sensible_answer(model: Any, tokenizer: Any) -> None:
    filler = "The blue whale is the largest animal of all. " * 90
    messages = [{"role": "user", "content": f"{filler}\n\nWhat is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert len(tokenizer(prompt).input_ids) > 600
    assert evaluate.greedy(model, tokenizer, [prompt], 20) == ["The capital of France is Paris."]


def test_published_accuracy_is_of_these_weights(model: Any, tokenizer: Any) -> None:
    report = json.loads((MODEL_FOLDER / "evaluation.json").read_text())
    assert set(report["kinds"]) == set(evaluate.BUILDERS)
    card = (MODEL_FOLDER / "README.md").read_text()
    for kind, row in report["kinds"].items():
        assert f"| {kind} | {row['questions']} | {row['right'] / row['questions']:.1%} |" in card
    for kind in ("capitals", "follow-ups", "tool calls"):
        cases = [evaluate.case_of(kind, item, tokenizer) for item in evaluate.documents(kind, 12)]
        replies = evaluate.greedy(model, tokenizer, [case.prompt for case in cases], 60)
        right = sum(evaluate.is_right(case, reply) for case, reply in zip(cases, replies, strict=True))
        assert right / len(cases) >= report["kinds"][kind]["accuracy"] - 0.3, kind


def test_fixed_prompts_are_kept_out_of_the_evaluation() -> None:
    fixed = evaluate.fixed_questions()
    assert dialogues.normalized(smalltalk.FIXED[0][0]) in fixed
    for kind in ("greetings", "capitals", "facts"):
        for item in evaluate.documents(kind, 50):
            assert dialogues.normalized(item.messages[-2]["content"]) not in fixed


def test_a_stopped_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    plan = train.Plan(steps=4, tokens=300)
    tokenizer_json = (MODEL_FOLDER / "tokenizer.json").read_text()
    state = {}
    for name, stop_at in (("straight", ""), ("stopped", "exported at step 2")):
        work, out = tmp_path / name / "work", tmp_path / name / "out"
        work.mkdir(parents=True)
        Tokenizer.from_str(tokenizer_json).save(str(work / "tokenizer.json"))
        if stop_at:
            for line in train.run(plan, out, work, -1.0):
                if line == stop_at:
                    break
        lines = list(train.run(plan, out, work, -1.0))
        assert lines[-1] == "exported at step 4"
        assert len(lines) == (3 if stop_at else 5)
        state[name] = load_file(out / "model.safetensors")
    for name, tensor in state["straight"].items():
        torch.testing.assert_close(tensor, state["stopped"][name], msg=name)
