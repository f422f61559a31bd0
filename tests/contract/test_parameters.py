"""Each request field: what reaches the engine, what is refused, what is ignored aloud."""

from __future__ import annotations

from typing import Any

import pytest

REACHES = [
    ({"temperature": 0}, "sampling.temperature", 0.0),
    ({"temperature": 0.001}, "sampling.temperature", 0.01),
    ({"temperature": None}, "sampling.temperature", 1.0),
    ({"temperature": 2}, "sampling.temperature", 2.0),
    ({"top_p": 0.5}, "sampling.top_p", 0.5),
    ({"top_k": -1}, "sampling.top_k", -1),
    ({"top_k": 0}, "sampling.top_k", 0),
    ({"top_k": 40}, "sampling.top_k", 40),
    ({"min_p": 1}, "sampling.min_p", 1.0),
    ({"presence_penalty": -2}, "sampling.presence_penalty", -2.0),
    ({"frequency_penalty": 1.5}, "sampling.frequency_penalty", 1.5),
    ({"repetition_penalty": 2}, "sampling.repetition_penalty", 2.0),
    ({"seed": 7}, "sampling.seed", 7),
    ({"seed": -(2**63)}, "sampling.seed", -(2**63)),
    ({"logit_bias": {"5": -100, "6": 100.0}}, "sampling.logit_bias", {5: -100.0, 6: 100.0}),
    ({"allowed_token_ids": [5, 6]}, "sampling.allowed_token_ids", [5, 6]),
    ({"n": 3}, "n", 3),
    ({"max_tokens": 5}, "stop.max_new_tokens", 5),
    ({"min_tokens": 2, "max_tokens": 5}, "stop.min_new_tokens", 2),
    ({"ignore_eos": True}, "stop.ignore_eos", True),
    ({"priority": -3}, "scheduling.priority", -3),
    ({"cache_salt": "team-a"}, "cache.salt", "team-a"),
]


def reach(message: Any, path: str) -> Any:
    for name in path.split("."):
        message = getattr(message, name)
    if hasattr(message, "items"):
        return dict(message.items())
    return message if isinstance(message, int | float | str | bool) else list(message)


@pytest.mark.row("A3.3", "A3.4", "A3.10", "A3.11", "A3.23", "A4.5", "A4.6", "A4.7", "A4.13", "A4.15")
async def test_what_reaches_the_engine(served: Any) -> None:
    for fields, path, value in REACHES:
        for send in (served.chat, served.complete):
            answer = await send(**{"max_tokens": 3, **fields})
            assert answer.status_code == 200, answer.text
            found = reach(served.engine.requests[-1], path)
            assert found == (pytest.approx(value) if isinstance(value, float) else value), fields
            assert "x-penstock-ignored" not in answer.headers


@pytest.mark.row("A3.7")
async def test_seed_minus_one_is_none(served: Any) -> None:
    await served.chat(seed=-1, max_tokens=1)
    assert not served.engine.requests[-1].sampling.HasField("seed")


@pytest.mark.row("A3.6", "D9")
async def test_chat_limits(served: Any, fakes: Any) -> None:
    await served.chat(max_tokens=9, max_completion_tokens=3)
    assert served.engine.requests[-1].stop.max_new_tokens == 3
    await served.chat(max_completion_tokens=4)
    assert served.engine.requests[-1].stop.max_new_tokens == 4
    served.engine.script = lambda request: fakes.Script([[40]])
    await served.chat()
    request = served.engine.requests[-1]
    assert request.stop.max_new_tokens == 4096 - len(request.prompt_ids.ids)
    assert list(request.stop.stop_token_ids) == [served.tokenizer.eos_id]


@pytest.mark.row("A3.8", "A3.26", "A4.11")
async def test_stop_token_ids_and_stop_strings(served: Any) -> None:
    await served.chat(stop_token_ids=[5, 2, 5], max_tokens=1)
    assert list(served.engine.requests[-1].stop.stop_token_ids) == [5, 2]
    whole = (await served.complete(max_tokens=12)).json()["choices"][0]["text"]
    cut = (await served.complete(max_tokens=12, stop=whole[4:7])).json()["choices"][0]
    assert cut["text"] == whole[:4]
    kept = (await served.complete(max_tokens=12, stop=[whole[4:7]], include_stop_str_in_output=True)).json()
    assert kept["choices"][0]["text"] == whole[:7]


