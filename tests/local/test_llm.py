"""Offline batches against transformers, and the rules of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from penstock.engine_service.models.errors import ModelError
from penstock.local import LLM, SamplingParams
from penstock.local.llm import GenerationFailed
from penstock.local.model_source import ModelUnavailable

PROMPTS = ["hello", "The capital of", "a", "1 + 1 = ", "Grüße, 世界"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
EOS = 258


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_num_seqs=8, max_num_batched_tokens=64, num_kv_blocks=200, threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def _nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    load = llm._loop.load()
    assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)


def _generate(llm: LLM, prompts: Any, params: Any) -> list[Any]:
    return llm.generate(prompts, params, use_tqdm=False)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Callable[[list[int], int], list[int]]:
    """Greedy tokens of transformers in fp32: (prompt ids, count) -> ids, the end of sequence included."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(ids: list[int], count: int) -> list[int]:
        inputs = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False
            )
        return out[0, len(ids) :].tolist()

    return run


@pytest.mark.row("A9.1", "A9.3")
def test_greedy_equals_transformers_in_input_order(llm: LLM, oracle: Callable[..., list[int]]) -> None:
    outputs = _generate(llm, PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        choice = output.outputs[0]
        assert choice.token_ids == oracle(output.prompt_token_ids, 24)
        shown = [token for token in choice.token_ids if token != EOS]
        assert choice.text == llm.get_tokenizer().decode(shown, skip_special_tokens=True)
        assert choice.finish_reason == ("stop" if choice.token_ids[-1] == EOS else "length")
        assert output.finished


def test_every_shape_of_prompt_is_the_same_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello").ids
    expected = _generate(llm, "hello", GREEDY)[0].outputs[0].token_ids
    for prompts in (
        ["hello"],
        ids,
        [ids],
        {"prompt": "hello"},
        [{"prompt_token_ids": ids}],
        {"prompt": "hello", "prompt_token_ids": ids},
    ):
        [output] = _generate(llm, prompts, GREEDY)
        assert output.outputs[0].token_ids == expected
        assert output.prompt_token_ids == ids
    assert _generate(llm, [ids], GREEDY)[0].prompt is None


def test_an_empty_list_of_prompts(llm: LLM) -> None:
    assert _generate(llm, [], GREEDY) == []


def test_calls_from_several_threads_wait_for_each_other(llm: LLM) -> None:
    alone = [_generate(llm, prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: _generate(llm, prompt, GREEDY)[0], PROMPTS))
    assert [output.outputs[0].token_ids for output in together] == alone


@pytest.mark.row("A9.4")
def test_the_module_vllm_loads_a_model_once(folder: Path) -> None:
    from penstock.local.vllm_shim import vllm

    options = {"max_num_seqs": 2, "num_kv_blocks": 32, "threads": 1}
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(lambda _: vllm.LLM(model=folder, **options), range(3)))
    assert loaded == [loaded[0]] * 3
    assert vllm.SamplingParams(max_tokens=3, stream=False) == SamplingParams(max_tokens=3)
    loaded[0].close()
    with vllm.LLM(model=folder, **options) as again:
        assert again is not loaded[0]
        assert _generate(again, "hello", GREEDY)


@pytest.mark.row("A9.2")
def test_the_same_seed_in_any_company(llm: LLM) -> None:
    own = SamplingParams(temperature=1.0, seed=1234, max_tokens=20)
    alone = _generate(llm, "hello", own)[0].outputs[0].token_ids
    others = [SamplingParams(temperature=1.3, seed=i, max_tokens=9 + i) for i in range(11)]
    together = _generate(llm, [*["noise"] * 11, "hello"], [*others, own])
    assert together[-1].outputs[0].token_ids == alone
    assert [len(output.outputs[0].token_ids) <= 9 + i for i, output in enumerate(together[:-1])] == [
        True
    ] * 11


