"""Tool calls and reasoning on the wire: the shapes of answers and chunks, who is told of which tools, and
what is refused.

Rows A10.9, D2, D4, D7 and D8.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from penstock.protos import engine_pb2

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, NOW]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = 'I look.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n' + CALL


def says(served: Any, fakes: Any, *texts: str, length: bool = False, **options: Any) -> None:
    """Makes the model say a text for each choice."""
    choices = [served.tokenizer.tokenizer.encode(text).ids for text in texts]
    finish = fakes.LENGTH if length else fakes.STOP
    served.engine.script = lambda request: fakes.Script(choices, finish=finish, **options)


async def chunks(served: Any, fields: dict[str, Any]) -> list[Any]:
    *events, done = await served.events(CHAT, fields)
    assert done == "[DONE]"
    return events


def calls_of(events: list[Any], index: int = 0) -> tuple[str, list[dict[str, Any]], list[Any]]:
    """Adds chunks up as a client does, strictly: (content, calls, finish reasons)."""
    content, calls, finishes = "", [], []
    for event in events:
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            content += delta.get("content") or ""
            finishes.append(choice["finish_reason"])
            for part in delta.get("tool_calls", ()):
                if part["index"] == len(calls):
                    assert set(part) == {"index", "id", "type", "function"}
                    assert part["function"]["arguments"] == ""
                    calls.append({**part, "function": dict(part["function"])})
                else:
                    assert part["index"] == len(calls) - 1
                    assert set(part) == {"index", "function"}
                    assert set(part["function"]) == {"arguments"}
                    calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return content, calls, finishes


@pytest.mark.row("D4", "A10.9")
async def test_whole_answer(served: Any, fakes: Any) -> None:
    says(served, fakes, CALL)
    body = (await served.post(CHAT, ASK)).json()
    (choice,) = body["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert choice["finish_reason"] == "tool_calls"
    assert "tool_call_invalid" not in choice
    assert call.pop("id").startswith("call_")
    assert call == {
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    assert json.loads(served.tokenizer.renders[-1].tools_json) == [WEATHER, NOW]
    assert not served.engine.requests[-1].HasField("constraint")


@pytest.mark.row("D4")
async def test_stream(served: Any, fakes: Any) -> None:
    says(served, fakes, TWO)
    events = await chunks(served, ASK)
    content, calls, finishes = calls_of(events)
    assert content == "I look."
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("now", "{}"),
        ("get_weather", '{"city": "Paris"}'),
    ]
    assert len({call["id"] for call in calls}) == 2
    assert finishes == [None] * (len(finishes) - 1) + ["tool_calls"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0]["delta"] == {}
    pieces = [e for e in events if (e["choices"][0]["delta"].get("tool_calls") or [{}])[0].get("function")]
    assert len(pieces) > 4, "arguments came in one piece"


async def test_an_answer_without_calls(served: Any, fakes: Any) -> None:
    says(served, fakes, "No <b>tools</b> needed.")
    (choice,) = (await served.post(CHAT, ASK)).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "No <b>tools</b> needed.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    content, calls, finishes = calls_of(await chunks(served, ASK))
    assert (content, calls, finishes[-1]) == ("No <b>tools</b> needed.", [], "stop")


@pytest.mark.row("D7")
async def test_length_stays_length_and_the_cut_is_told(served: Any, fakes: Any) -> None:
    says(served, fakes, CALL[:60], length=True)
    (choice,) = (await served.post(CHAT, ASK)).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["tool_call_invalid"] is True
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert '{"city": "Paris"}'.startswith(arguments)
    events = await chunks(served, ASK)
    assert calls_of(events)[1][0]["function"]["arguments"] == arguments
    assert events[-1]["choices"][0]["tool_call_invalid"] is True


async def test_what_cannot_be_read_is_content(served: Any, fakes: Any) -> None:
    says(served, fakes, "<tool_call>get_weather(Paris)</tool_call>")
    (choice,) = (await served.post(CHAT, ASK)).json()["choices"]
    assert choice["message"]["content"] == "<tool_call>get_weather(Paris)</tool_call>"
    assert (choice["finish_reason"], choice["tool_call_invalid"]) == ("stop", True)


async def test_several_choices_logprobs_and_ids(served: Any, fakes: Any) -> None:
    says(served, fakes, TWO, "Plain.")
    fields = {**ASK, "n": 2, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    whole = (await served.post(CHAT, fields)).json()["choices"]
    assert [choice["finish_reason"] for choice in whole] == ["tool_calls", "stop"]
    events = await chunks(served, {**fields, "stream_options": {"include_usage": True}})
    for index, choice in enumerate(whole):
        content, calls, _ = calls_of(events, index)
        assert content == choice["message"]["content"]
        assert [call["function"] for call in calls] == [
            call["function"] for call in choice["message"].get("tool_calls", [])
        ]
        own = [e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == index]
        streamed = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert streamed == choice["logprobs"]["content"]
        assert [i for c in own for i in c.get("token_ids", [])] == choice["token_ids"]
        assert b"".join(bytes(entry["bytes"]) for entry in streamed).decode() == (TWO, "Plain.")[index]
    assert events[-1]["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in whole)


async def test_stop_strings_end_a_call(served: Any, fakes: Any) -> None:
    says(served, fakes, TWO)
    (choice,) = (await served.post(CHAT, {**ASK, "stop": ["Par"]})).json()["choices"]
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ["{}", '{"city": "']
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", "Par")
    assert choice["tool_call_invalid"] is True


async def test_one_call_when_asked_so(served: Any, fakes: Any) -> None:
    says(served, fakes, TWO)
    fields = {**ASK, "parallel_tool_calls": False}
    (choice,) = (await served.post(CHAT, fields)).json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]
    assert [call["function"]["name"] for call in calls_of(await chunks(served, fields))[1]] == ["now"]


@pytest.mark.row("A10.9")
async def test_none_tells_the_model_of_no_tools(served: Any, fakes: Any) -> None:
    says(served, fakes, CALL)
    (choice,) = (await served.post(CHAT, {**ASK, "tool_choice": "none"})).json()["choices"]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"
    assert not served.tokenizer.renders[-1].tools_json
    await served.post(CHAT, {**ASK, "tools": []})
    assert not served.tokenizer.renders[-1].tools_json


@pytest.mark.row("D4", "A10.9")
async def test_required_and_named_are_constrained(served: Any, fakes: Any) -> None:
    says(served, fakes, CALL)
    (choice,) = (await served.post(CHAT, {**ASK, "tool_choice": "required"})).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    grammar = served.engine.requests[-1].constraint.grammar
    assert "get_weather" in grammar
    assert "now" in grammar
    named = {"type": "function", "function": {"name": "get_weather"}}
    (choice,) = (await served.post(CHAT, {**ASK, "tool_choice": named})).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert "now" not in served.engine.requests[-1].constraint.grammar
    assert json.loads(served.tokenizer.renders[-1].tools_json) == [WEATHER]
    assert calls_of(await chunks(served, {**ASK, "tool_choice": named}))[2][-1] == "stop"


async def test_allowed_tools(served: Any, fakes: Any) -> None:
    says(served, fakes, CALL)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert (await served.post(CHAT, {**ASK, "tool_choice": choice})).status_code == 200
    assert "get_weather" not in served.engine.requests[-1].constraint.grammar
    allowed["mode"] = "auto"
    assert (await served.post(CHAT, {**ASK, "tool_choice": choice})).status_code == 200
    assert not served.engine.requests[-1].HasField("constraint")
    assert json.loads(served.tokenizer.renders[-1].tools_json) == [NOW]


async def test_strict_tools_are_constrained_where_they_may_be_called(served: Any, fakes: Any) -> None:
    says(served, fakes, CALL)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    await served.post(CHAT, {**ASK, "tools": [strict]})
    assert '"city"' in served.engine.requests[-1].constraint.grammar
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object", "required": ["Zebra"]}},
    }
    await served.post(CHAT, {**ASK, "response_format": form})
    assert "Zebra" in served.engine.requests[-1].constraint.grammar
    assert "get_weather" in served.engine.requests[-1].constraint.grammar
    answer = await served.post(CHAT, {**ASK, "tool_choice": "required", "response_format": form})
    assert answer.status_code == 400


async def test_legacy_functions(served: Any, fakes: Any) -> None:
    says(served, fakes, TWO)
    fields = {"messages": ASK["messages"], "functions": [WEATHER["function"], NOW["function"]]}
    (choice,) = (await served.post(CHAT, fields)).json()["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "now", "arguments": "{}"}
    assert "tool_calls" not in choice["message"]
    assert json.loads(served.tokenizer.renders[-1].tools_json) == [WEATHER, NOW]
    deltas = [event["choices"][0]["delta"] for event in await chunks(served, fields)]
    parts = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert parts[0] == {"name": "now", "arguments": ""}
    assert "".join(part["arguments"] for part in parts) == "{}"
    assert all("name" not in part for part in parts[1:])
    says(served, fakes, CALL)
    (choice,) = (await served.post(CHAT, {**fields, "function_call": {"name": "get_weather"}})).json()[
        "choices"
    ]
    assert choice["finish_reason"] == "stop"
    history = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "noon"},
    ]
    assert (await served.post(CHAT, {**fields, "messages": history})).status_code == 200
    sent = json.loads(served.tokenizer.renders[-1].messages_json)
    assert sent[1]["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": "{}"}}]
    assert sent[2]["role"] == "tool"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "invalid_type"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    (
        {"tools": [{"type": "function", "function": {}}]},
        "tools[0].function.name",
        "missing_required_parameter",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        "invalid_value",
    ),
    ({"tools": [NOW, WEATHER, NOW]}, "tools[2].function.name", "invalid_value"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
        "invalid_type",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters",
        "invalid_value",
    ),
    ({"tool_choice": "any"}, "tool_choice", "invalid_value"),
    ({"tool_choice": 1}, "tool_choice", "invalid_type"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing_required_parameter"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "nope"}}},
        "tool_choice.function.name",
        "invalid_value",
    ),
    (
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "nope"}}],
                },
            }
        },
        "tool_choice.allowed_tools.tools[0].function.name",
        "invalid_value",
    ),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": None, "function_call": {"name": "now"}}, "function_call", "invalid_value"),
    ({"functions": [{"name": "f"}]}, "functions", "invalid_value"),
    ({"tools": None, "functions": [{"name": "f"}, {"name": "f"}]}, "functions[1].name", "invalid_value"),
    ({"parallel_tool_calls": "yes"}, "parallel_tool_calls", "invalid_type"),
    ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex", "invalid_value"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"arguments": ""}}]}]},
        "messages[0].tool_calls[0].function.name",
        "missing_required_parameter",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}]},
        "messages[0].tool_calls[0].function.arguments",
        "invalid_type",
    ),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=[f"{row[1]}-{i}" for i, row in enumerate(BAD)])
async def test_bad_values_name_the_field(served: Any, fields: dict[str, Any], param: str, code: str) -> None:
    for stream in (False, True):
        answer = await served.post(CHAT, {**ASK, **fields, "stream": stream})
        assert answer.status_code == 400, answer.text
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
    assert not served.engine.requests


async def test_the_template_must_know_tools(serve: Any, fakes: Any) -> None:
    served = await serve(tokenizer_options={"supports_tools": False})
    answer = await served.post(CHAT, ASK)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert (await served.post(CHAT, {**ASK, "tool_choice": "none"})).status_code == 200
    says(served, fakes, CALL)
    forced = await served.post(CHAT, {**ASK, "tool_choice": "required"})
    assert forced.json()["choices"][0]["finish_reason"] == "tool_calls"
    off = await serve(tool_call_parser="none")
    answer = await off.post(CHAT, ASK)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    ("name", "text", "special"),
    [
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}]', ("[TOOL_CALLS]",)),
        ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}', ("<|python_tag|>",)),
        ("pythonic", "[now()]", ()),
        ("json", '{"name": "now", "arguments": {}}', ()),
    ],
)
async def test_marks_that_are_special_tokens_are_read(
    serve: Any, fakes: Any, name: str, text: str, special: tuple[str, ...]
) -> None:
    base = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *special)
    served = await serve(tokenizer_options={"special": base}, tool_call_parser=name)
    says(served, fakes, text + "<|im_start|>")
    (choice,) = (await served.post(CHAT, ASK)).json()["choices"]
    assert choice["message"]["content"] is None, "a special token was shown"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    says(served, fakes, "plain" + "<|im_start|>")
    (choice,) = (await served.post(CHAT, ASK)).json()["choices"]
    assert choice["message"]["content"] == "plain"


@pytest.mark.parametrize("by_eos", [True, False], ids=["eos", "stop-id"])
async def test_the_end_of_a_turn_is_no_content_beside_a_call(served: Any, fakes: Any, by_eos: bool) -> None:
    """Even where special tokens are shown: those inside an answer are, what ends it is not."""
    end = served.tokenizer.tokenizer.token_to_id("<|im_end|>")
    fields = {**ASK, "skip_special_tokens": False, "stop_token_ids": [end]}
    for text, content, called in ((CALL, None, 1), ("a<|im_start|>b", "a<|im_start|>b", 0)):
        options: dict[str, Any] = {"stop_token_id": end, "by_eos": by_eos}
        says(served, fakes, text + "<|im_end|>", **options)
        (choice,) = (await served.post(CHAT, fields)).json()["choices"]
        assert choice["message"]["content"] == content
        assert len(choice["message"].get("tool_calls", ())) == called
        streamed, calls, _ = calls_of(await chunks(served, fields))
        assert (streamed, len(calls)) == (content or "", called)
    kept = {**fields, "include_stop_str_in_output": True}
    (choice,) = (await served.post(CHAT, kept)).json()["choices"]
    assert choice["message"]["content"] == "a<|im_start|>b<|im_end|>"
    plain = {"messages": ASK["messages"], "skip_special_tokens": False, "stop_token_ids": [end]}
    (choice,) = (await served.post(CHAT, plain)).json()["choices"]
    assert choice["message"]["content"] == "a<|im_start|>b<|im_end|>"


# ------------------------------------------------------------------------------------- reasoning


async def test_reasoning(serve: Any, fakes: Any) -> None:
    served = await serve(
        tokenizer_options={"special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")}
    )
    served.tokenizer.reasoning_parser = "qwen3"
    says(served, fakes, "<think>\nHm, yes.\n</think>\n\nThe answer.")
    fields = {"messages": ASK["messages"]}
    body = (await served.post(CHAT, fields)).json()
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "The answer.",
        "refusal": None,
        "reasoning": "Hm, yes.",
        "reasoning_content": "Hm, yes.",
    }
    thought = len(served.tokenizer.tokenizer.encode("\nHm, yes.\n").ids)
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == thought
    events = await chunks(served, {**fields, "stream_options": {"include_usage": True}})
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == "Hm, yes."
    assert "".join(delta.get("content", "") for delta in deltas) == "The answer."
    assert events[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == thought
    (choice,) = (await served.post(CHAT, {**fields, "include_reasoning": False})).json()["choices"]
    assert set(choice["message"]) == {"role", "content", "refusal"}
    # Whatever form an answer has begins behind it.
    opening = served.tokenizer.tokenizer.token_to_id("<think>")
    for form, kind, value in (
        ({"guided_choice": ["yes", "no"]}, "choice", engine_pb2.ChoiceList(values=["yes", "no"])),
        ({"guided_regex": "a/b"}, "regex", "a/b"),
        ({"response_format": {"type": "json_object"}, "guided_whitespace_pattern": "_"}, "json_object", True),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        (
            {"structural_tag": {"format": {"type": "any_text"}}},
            "structural_tag",
            '{"format":{"type":"any_text"}}',
        ),
    ):
        await served.post(CHAT, {**fields, **form})
        constraint = served.engine.requests[-1].constraint
        assert getattr(constraint, kind) == value
        assert constraint.preamble.startswith(f"start: (<[{opening}]> ")
        assert not constraint.starts_after
    # Tools that may be called change nothing about a form they cannot stand beside, strict or not.
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    await served.post(CHAT, {**fields, "tools": [strict], "guided_grammar": 'start: "a"'})
    assert served.engine.requests[-1].constraint.grammar == 'start: "a"'
    assert served.engine.requests[-1].constraint.preamble


@pytest.mark.row("A10.9")
async def test_channels_of_harmony(serve: Any, fakes: Any) -> None:
    """Reasoning, a remark and a call of one answer, its marks special tokens, streamed and not."""
    marks = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")
    served = await serve(
        tokenizer_options={"special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks)}
    )
    served.tokenizer.tool_parser, served.tokenizer.reasoning_parser = "openai", "openai_gptoss"
    says(
        served,
        fakes,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Paris"}',
    )
    (choice,) = (await served.post(CHAT, ASK)).json()["choices"]
    message = choice["message"]
    assert (message["reasoning"], message["content"]) == ("Hm.", "I look.")
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert choice["finish_reason"] == "tool_calls"
    events = await chunks(served, ASK)
    content, calls, finishes = calls_of(events)
    assert (content, finishes[-1]) == ("I look.", "tool_calls")
    assert calls[0]["function"] == message["tool_calls"][0]["function"]
    thought = "".join(event["choices"][0]["delta"].get("reasoning", "") for event in events)
    assert thought == "Hm."
    # A form is for the answer alone, which has a header of its own.
    says(served, fakes, "<|channel|>final<|message|>5")
    form = {"messages": ASK["messages"], "guided_choice": ["4", "5"]}
    (choice,) = (await served.post(CHAT, form)).json()["choices"]
    assert choice["message"]["content"] == "5"
    ids = {mark: served.tokenizer.tokenizer.token_to_id(mark) for mark in marks}
    head = f'<[{ids["<|channel|>"]}]> "final" <[{ids["<|message|>"]}]>'
    assert head in served.engine.requests[-1].constraint.preamble.splitlines()[0]


async def test_a_prompt_that_ends_inside_the_reasoning(served: Any, fakes: Any) -> None:
    served.tokenizer.reasoning_parser = "deepseek_r1"
    served.tokenizer.ends_in_reasoning = True
    says(served, fakes, "So.</think>" + CALL)
    (choice,) = (await served.post(CHAT, {**ASK, "tool_choice": "required"})).json()["choices"]
    assert choice["message"]["reasoning"] == "So."
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    constraint = served.engine.requests[-1].constraint
    ids = served.tokenizer.tokenizer.encode("</think>").ids
    assert list(constraint.starts_after) == ids
    await served.post(CHAT, {"messages": ASK["messages"], "guided_choice": ["a", "b"]})
    constraint = served.engine.requests[-1].constraint
    assert list(constraint.starts_after) == ids
    assert constraint.preamble == "start: /\\s{0,8}/\n"


async def test_reasoning_tokens_on_every_chunk(served: Any, fakes: Any) -> None:
    served.tokenizer.reasoning_parser = "qwen3"
    says(served, fakes, "<think>a b c</think>d")
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await chunks(served, {"messages": ASK["messages"], "stream_options": options})
    counts = [
        event["usage"]["completion_tokens_details"]["reasoning_tokens"] for event in events if event["usage"]
    ]
    assert counts == sorted(counts)
    assert counts[-1] > 0


async def test_parsers_by_flag(serve: Any, fakes: Any) -> None:
    served = await serve(reasoning_parser="tags:<r>,</r>")
    says(served, fakes, "<r>x</r>y")
    (choice,) = (await served.chat()).json()["choices"]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("x", "y")
    served = await serve(reasoning_parser="none")
    served.tokenizer.reasoning_parser = "qwen3"
    says(served, fakes, "<think>x</think>y")
    assert (await served.chat()).json()["choices"][0]["message"]["content"] == "<think>x</think>y"
    served = await serve(reasoning_parser="deepseek_r1")
    says(served, fakes, "x</think>y")
    (choice,) = (await served.chat()).json()["choices"]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("x", "y")


# ------------------------------------------------------------------------------- the real client


async def test_the_stream_helper_of_the_client(served: Any, fakes: Any) -> None:
    says(served, fakes, TWO, "Plain.")
    async with (
        openai.AsyncOpenAI(base_url=served.base_url, api_key="EMPTY") as client,
        client.chat.completions.stream(model="fake-model", n=2, **ASK) as stream,
    ):
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert "tool_calls.function.arguments.delta" in kinds
    first, second = final.choices
    assert first.finish_reason == "tool_calls"
    assert [call.function.name for call in first.message.tool_calls or []] == ["now", "get_weather"]
    assert first.message.content == "I look."
    assert second.message.content == "Plain."


# ------------------------------------------------------------------------------------- prompts


@pytest.mark.row("A5.2")
async def test_the_template_gets_what_the_request_says(served: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    history = [
        {"role": "developer", "content": parts},
        {"role": "system", "content": parts},
        {"role": "user", "content": parts},
        {
            "role": "assistant",
            "content": [{"type": "output_text", "text": "c"}, {"type": "refusal", "refusal": "no"}],
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "now", "arguments": ""}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "It is"},
    ]
    fields = {
        "messages": history,
        "documents": [{"title": "x", "text": "y"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "high",
        "continue_final_message": True,
        "tools": [NOW],
    }
    # The fake's own template is simpler than the parts: only what it was handed matters.
    await served.post(CHAT, {**fields, "max_tokens": 1})
    render = served.tokenizer.renders[-1]
    assert json.loads(render.messages_json) == history
    assert json.loads(render.documents_json) == fields["documents"]
    assert json.loads(render.template_kwargs_json) == fields["chat_template_kwargs"]
    assert json.loads(render.tools_json) == [NOW]
    assert render.reasoning_effort == "high"
    assert render.continue_final_message
    assert render.HasField("add_generation_prompt")
    assert not render.add_generation_prompt
    bad = [{"role": "user", "content": [{"type": "refusal", "text": "x"}]}]
    answer = await served.post(CHAT, {"messages": bad})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content[0].refusal")
