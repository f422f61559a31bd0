"""Each sampling parameter over real processes: what it does to the answer, as a user would look for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.e2e

MESSAGES: Any = [{"role": "user", "content": "say it"}]


def ids(client: Any, **fields: Any) -> list[int]:
    """The tokens of one completion; what the client's own arguments lack goes through extra_body."""
    asked = {"prompt": "row by row", "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    own = {"prompt", "max_tokens", "temperature", "n", "seed", "logit_bias", "stop", "top_p"}
    own |= {"presence_penalty", "frequency_penalty"}
    extra = {name: value for name, value in asked.items() if name not in own}
    known = {name: value for name, value in asked.items() if name in own}
    extra["return_token_ids"] = True
    return list(client.completions.create(model="tiny", extra_body=extra, **known).choices[0].token_ids)


@pytest.mark.row("A3.5", "A4.7")
def test_greedy_choices_are_equal_and_numbered(client: Any) -> None:
    for kind in ("chat", "text"):
        if kind == "chat":
            done = client.chat.completions.create(
                model="tiny", messages=MESSAGES, n=3, temperature=0, max_tokens=6
            )
            texts = [choice.message.content for choice in done.choices]
        else:
            done = client.completions.create(model="tiny", prompt="x", n=3, temperature=0, max_tokens=6)
            texts = [choice.text for choice in done.choices]
        assert [choice.index for choice in done.choices] == [0, 1, 2]
        assert len(set(texts)) == 1


@pytest.mark.parametrize(
    "fields", [{"top_k": 1}, {"min_p": 1}, {"top_p": 1e-6}], ids=["top_k", "min_p", "top_p"]
)
@pytest.mark.row("A3.4", "A3.15", "A3.24")
def test_the_narrowest_choice_is_greedy(client: Any, fields: dict[str, Any]) -> None:
    greedy = ids(client)
    assert ids(client, temperature=2, **fields) == greedy
    assert any(ids(client, temperature=2, seed=seed) != greedy for seed in range(3))


@pytest.mark.row("A3.12", "A4.15", "A5.3")
def test_a_bias_bans_and_forces(client: Any) -> None:
    first = ids(client)[0]
    assert first not in ids(client, logit_bias={str(first): -100})
    assert ids(client, logit_bias={"70": 100}, max_tokens=3) == [70] * 3
    assert ids(client, allowed_token_ids=[71], temperature=1.5, max_tokens=3) == [71] * 3


@pytest.mark.row("A3.10", "A3.11", "A3.23", "A4.13")
def test_penalties_work_against_what_was_said(client: Any) -> None:
    pair = {"allowed_token_ids": [70, 71], "max_tokens": 20, "temperature": 1, "seed": 3}
    # Rewarded or punished for what it said, a choice between two tokens stays or changes.
    stays, changes = {}, {}
    for name in ("presence_penalty", "frequency_penalty"):
        stays[name] = Counter(ids(client, **pair, **{name: -2})).most_common(1)[0][1]
        changes[name] = Counter(ids(client, **pair, **{name: 2})).most_common(1)[0][1]
    assert stays["frequency_penalty"] >= 18
    assert changes["frequency_penalty"] <= 12
    assert stays["presence_penalty"] >= changes["presence_penalty"]
    greedy = ids(client, max_tokens=20)
    assert len(set(ids(client, max_tokens=20, repetition_penalty=2.0))) > len(set(greedy))


@pytest.mark.row("A3.6", "A3.16", "A4.4", "A5.1")
def test_lengths_by_every_rule(client: Any) -> None:
    assert len(ids(client, max_tokens=9)) == 9
    end = {"allowed_token_ids": [70], "max_tokens": 9, "ignore_eos": False}
    assert ids(client, **end, stop_token_ids=[70]) == [70]
    # The stop id is banned until then, and nothing else is allowed.
    pair = {**end, "allowed_token_ids": [70, 71]}
    late = ids(client, **pair, stop_token_ids=[70], min_tokens=5, logit_bias={"70": 50})
    assert late == [71] * 5 + [70]
    for limit in ({}, {"max_tokens": None}):
        done = client.completions.create(
            model="tiny", prompt="x", temperature=0, extra_body={"ignore_eos": True}, **limit
        )
        assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (16, "length")


@pytest.mark.row("A3.18")
def test_a_stop_token_is_kept_and_named(client: Any) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=9,
        extra_body={"allowed_token_ids": [70], "stop_token_ids": [70], "return_token_ids": True},
    )  # fmt: skip
    (choice,) = done.choices
    assert (choice.finish_reason, choice.stop_reason, choice.token_ids) == ("stop", 70, [70])
    assert choice.message.content


@pytest.mark.row("A3.25")
def test_length_penalty_ranks_beams(client: Any, stack: Any) -> None:
    """Answers that ended earlier win where length costs, and lose where it pays."""

    def total(penalty: float) -> int:
        body = {"model": "tiny", "prompt": "beam", "max_tokens": 24, "n": 4, "use_beam_search": True}
        body |= {"length_penalty": penalty, "return_token_ids": True, "stop_token_ids": list(range(60, 110))}
        done = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60).json()
        return len(done["choices"][0]["token_ids"])

    assert total(-5) <= total(1) <= total(5)
    assert total(-5) < total(5)


NAMES: dict[str, Any] = {
    "top_k": 5,
    "ignore_eos": True,
    "stop_token_ids": [3],
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "repetition_penalty": 1.1,
    "min_p": 0.1,
    "include_stop_str_in_output": True,
    "best_of": 2,
    "min_tokens": 1,
    "truncate_prompt_tokens": 2,
    "priority": 0,
    "guided_choice": ["yes", "no"],
}


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.row("A4.17", "A5.8")
def test_extra_body_and_raw_json_are_the_same(client: Any, stack: Any, kind: str) -> None:
    path = "chat/completions" if kind == "chat" else "completions"
    prompt: Any = {"messages": MESSAGES} if kind == "chat" else {"prompt": "row"}
    create = client.chat.completions.create if kind == "chat" else client.completions.create
    beams = {"use_beam_search": True, "best_of": 2, "length_penalty": 0.5}
    for extra in ({name: value} for name, value in NAMES.items()):
        _same(stack, path, create, prompt, extra)
    _same(stack, path, create, prompt, beams)


def _same(stack: Any, path: str, create: Any, prompt: Any, extra: dict[str, Any]) -> None:
    common = {"model": "tiny", "max_tokens": 4, "seed": 5, **prompt}
    raw = httpx.post(f"{stack.url}/v1/{path}", json={**common, **extra}, timeout=60)
    assert raw.status_code == 200, raw.text
    assert "x-penstock-ignored" not in raw.headers
    done = create(**common, extra_body=extra)
    for choice, other in zip(done.choices, raw.json()["choices"], strict=True):
        text = choice.text if path == "completions" else choice.message.content
        assert text == (other["text"] if path == "completions" else other["message"]["content"]), extra