@pytest.mark.row("A3.19")
async def test_special_tokens_shown_on_demand(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script(
        [[40, 2]], finish=fakes.STOP, stop_token_id=2, by_eos=True
    )
    hidden = (await served.complete()).json()["choices"][0]["text"]
    shown = (await served.complete(skip_special_tokens=False)).json()["choices"][0]["text"]
    assert shown == hidden + "<|im_end|>"


async def test_bad_words_are_encoded_with_and_without_a_space(served: Any) -> None:
    answer = await served.complete(bad_words=["the", " fox", "brown fox"], max_tokens=1)
    assert answer.status_code == 200
    rows = [list(row.ids) for row in served.engine.requests[-1].sampling.bad_words]
    encode = served.tokenizer.tokenizer.encode
    for word in ("the", "fox", "brown fox"):
        alone, inside = encode(word).ids, encode(" " + word).ids
        assert alone in rows
        assert inside in rows
    assert (await served.complete(bad_words=["  "])).json()["error"]["param"] == "bad_words"


@pytest.mark.row("A5.1")
async def test_truncation_keeps_the_end(served: Any) -> None:
    await served.complete([1, 2, 3, 4, 5], truncate_prompt_tokens=2, max_tokens=1)
    assert list(served.engine.requests[-1].prompt_ids.ids) == [4, 5]
    await served.complete("the quick brown fox", truncate_prompt_tokens=2, max_tokens=1)
    ids = served.tokenizer.tokenizer.encode("the quick brown fox").ids
    assert list(served.engine.requests[-1].prompt_ids.ids) == ids[-2:]


@pytest.mark.row("A3.1", "A3.21", "A6.4")
async def test_messages(served: Any) -> None:
    text = await served.chat(messages="Hello", max_tokens=1)
    parts = await served.chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], max_tokens=1
    )
    plain = await served.chat(messages=[{"role": "user", "content": "Hello"}], max_tokens=1)
    assert [answer.status_code for answer in (text, parts, plain)] == [200, 200, 200]
    first, second, third = (list(request.prompt_ids.ids) for request in served.engine.requests)
    assert first == second == third
    history = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    assert (await served.chat(messages=history, max_tokens=1)).status_code == 200
    without = await served.chat(messages="Hello", add_generation_prompt=False, max_tokens=1)
    assert without.status_code == 200
    assert len(served.engine.requests[-1].prompt_ids.ids) < len(first)


