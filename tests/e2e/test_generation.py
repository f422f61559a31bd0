"""What a user gets from the whole system, against transformers and against itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.e2e

PROMPTS = [f"{'ab' * i} prompt number {i}" for i in range(16)]


@pytest.fixture(scope="module")
def reference(stack: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(stack.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(stack.folder)

    def answer(ids: list[int], max_tokens: int) -> list[int]:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False, use_cache=True
            )
        return out[0, len(ids) :].tolist()

    answer.tokenizer = tokenizer  # type: ignore[attr-defined]
    return answer


@pytest.mark.row("A3.3")
async def test_greedy_tokens_equal_transformers_alone_and_sixteen_at_once(
    async_client: Any, reference: Any
) -> None:
    async def ask(prompt: str) -> list[int]:
        done = await async_client.completions.create(
            model="tiny", prompt=prompt, max_tokens=24, temperature=0, extra_body={"return_token_ids": True}
        )
        return list(done.choices[0].token_ids)

    expected = [reference(reference.tokenizer(prompt)["input_ids"], 24) for prompt in PROMPTS]
    alone = [await ask(prompt) for prompt in PROMPTS[:4]]
    assert alone == expected[:4]
    for _ in range(2):  # the second round meets a warm prefix cache
        assert await asyncio.gather(*map(ask, PROMPTS)) == expected


async def test_streams_and_whole_answers_agree_under_load(async_client: Any) -> None:
    async def whole(text: str) -> str:
        done = await async_client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": text}], max_tokens=20, temperature=0
        )
        return done.choices[0].message.content or ""

    async def streamed(text: str) -> str:
        stream = await async_client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": text}],
            max_tokens=20,
            temperature=0,
            stream=True,
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    singles = [await whole(prompt) for prompt in PROMPTS]
    together = await asyncio.gather(*map(whole, PROMPTS), *map(streamed, PROMPTS))
    assert together == singles + singles


@pytest.mark.row("A3.7", "A4.12")
async def test_a_seed_gives_the_same_tokens_in_any_company(async_client: Any) -> None:
    async def ask(seed: int, **more: Any) -> str:
        done = await async_client.completions.create(
            model="tiny", prompt="seeded", max_tokens=16, temperature=1.3, top_p=0.9, seed=seed, **more
        )
        return "|".join(choice.text for choice in done.choices)

    alone = [await ask(seed) for seed in range(4)]
    assert len(set(alone)) > 1
    crowd = await asyncio.gather(*[ask(seed) for seed in range(4)], *[ask(100 + i, n=2) for i in range(8)])
    assert list(crowd[:4]) == alone


@pytest.mark.row("A4.2")
def test_all_four_prompt_shapes_and_the_order_of_choices(client: Any, reference: Any) -> None:
    ids = reference.tokenizer("hello")["input_ids"]

    def texts(prompt: Any, **more: Any) -> list[str]:
        done = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0, **more)
        assert [choice.index for choice in done.choices] == list(range(len(done.choices)))
        return [choice.text for choice in done.choices]

    one = texts("hello")
    assert texts(ids) == one
    assert texts([ids, ids]) == one * 2
    other = texts("other")
    assert texts(["hello", "other"], n=2) == [*one, *one, *other, *other]


@pytest.mark.row("A4.9", "D6")
def test_logprobs_are_those_of_the_model(client: Any) -> None:
    done = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "probabilities"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = done.choices[0].logprobs.content
    assert len(content) == done.usage.completion_tokens
    for entry in content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert len(entry.top_logprobs) == 3


@pytest.mark.row("A3.16", "D3")
def test_usage_counts_what_was_generated(client: Any) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt="count",
        max_tokens=11,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 11
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices][-1] == "length"


@pytest.mark.row("A3.8", "A4.11")
def test_a_stop_string_never_leaks_and_ends_the_work(client: Any) -> None:
    free = (
        client.completions.create(model="tiny", prompt="stop here", max_tokens=40, temperature=0)
        .choices[0]
        .text
    )
    stop = free[5:8]
    done = client.completions.create(
        model="tiny", prompt="stop here", max_tokens=40, temperature=0, stop=stop
    )
    assert done.choices[0].text == free[: free.index(stop)]
    assert done.choices[0].finish_reason == "stop"
    stream = client.completions.create(
        model="tiny", prompt="stop here", max_tokens=40, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == done.choices[0].text


@pytest.mark.row("A3.14", "A3.17", "A4.10", "A4.14")
async def test_beams_best_of_and_echo_over_http(async_client: Any, reference: Any, stack: Any) -> None:
    """A3.17, A3.14, A4.10: beams are transformers' own, whole and streamed; the best of several are among
    them."""
    prompt, width = "ab prompt", 4
    ids = reference.tokenizer(prompt)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(stack.folder, dtype=torch.float32)
    made = model.generate(
        torch.tensor([ids]), num_beams=width, num_return_sequences=3, max_new_tokens=8, do_sample=False
    )
    ends = (model.generation_config.eos_token_id, model.generation_config.pad_token_id)
    expected = [[token for token in row[len(ids) :].tolist() if token not in ends] for row in made]
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "n": 3}
    extra = {"use_beam_search": True, "best_of": width, "return_token_ids": True}
    done = await async_client.completions.create(**asked, extra_body=extra)
    assert [[t for t in choice.token_ids if t not in ends] for choice in done.choices] == expected
    texts: dict[int, str] = {}
    async for chunk in await async_client.completions.create(**asked, stream=True, extra_body=extra):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in done.choices}

    alone = await async_client.completions.create(
        model="tiny", prompt=prompt, max_tokens=8, n=5, seed=4, temperature=1.5, logprobs=0
    )
    ranked = sorted(
        alone.choices,
        key=lambda choice: -sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs),
    )
    best = await async_client.completions.create(
        model="tiny", prompt=prompt, max_tokens=8, n=2, seed=4, temperature=1.5, best_of=5
    )
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]

    scored = await async_client.completions.create(
        model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1
    )
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    exact = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    block = scored.choices[0].logprobs
    assert scored.choices[0].text == prompt
    assert block.token_logprobs[0] is None
    assert block.token_logprobs[1:] == pytest.approx(exact, abs=1e-3)
    assert block.text_offset == list(range(len(prompt)))