def test_the_seed_of_minus_one_is_none(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=-1, max_tokens=20)
    answers = [_generate(llm, "hello", params)[0].outputs[0].token_ids for _ in range(3)]
    assert answers[0] != answers[1] != answers[2]


def test_choices_differ_and_are_numbered(llm: LLM) -> None:
    [output] = _generate(llm, "hello", SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12))
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
    [greedy] = _generate(llm, "hello", SamplingParams(n=2, temperature=0, max_tokens=6))
    assert greedy.outputs[0].token_ids == greedy.outputs[1].token_ids


def test_a_stop_string_cuts_the_text_and_ends_the_request(llm: LLM) -> None:
    free = _generate(llm, "hello", SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    readable = [i for i, char in enumerate(free.text) if char.isascii() and char.isprintable() and i > 3]
    stop = free.text[readable[0]]
    [output] = _generate(llm, "hello", SamplingParams(temperature=0, max_tokens=24, stop=[stop, "never"]))
    choice = output.outputs[0]
    assert choice.text == free.text[: free.text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.token_ids == free.token_ids[: len(choice.token_ids)]
    kept = SamplingParams(temperature=0, max_tokens=24, stop=stop, include_stop_str_in_output=True)
    assert _generate(llm, "hello", kept)[0].outputs[0].text == choice.text + stop


def test_beams_equal_transformers(llm: LLM, folder: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    params = SamplingParams(use_beam_search=True, n=2, best_of=4, max_tokens=7, length_penalty=0.5)
    for output in _generate(llm, PROMPTS, params):
        ids = torch.tensor([output.prompt_token_ids])
        made = model.generate(
            ids, num_beams=4, num_return_sequences=2, length_penalty=0.5, max_new_tokens=7, do_sample=False
        )
        for choice, row in zip(output.outputs, made, strict=True):
            assert choice.token_ids == row[ids.shape[1] :].tolist()[: len(choice.token_ids)]


def test_the_best_of_several(llm: LLM) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 6, "logprobs": 0}
    every = _generate(llm, "hello", SamplingParams(n=6, **fields))[0].outputs
    best = _generate(llm, "hello", SamplingParams(n=2, best_of=6, **fields))[0].outputs
    ranked = sorted(every, key=lambda choice: -choice.cumulative_logprob / len(choice.token_ids))
    assert [choice.token_ids for choice in best] == [choice.token_ids for choice in ranked[:2]]


def test_best_of_ranks_what_stop_strings_leave(llm: LLM) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 40, "stop": [" ", "e", "1"]}
    every = _generate(llm, "hello", SamplingParams(n=6, logprobs=0, **fields))[0].outputs
    assert {choice.finish_reason for choice in every} == {"stop", "length"}
    ranked = sorted(every, key=lambda choice: -(choice.cumulative_logprob or 0) / len(choice.token_ids))
    best = _generate(llm, "hello", SamplingParams(n=2, best_of=6, **fields))[0].outputs
    assert [(choice.index, choice.token_ids, choice.text, choice.stop_reason) for choice in best] == [
        (place, choice.token_ids, choice.text, choice.stop_reason) for place, choice in enumerate(ranked[:2])
    ]
    assert [(choice.logprobs, choice.cumulative_logprob) for choice in best] == [(None, None)] * 2


def test_a_stop_token_is_named(llm: LLM) -> None:
    free = _generate(llm, "hello", GREEDY)[0].outputs[0].token_ids
    token = free[4]
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token])
    choice = _generate(llm, "hello", params)[0].outputs[0]
    assert choice.token_ids == free[: free.index(token) + 1]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)