REFUSED = [
    ({"audio": {"voice": "x", "format": "wav"}}, "audio", "chat"),
    ({"modalities": ["text", "audio"]}, "modalities", "chat"),
    ({"web_search_options": {}}, "web_search_options", "chat"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction", "chat"),
    *(
        ({"use_beam_search": True, name: value}, name, "")
        for name, value in {
            "top_p": 0.5,
            "top_k": 5,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.5,
            "logit_bias": {"5": 1},
            "allowed_token_ids": [5],
            "bad_words": ["x"],
            "response_format": {"type": "json_object"},
            "structured_outputs": {"regex": "a"},
            "structural_tag": {"structures": [], "triggers": []},
            "guided_json": {},
            "guided_regex": "a",
            "guided_choice": ["a"],
            "guided_grammar": "a",
            "guided_json_object": True,
        }.items()
    ),
    ({"suffix": "x"}, "suffix", ""),
    ({"prompt_embeds": "x"}, "prompt_embeds", ""),
]


async def test_unserved_features_are_refused_by_name(served: Any) -> None:
    for fields, param, only in REFUSED:
        for send in (served.chat,) if only == "chat" else (served.chat, served.complete):
            answer = await send(**fields)
            assert answer.status_code == 400, fields
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("unsupported_parameter", param)
            assert param in error["message"]


async def test_their_idle_values_are_accepted(served: Any) -> None:
    idle = {
        "response_format": {"type": "text"},
        "guided_json": None,
        "use_beam_search": False,
        "best_of": 2,
        "n": 2,
        "length_penalty": 1.0,
        "echo": False,
        "suffix": None,
        "logprob_token_ids": None,
        "early_stopping": False,
        "return_tokens_as_token_ids": False,
    }
    chat = {
        "tools": [],
        "tool_choice": "auto",
        "functions": None,
        "function_call": "none",
        "modalities": ["text"],
        "parallel_tool_calls": False,
        "audio": None,
        "reasoning_effort": "low",
        "logprobs": False,
        "top_logprobs": 0,
    }
    common = {
        "user": "u",
        "metadata": {"a": {"b": 1}},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "verbosity": "low",
    }
    answer = await served.chat(max_tokens=1, **idle, **chat, **common)
    assert answer.status_code == 200, answer.text
    assert "x-penstock-ignored" not in answer.headers
    answer = await served.complete(max_tokens=1, **idle, **common)
    assert answer.status_code == 200, answer.text
    assert "x-penstock-ignored" not in answer.headers


@pytest.mark.row("D8")
async def test_null_means_default_everywhere(served: Any) -> None:
    from penstock.frontend.api.chat_request import ChatRequest
    from penstock.frontend.api.completions_request import CompletionRequest

    nulls = {name: None for name in ChatRequest.model_fields if name not in ("messages", "max_tokens")}
    assert (await served.chat(max_tokens=1, **nulls)).status_code == 200
    nulls = {name: None for name in CompletionRequest.model_fields if name not in ("prompt", "max_tokens")}
    assert (await served.complete(max_tokens=1, **nulls)).status_code == 200


BAD = [
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_type"),
    ({"min_p": 1.1}, "min_p", "invalid_value"),
    ({"presence_penalty": 3.0}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": 10**9}, "n", "invalid_value"),
    ({"n": "2"}, "n", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"best_of": 1, "n": 2}, "best_of", "invalid_value"),
    ({"best_of": 129}, "best_of", "invalid_value"),
    ({"best_of": 33, "use_beam_search": True}, "best_of", "invalid_value"),
    ({"n": 33, "use_beam_search": True}, "n", "invalid_value"),
    ({"length_penalty": 2}, "length_penalty", "invalid_value"),
    ({"length_penalty": 6, "use_beam_search": True}, "length_penalty", "invalid_value"),
    ({"early_stopping": True}, "early_stopping", "invalid_value"),
    ({"early_stopping": "always", "use_beam_search": True}, "early_stopping", "invalid_type"),
    ({"early_stopping": 1, "use_beam_search": True}, "early_stopping", "invalid_type"),
    ({"logprob_token_ids": [1]}, "logprob_token_ids", "invalid_value"),
    ({"use_beam_search": "yes"}, "use_beam_search", "invalid_type"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
    ({"min_tokens": 100_000}, "min_tokens", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": "x" * 1025}, "stop", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
    ({"stop_token_ids": [5000]}, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": "5"}, "stop_token_ids", "invalid_type"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5000": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
    ({"allowed_token_ids": [5000]}, "allowed_token_ids", "invalid_value"),
    ({"bad_words": ["a"] * 129}, "bad_words", "invalid_value"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream_options": 5, "stream": True}, "stream_options", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"ignore_eos": 1}, "ignore_eos", "invalid_type"),
    ({"priority": 2**31}, "priority", "invalid_value"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
    ({"cache_salt": ""}, "cache_salt", "invalid_value"),
    ({"cache_salt": "x" * 129}, "cache_salt", "invalid_value"),
    ({"cache_salt": "x" * 10_000}, "cache_salt", "invalid_value"),
    ({"cache_salt": "a\0b"}, "cache_salt", "invalid_value"),
    ({"cache_salt": "a/b"}, "cache_salt", "invalid_value"),
    ({"cache_salt": "a@b"}, "cache_salt", "invalid_value"),
    ({"cache_salt": "a\\b"}, "cache_salt", "invalid_value"),
    ({"cache_salt": 5}, "cache_salt", "invalid_type"),
    ({"model": 5}, "model", "invalid_type"),
    ({"metadata": "x"}, "metadata", "invalid_type"),
]
BAD_CHAT = [
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": None}, "messages", "invalid_type"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": 5, "content": "x"}]}, "messages[0].role", "invalid_type"),
    ({"messages": ["x"]}, "messages[0]", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "user", "content": "x"}] * 10_001}, "messages", "invalid_value"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "invalid_value",
    ),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
]
BAD_COMPLETIONS = [
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"prompt": 5}, "prompt", "invalid_type"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
    ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [True]}, "prompt[0]", "invalid_type"),
    ({"prompt": [1.0]}, "prompt[0]", "invalid_type"),
    ({"prompt": ["a"] * 1025}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 100_000}, "prompt", "invalid_value"),
]


