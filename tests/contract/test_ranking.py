"""best_of, beam search, echo, suffix and the ways to show log-probabilities, as the wire has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

TEXT = "/v1/completions"
NOW = {"type": "function", "function": {"name": "now"}}
CHAT = "/v1/chat/completions"


def ids_of(served: Any, text: str) -> list[int]:
    ids: list[int] = served.tokenizer.tokenizer.encode(text).ids
    return ids


def script(served: Any, fakes: Any, *texts: str, **options: Any) -> None:
    choices = [ids_of(served, text) for text in texts]
    served.engine.script = lambda request: fakes.Script(choices, **options)


def mean_of(served: Any, fakes: Any, text: str) -> float:
    ids = ids_of(served, text)
    return float(sum(fakes.fake_row(token, 0)[0] for token in ids) / len(ids))


# ------------------------------------------------------------------------------------------- best_of


@pytest.mark.row("A3.14", "A4.14")
async def test_best_of_shows_the_most_probable(served: Any, fakes: Any) -> None:
    """A2.14, A4.14: the fake engine finds a token the more probable the lower its id."""
    texts = ["zzzz", "aaaa", "mmmm", "bb"]
    script(served, fakes, *texts)
    means = {text: mean_of(served, fakes, text) for text in texts}
    best = sorted(texts, key=lambda text: -means[text])[:2]
    answer = await served.complete(n=2, best_of=4, max_tokens=9)
    assert [choice["text"] for choice in answer.json()["choices"]] == best
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer.json()["choices"])
    # As with OpenAI all that was generated is counted.
    total = sum(len(ids_of(served, text)) for text in texts)
    assert answer.json()["usage"]["completion_tokens"] == total
    request = served.engine.requests[-1]
    assert (request.n, request.HasField("best_of"), request.output.logprobs) == (4, False, 0)

    chat = await served.chat(n=2, best_of=4, logprobs=True, top_logprobs=1)
    assert [choice["message"]["content"] for choice in chat.json()["choices"]] == best
    assert len(chat.json()["choices"][0]["logprobs"]["content"]) == len(ids_of(served, best[0]))


async def test_best_of_chooses_among_calls_and_texts(served: Any, fakes: Any) -> None:
    """What was read of each candidate goes with it, to the place it gets."""
    call = '<tool_call>\n{"name": "now", "arguments": {"zone": "CET"}}\n</tool_call>'
    texts = ["zzzz", "aaaa", call, "yyyy"]
    script(served, fakes, *texts, finish=fakes.STOP)
    fields = {"messages": "x", "tools": [NOW], "n": 2, "best_of": 4}
    body = (await served.post(CHAT, fields)).json()
    found = [
        (choice["message"]["content"], choice["message"].get("tool_calls"), choice["finish_reason"])
        for choice in body["choices"]
    ]
    means = {text: mean_of(served, fakes, text) for text in texts}
    best = sorted(texts, key=lambda text: -means[text])[:2]
    assert call in best
    for text, (content, calls, reason) in zip(best, found, strict=True):
        if text == call:
            assert (content, reason) == (None, "tool_calls")
            assert [one["function"]["arguments"] for one in calls] == ['{"zone": "CET"}']
        else:
            assert (content, calls, reason) == (text, None, "stop")
    *events, _ = await served.events(CHAT, fields)
    for index, text in enumerate(best):
        choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        parts = [part for choice in choices for part in choice["delta"].get("tool_calls", ())]
        said = "".join(choice["delta"].get("content") or "" for choice in choices)
        assert said == ("" if text == call else text)
        arguments = "".join(part["function"]["arguments"] for part in parts)
        assert arguments == ('{"zone": "CET"}' if text == call else "")
        assert choices[-1]["finish_reason"] == ("tool_calls" if text == call else "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [NOW], "tool_choice": "required"}, "tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "now"}}}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "now", "strict": True}}]}, "tools"),
        ({"functions": [{"name": "now"}], "function_call": {"name": "now"}}, "functions"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
    ],
)
async def test_a_beam_search_takes_no_form(served: Any, fields: dict[str, Any], param: str) -> None:
    before = len(served.engine.requests)
    answer = await served.post(CHAT, {"messages": "x", "use_beam_search": True, "n": 2, **fields})
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
        "unsupported_parameter",
        param,
    )
    assert len(served.engine.requests) == before


async def test_beams_may_call_what_they_like(served: Any, fakes: Any) -> None:
    script(
        served, fakes, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "aa", finish=fakes.STOP
    )
    answer = await served.post(CHAT, {"messages": "x", "use_beam_search": True, "n": 2, "tools": [NOW]})
    first, second = answer.json()["choices"]
    assert first["message"]["tool_calls"][0]["function"]["name"] == "now"
    assert second["message"]["content"] == "aa"


@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_best_of_streams_whole_answers(served: Any, fakes: Any, path: str) -> None:
    script(served, fakes, "zzzz", "aaaa", "mmmm")
    body = {"messages": "x"} if path == CHAT else {"prompt": "x"}
    events = await served.events(path, {**body, "n": 1, "best_of": 3})
    texts = [
        choice["delta"].get("content", "") if path == CHAT else choice["text"]
        for event in events[:-1]
        for choice in event["choices"]
    ]
    assert [text for text in texts if text] == ["aaaa"]
    finishes = [choice["finish_reason"] for event in events[:-1] for choice in event["choices"]]
    assert [reason for reason in finishes if reason] == ["length"]
    assert events[-1] == "[DONE]"


async def test_a_stop_string_ends_a_candidate_before_it_is_ranked(served: Any, fakes: Any) -> None:
    """Up to its stop string the second is the best; what it would have said then does not count."""
    script(served, fakes, "bbbb", "aaXzzzzzz")
    answer = await served.complete(best_of=2, stop="X")
    choice = answer.json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("aa", "X")


# --------------------------------------------------------------------------------- ends of choices


@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_that_met_its_stop_string_ends_in_the_engine(
    served: Any, fakes: Any, stream: bool
) -> None:
    served.engine.step_delay_s = 0.002
    script(served, fakes, "aX" + "a" * 200, "b" * 60, "cX" + "c" * 200)
    body = {"prompt": "x", "n": 3, "stop": "X", "max_tokens": 300}
    if stream:
        await served.events(TEXT, body)
    else:
        answer = await served.post(TEXT, body)
        assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["stop", "length", "stop"]
        assert answer.json()["usage"]["completion_tokens"] < 70
    assert sorted(served.engine.ended_choices) == [0, 2]
    # The last one ended by itself: there was nothing left to abort.
    assert not served.engine.aborted


# ---------------------------------------------------------------------------------------------- beams


@pytest.mark.row("A3.17", "A3.25")
async def test_beams_are_the_engines(served: Any, fakes: Any) -> None:
    """A3.17, A3.25, X3."""
    script(served, fakes, "best", "next", tokens_per_step=100)
    fields = {"use_beam_search": True, "n": 2, "best_of": 4, "length_penalty": 0.5, "early_stopping": "never"}
    answer = await served.complete(**fields, temperature=0.7, seed=3, top_p=1, top_k=-1, min_tokens=2)
    assert [choice["text"] for choice in answer.json()["choices"]] == ["best", "next"]
    request = served.engine.requests[-1]
    assert (request.n, request.HasField("best_of")) == (2, False)
    beams = request.beam_search
    assert (beams.width, beams.length_penalty) == (4, 0.5)
    assert (beams.early_stopping, beams.exhaustive) == (False, True)
    assert request.stop.min_new_tokens == 2
    assert not request.sampling.ByteSize()
    events = await served.events(CHAT, {"messages": "x", **fields, "early_stopping": True})
    deltas = [
        (choice["index"], choice["delta"]["content"])
        for event in events[:-1]
        for choice in event["choices"]
        if choice["delta"].get("content")
    ]
    assert deltas == [(0, "best"), (1, "next")]
    assert served.engine.requests[-1].beam_search.early_stopping


async def test_the_models_own_defaults_do_not_reach_a_beam_search(serve: Callable[..., Any]) -> None:
    served = await serve(generation_defaults={"repetition_penalty": 1.1, "top_p": 0.8, "temperature": 0.6})
    fields = {"use_beam_search": True, "n": 2, "max_tokens": 3, "return_effective_params": True}
    answer = await served.complete(**fields)
    assert answer.status_code == 200
    assert not served.engine.requests[-1].sampling.ByteSize()
    assert served.engine.requests[-1].beam_search.width == 2
    assert answer.json()["effective_params"] == {
        "use_beam_search": {"value": True, "source": "request"},
        "length_penalty": {"value": 1.0, "source": "default"},
        "early_stopping": {"value": False, "source": "default"},
    }


# ----------------------------------------------------------------------------------------------- echo


@pytest.mark.row("A4.10")
async def test_echo_scores_the_prompt(served: Any, fakes: Any) -> None:
    """A4.10: the first token has null, the offsets are those of the whole text."""
    script(served, fakes, "yes")
    answer = await served.complete("héllo", echo=True, logprobs=2, max_tokens=3, n=1)
    choice = answer.json()["choices"][0]
    assert choice["text"] == "hélloyes"
    prompt, output = ids_of(served, "héllo"), ids_of(served, "yes")
    block = choice["logprobs"]
    assert len(block["tokens"]) == len(prompt) + len(output)
    assert block["token_logprobs"][0] is None
    assert block["top_logprobs"][0] is None
    expected = [fakes.fake_row(token, 0)[0] for token in [*prompt, *output]]
    assert block["token_logprobs"][1:] == pytest.approx(expected[1:])
    assert all(len(top) in (1, 2, 3) for top in block["top_logprobs"][1:])
    assert "prompt_logprobs" not in choice
    starts = block["text_offset"]
    assert starts == sorted(starts)
    for token, start in zip(block["tokens"], starts, strict=True):
        if "\ufffd" not in token:
            assert choice["text"][start:].startswith(token)
    assert starts[len(prompt)] == len("héllo")


@pytest.mark.row("A4.4", "A4.10")
async def test_echo_alone(served: Any, fakes: Any) -> None:
    """max_tokens 0: the prompt is all there is; usage counts no output."""
    served.engine.script = lambda request: fakes.Script([[]] * (request.n or 1))
    answer = await served.complete(["one", "two"], echo=True, logprobs=0, max_tokens=0)
    body = answer.json()
    assert [choice["text"] for choice in body["choices"]] == ["one", "two"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]
    assert body["usage"]["completion_tokens"] == 0
    assert len(body["choices"][0]["logprobs"]["tokens"]) == len(ids_of(served, "one"))
    assert served.engine.requests[-1].stop.max_new_tokens == 0
    assert served.engine.requests[-1].output.prompt_logprobs == 0
    ids = ids_of(served, "three")
    answer = await served.complete(ids, echo=True, max_tokens=0)
    assert answer.json()["choices"][0]["text"] == "three"
    assert not served.engine.requests[-1].output.HasField("prompt_logprobs")


async def test_echo_and_prompt_logprobs_together(served: Any, fakes: Any) -> None:
    script(served, fakes, "a")
    answer = await served.complete("abc", echo=True, logprobs=1, prompt_logprobs=3)
    choice = answer.json()["choices"][0]
    assert served.engine.requests[-1].output.prompt_logprobs == 3
    assert [len(row) for row in choice["prompt_logprobs"][1:]] == [3] * (len(ids_of(served, "abc")) - 1)


async def test_a_streamed_echo_comes_first(served: Any, fakes: Any) -> None:
    script(served, fakes, "yes", "no")
    body = {"prompt": ["ab", "cd"], "echo": True, "logprobs": 1, "n": 2}
    events = await served.events(TEXT, body)
    whole = await served.complete(**body)
    for choice in whole.json()["choices"]:
        parts = [
            part for event in events[:-1] for part in event["choices"] if part["index"] == choice["index"]
        ]
        assert parts[0]["text"] == ["ab", "cd"][choice["index"] // 2]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [v for part in parts if part["logprobs"] for v in part["logprobs"][name]] == (
                choice["logprobs"][name]
            )


async def test_offsets_never_go_back_while_text_is_held(served: Any, fakes: Any) -> None:
    """A stop string that almost comes holds text back; halves of characters have no text of their own."""
    script(served, fakes, "naïve STO 🙂p STOP more")
    body = {"prompt": "x", "logprobs": 0, "stop": "STOP", "max_tokens": 60}
    events = await served.events(TEXT, body)
    parts = [part for event in events[:-1] for part in event["choices"]]
    text = "".join(part["text"] for part in parts)
    assert text == "naïve STO 🙂p "
    offsets = [offset for part in parts if part["logprobs"] for offset in part["logprobs"]["text_offset"]]
    tokens = [token for part in parts if part["logprobs"] for token in part["logprobs"]["tokens"]]
    assert offsets == sorted(offsets)
    whole = text + "STOP"
    for token, offset in zip(tokens, offsets, strict=True):
        if "\ufffd" not in token:
            assert whole[offset:].startswith(token)


@pytest.mark.row("A3.22")
async def test_a_chat_echo_is_the_assistants_own_beginning(served: Any, fakes: Any) -> None:
    """X16."""
    script(served, fakes, " sure")
    begun = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four,"}]
    answer = await served.chat(messages=begun, echo=True, continue_final_message=True)
    assert answer.json()["choices"][0]["message"]["content"] == "Four, sure"
    begun[1]["content"] = [{"type": "text", "text": "Four"}, {"type": "text", "text": ","}]  # type: ignore[assignment]
    body = {"messages": begun, "echo": True, "continue_final_message": True}
    events = await served.events(CHAT, body)
    parts = [choice["delta"].get("content", "") for event in events[:-1] for choice in event["choices"]]
    assert parts[0] == "Four,"
    assert "".join(parts) == "Four, sure"
    asked = await served.chat(messages=begun[:1], echo=True)
    assert asked.json()["choices"][0]["message"]["content"] == " sure"
    with_tools = await served.post(CHAT, {**body, "tools": [NOW]})
    assert with_tools.json()["choices"][0]["message"]["content"] == "Four, sure"


async def test_a_streamed_echo_is_bounded(served: Any) -> None:
    long = "x" * 600
    answer = await served.complete([long] * 2, echo=True, logprobs=20, stream=True, max_tokens=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")
    assert (await served.complete([long] * 2, echo=True, logprobs=20, max_tokens=1)).status_code == 200


# ------------------------------------------------------------------------------------ shown otherwise


async def test_tokens_as_ids(served: Any, fakes: Any) -> None:
    script(served, fakes, "é")
    ids = ids_of(served, "é")
    names = [f"token_id:{token}" for token in ids]
    answer = await served.complete(logprobs=1, return_tokens_as_token_ids=True)
    block = answer.json()["choices"][0]["logprobs"]
    assert block["tokens"] == names
    assert [list(top) for top in block["top_logprobs"]] == [[name] for name in names]
    answer = await served.chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    content = answer.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == names
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "é"


async def test_asked_ids_stand_in_for_the_best(served: Any, fakes: Any) -> None:
    script(served, fakes, "ab")
    asked = [40, 50, 40]
    answer = await served.chat(logprobs=True, top_logprobs=5, logprob_token_ids=asked)
    content = answer.json()["choices"][0]["logprobs"]["content"]
    assert list(served.engine.requests[-1].output.logprob_token_ids) == [40, 50]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2]
    values = [top["logprob"] for top in content[0]["top_logprobs"]]
    assert values == pytest.approx([fakes.fake_row(token, 0)[0] for token in (40, 50)])


# --------------------------------------------------------------------------------------------- suffix


@pytest.mark.row("A4.3")
async def test_suffix(served: Any, fakes: Any) -> None:
    """A4.3, X7."""
    refused = await served.complete("a", suffix="b")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "suffix")
    served.tokenizer.fills_in = True
    assert (await served.complete(["a", "c"], suffix="b", max_tokens=2)).status_code == 200
    first, second = served.engine.requests[-2:]
    assert list(first.prompt_ids.ids) == ids_of(served, "<a|b>")
    assert list(second.prompt_ids.ids) == ids_of(served, "<c|b>")
    assert list(first.stop.stop_token_ids) == [5]
    for fields in ({"echo": True}, {"truncate_prompt_tokens": 5}, {"prompt": [1, 2]}):
        answer = await served.post(TEXT, {"prompt": "a", "suffix": "b", **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "suffix")