def test_end_of_sequence_and_those_who_ignore_it(llm: LLM) -> None:
    forced = {EOS: 100.0}
    choice = _generate(llm, "x", SamplingParams(temperature=0, logit_bias=forced))[0].outputs[0]
    assert choice.token_ids == [EOS]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", None)
    shown = SamplingParams(temperature=0, logit_bias=forced, skip_special_tokens=False)
    assert _generate(llm, "x", shown)[0].outputs[0].text == "<|im_end|>"
    params = SamplingParams(temperature=0, logit_bias=forced, ignore_eos=True, max_tokens=5)
    assert _generate(llm, "x", params)[0].outputs[0].token_ids == [EOS] * 5
    banned = SamplingParams(temperature=0, logit_bias=forced, min_tokens=3, max_tokens=8)
    ids = _generate(llm, "x", banned)[0].outputs[0].token_ids
    assert EOS not in ids[:3]
    assert ids[3] == EOS


def test_logprobs_against_transformers(llm: LLM, folder: Path) -> None:
    import torch
    import transformers

    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    [output] = _generate(llm, "hello", params)
    choice = output.outputs[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = output.prompt_token_ids + choice.token_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(output.prompt_token_ids)
    assert choice.logprobs is not None
    for place, (token, row) in enumerate(zip(choice.token_ids, choice.logprobs, strict=True)):
        want = expected[start + place - 1]
        assert next(iter(row)) == token
        assert row[token].rank == 1
        assert set(row) == set(want.topk(3).indices.tolist())
        for other, found in row.items():
            assert found.logprob == pytest.approx(want[other].item(), abs=1e-3)
    assert choice.cumulative_logprob == pytest.approx(
        sum(row[t].logprob for t, row in zip(choice.token_ids, choice.logprobs, strict=True))
    )
    rows = output.prompt_logprobs
    assert rows is not None
    assert rows[0] is None
    for place in range(1, start):
        row = rows[place]
        assert row is not None
        assert row[ids[place]].logprob == pytest.approx(expected[place - 1, ids[place]].item(), abs=1e-3)
        assert set(row) == {ids[place], *expected[place - 1].topk(2).indices.tolist()}


def test_allowed_ids_and_bad_words(llm: LLM) -> None:
    allowed = SamplingParams(temperature=1, seed=1, max_tokens=12, allowed_token_ids=[65, 66, 67])
    assert set(_generate(llm, "x", allowed)[0].outputs[0].token_ids) <= {65, 66, 67}
    free = _generate(llm, "hello", GREEDY)[0].outputs[0]
    word = next(char for char in free.text if char.isascii() and char.isprintable())
    params = SamplingParams(temperature=0, max_tokens=24, bad_words=[word])
    assert word not in _generate(llm, "hello", params)[0].outputs[0].text


def test_lengths(llm: LLM) -> None:
    assert len(_generate(llm, "x", SamplingParams(ignore_eos=True))[0].outputs[0].token_ids) == 16
    [full] = _generate(llm, [[5] * 250], SamplingParams(ignore_eos=True, max_tokens=None))
    assert len(full.outputs[0].token_ids) == 6
    cut = SamplingParams(max_tokens=1, truncate_prompt_tokens=3)
    assert _generate(llm, [[1, 2, 3, 4, 5]], cut)[0].prompt_token_ids == [3, 4, 5]


def test_a_seen_prompt_is_read_from_the_cache(llm: LLM) -> None:
    prompt = [[7] * 40]
    _generate(llm, prompt, SamplingParams(max_tokens=1))
    assert _generate(llm, prompt, SamplingParams(max_tokens=1))[0].num_cached_tokens >= 32


def test_chat_goes_through_the_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hi"}]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    one, two = (llm.chat(messages, GREEDY, use_tqdm=False) for messages in (talk, [talk, [*talk, *talk]]))
    assert one[0].prompt == expected
    assert one[0].prompt_token_ids == llm.get_tokenizer().encode(expected, add_special_tokens=False).ids
    assert len(two) == 2
    assert two[0].outputs[0].token_ids == one[0].outputs[0].token_ids
    bare = llm.chat(talk, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert bare[0].prompt == expected.removesuffix("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("prompts", "params", "named"),
    [
        (["ok", [5] * 256], SamplingParams(), "prompt"),
        ([[]], SamplingParams(), "prompt"),
        ([[272]], SamplingParams(), "prompt"),
        ([[-1]], SamplingParams(), "prompt"),
        ([{"prompt_embeds": 1}], SamplingParams(), "prompt"),
        ([{}], SamplingParams(), "prompt"),
        (["x"], SamplingParams(stop_token_ids=[272]), "stop_token_ids"),
        (["x"], SamplingParams(logit_bias={272: 1}), "logit_bias"),
        (["x", "y"], [SamplingParams()], "sampling_params"),
        (["x"], {"temperature": 0}, "sampling_params"),
        (["x"], [{"temperature": 0}], "sampling_params"),
        (["x"], 5, "sampling_params"),
        (b"x", SamplingParams(), "prompts"),
        ([{"prompt_token_ids": 5}], SamplingParams(), "prompt"),
        (["x\ud83d"], SamplingParams(), "prompt: the text holds half of a character"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(
    llm: LLM, prompts: Any, params: Any, named: str
) -> None:
    steps = llm._loop.load().steps
    with pytest.raises(ValueError, match=rf"\A{named}"):
        _generate(llm, prompts, params)
    assert llm._loop.load().steps == steps


@pytest.mark.parametrize("messages", [5, None, "hi", [5], ["hi"], [[5]], [{"role": "user", "content": 5}]])
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(ValueError, match=r"\Amessages"):
        llm.chat(messages, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match=r"\Achat_template_kwargs"):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY, chat_template_kwargs=messages or 1)


def test_the_prompt_at_fault_is_told(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hi"}]
    for send, given in (
        (llm.generate, ["a", [], "b"]),
        (llm.generate, ["a", {}, "b"]),
        (llm.chat, [talk, [{"role": "user", "content": 5}], talk]),
    ):
        with pytest.raises(ValueError, match=r"\(prompt 1\)\Z"):
            send(given, GREEDY, use_tqdm=False)
        with pytest.raises(ValueError, match=r"[^)]\Z"):
            send([given[1]], GREEDY, use_tqdm=False)


def test_an_interrupt_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(100))
    run = llm._loop._runner.run

    def interrupted(plan: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return run(plan)

    monkeypatch.setattr(llm._loop._runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _generate(llm, PROMPTS, GREEDY)
    monkeypatch.undo()
    assert len(_generate(llm, PROMPTS, GREEDY)) == 5


def test_one_request_that_fails_does_not_take_the_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run = llm._loop._runner.run

    def poisoned(plan: Any) -> Any:
        if any(sequence.request.params.prompt == [99] for sequence in plan.sequences):
            raise RuntimeError("boom")
        return run(plan)

    monkeypatch.setattr(llm._loop._runner, "run", poisoned)
    with pytest.raises(GenerationFailed, match="prompt 1") as caught:
        _generate(llm, ["a", [99], "b"], GREEDY)
    first, second, third = caught.value.outputs
    assert second is None
    assert first is not None
    assert third is not None
    assert first.finished
    assert third.finished


def test_the_models_own_defaults_without_parameters(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    assert len(_generate(llm, "x", None)[0].outputs[0].token_ids) <= 16


def test_a_closed_model_says_so(folder: Path) -> None:
    model = LLM(folder, num_kv_blocks=32, max_num_seqs=2, threads=1)
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.generate("x", use_tqdm=False)


def test_unusable_models_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable):
        LLM("/no/such/folder")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError) as caught:
        LLM(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelUnavailable, match=r"tokenizer\.json"):
        LLM(tmp_path)
    with pytest.raises(ValueError, match="chat_template"):
        LLM(folder, chat_template="/no/such/file.jinja")


def test_importing_the_package_loads_no_model_code() -> None:
    import subprocess
    import sys

    code = "import sys, penstock.local; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert "'torch'" not in done.stdout
    assert "penstock.local" in done.stdout