@pytest.mark.row("A3.4", "A3.8", "A3.10", "A3.11", "A3.23", "D5")
async def test_bad_values_name_their_field(served: Any) -> None:
    cases = [(send, *case) for send in (served.chat, served.complete) for case in BAD]
    cases += [(served.chat, *case) for case in BAD_CHAT]
    cases += [(served.complete, *case) for case in BAD_COMPLETIONS]
    for send, fields, param, code in cases:
        answer = await send(**fields)
        assert answer.status_code == 400, (fields, answer.text)
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, param), (str(fields)[:100], error)
        assert len(answer.content) <= 4096
    assert not served.engine.requests
    assert (await served.chat(max_tokens=1)).status_code == 200


@pytest.mark.row("A10.4", "A10.5")
async def test_unknown_fields_are_listed_or_refused(serve: Any) -> None:
    served = await serve()
    fields = {"foo": 1, "x-evil\r\nheader: 1": 2, "n" * 500: 3, "stream_options": {"bar": 1}, "stream": True}
    answer = await served.chat(max_tokens=1, **fields)
    assert answer.status_code == 200
    ignored = answer.headers["x-penstock-ignored"]
    assert ignored.split(", ")[0] == "foo"
    assert "stream_options.bar" in ignored
    assert "evil??header" in ignored
    assert "header" not in [name for name in answer.headers if name == "header"]
    answer = await served.chat(max_tokens=1, **{f"field{i}": i for i in range(1000)})
    assert len(answer.headers["x-penstock-ignored"]) < 2200
    refused = await served.chat(foo=1, headers={"x-penstock-strict": "1"})
    assert refused.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "foo",
        "code": "unsupported_parameter",
    }
    assert (await served.chat(foo=1, headers={"x-penstock-strict": "true"})).status_code == 400
    assert (await served.chat(max_tokens=1, foo=1, headers={"x-penstock-strict": "0"})).status_code == 200
    strict = await serve(strict=True)
    assert (await strict.chat(foo=1)).status_code == 400
    assert (await strict.chat(max_tokens=1)).status_code == 200


async def test_tokenize_and_detokenize(served: Any) -> None:
    ids = served.tokenizer.tokenizer.encode("the quick fox").ids
    body = (await served.post("/tokenize", {"prompt": "the quick fox"})).json()
    assert body == {"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": None}
    body = (await served.post("/v1/tokenize", {"prompt": "the", "return_token_strs": True})).json()
    assert len(body["token_strs"]) == body["count"]
    body = (await served.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})).json()
    await served.chat("hi", max_tokens=1)
    assert body["tokens"] == list(served.engine.requests[-1].prompt_ids.ids)
    back = (await served.post("/detokenize", {"tokens": ids})).json()
    assert back == {"prompt": "the quick fox"}
    assert (await served.post("/detokenize", {"tokens": [2]})).json() == {"prompt": "<|im_end|>"}
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": "b"}, "messages"),
        ({"prompt": 5}, "prompt"),
    ):
        assert (await served.post("/tokenize", body)).json()["error"]["param"] == param
    for tokens, param in (([5000], "tokens"), ([-1], "tokens[0]"), (["x"], "tokens[0]"), (None, "tokens")):
        answer = await served.post("/detokenize", {"tokens": tokens})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
