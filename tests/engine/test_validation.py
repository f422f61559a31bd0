"""The engine's own validation: each rule, and random protos through the servicer and the scheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fake_runner import VOCAB, fake_ready
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import Harness

from penstock.engine_service import validation
from penstock.engine_service.core.forks import too_wide
from penstock.engine_service.core.messages import AddRequest, Beam, Sampling
from penstock.engine_service.validation import Validator
from penstock.protos import common_pb2
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError

NAN, INF = math.nan, math.inf
VALIDATOR = Validator(frozenset({"m", "alias"}), fake_ready(max_model_len=100, eos=(7, 8)), 5_000)


def convert(made: pb.GenerateRequest, **fields: Any) -> AddRequest:
    return VALIDATOR.to_core(made, 1, 1000, **fields)


def base(**fields: Any) -> pb.GenerateRequest:
    fields.setdefault("prompt_ids", common_pb2.TokenIds(ids=[1, 2, 3]))
    return pb.GenerateRequest(**fields)


def sampled(**fields: Any) -> pb.GenerateRequest:
    return base(sampling=pb.SamplingParams(**fields))


def searched(width: int, beam: dict[str, Any] | None = None, **fields: Any) -> pb.GenerateRequest:
    return base(beam_search=pb.BeamSearch(width=width, **(beam or {})), **fields)


def test_beams_and_candidates_arrive() -> None:
    made = convert(searched(5, {"length_penalty": -1.5, "exhaustive": True}, n=3))
    assert (made.n, made.best_of, made.beam) == (3, 0, Beam(5, -1.5, exhaustive=True))
    assert convert(searched(1, {"early_stopping": True})).beam == Beam(1, early_stopping=True)
    neutral = pb.SamplingParams(temperature=0.3, top_p=0.5, seed=3, repetition_penalty=1.0)
    assert convert(searched(2, sampling=neutral)).beam == Beam(2)
    assert (convert(base(n=2, best_of=5)).best_of, convert(base(n=2, best_of=2)).best_of) == (5, 0)


def test_defaults_are_those_of_the_contract() -> None:
    assert convert(base()) == AddRequest(
        id=1,
        prompt=[1, 2, 3],
        sampling=Sampling(),
        n=1,
        max_new_tokens=97,
        eos_token_ids=[7, 8],
        arrival_us=1000,
        queue_deadline_us=6000,
    )


def test_everything_given_arrives() -> None:
    made = pb.GenerateRequest(
        request_id="r",
        model="alias",
        prompt_ids=common_pb2.TokenIds(ids=[5]),
        n=2,
        best_of=2,
        sampling=pb.SamplingParams(
            temperature=0.5, top_p=0.25, top_k=-1, min_p=0.125, seed=-3, presence_penalty=-2,
            frequency_penalty=2, repetition_penalty=1.5, logit_bias={3: -100.0, 4: 100.0},
            allowed_token_ids=[1, 2], bad_words=[common_pb2.TokenIds(ids=[9, 9])],
        ),
        stop=pb.StopCriteria(max_new_tokens=9, min_new_tokens=9, stop_token_ids=[4], ignore_eos=True),
        output=pb.OutputOptions(logprobs=0, prompt_logprobs=20, logprob_token_ids=[1]),
        cache=pb.CacheOptions(salt="s@/9", skip_read=True),
        scheduling=pb.SchedulingOptions(priority=-7, queue_timeout_us=0),
        trace={"traceparent": "00-a-b-01"},
    )  # fmt: skip
    assert convert(made, timeout_us=10) == AddRequest(
        id=1,
        prompt=[5],
        sampling=Sampling(
            0.5, 0.25, 0, 0.125, -3, -2.0, 2.0, 1.5, {3: -100.0, 4: 100.0}, [1, 2], [[9, 9]], 0, 20, [1]
        ),
        n=2,
        max_new_tokens=9,
        min_new_tokens=9,
        stop_token_ids=[4],
        eos_token_ids=[],
        priority=-7,
        cache_salt="s@/9",
        skip_cache_read=True,
        arrival_us=1000,
        deadline_us=1010,
    )


def test_length_beyond_the_context_is_clamped() -> None:
    made = base(stop=pb.StopCriteria(max_new_tokens=5000, min_new_tokens=200))
    assert (convert(made).max_new_tokens, convert(made).min_new_tokens) == (97, 97)
    assert convert(base(stop=pb.StopCriteria(max_new_tokens=0))).max_new_tokens == 0


def ids(*values: int) -> common_pb2.TokenIds:
    return common_pb2.TokenIds(ids=values)


@pytest.mark.parametrize(
    ("made", "param"),
    [
        (base(prompt_ids=ids()), "prompt"),
        (base(prompt_ids=ids(VOCAB)), "prompt"),
        (base(prompt_ids=ids(2**32 - 1)), "prompt"),
        (base(n=0), "n"),
        (base(n=129), "n"),
        (base(n=1_000_000_000), "n"),
        (base(n=3, best_of=2), "best_of"),
        (base(best_of=129), "best_of"),
        (searched(2, best_of=2), "best_of"),
        (searched(0), "beam_search.width"),
        (searched(33), "beam_search.width"),
        (searched(2, n=3), "beam_search.width"),
        (searched(2, {"length_penalty": 5.5}), "beam_search.length_penalty"),
        (searched(2, {"length_penalty": NAN}), "beam_search.length_penalty"),
        (searched(2, {"early_stopping": True, "exhaustive": True}), "beam_search.exhaustive"),
        (searched(2, stop=pb.StopCriteria(stop_token_ids=range(10, 73))), "stop.stop_token_ids"),
        (base(request_id="x" * 129), "request_id"),
        (base(request_id="é" * 65), "request_id"),
        (base(request_id="a\nb"), "request_id"),
        (base(cache=pb.CacheOptions(salt="x" * 129)), "cache.salt"),
        (base(cache=pb.CacheOptions(salt="x" * 10_000)), "cache.salt"),
        (base(cache=pb.CacheOptions(salt="a\0b")), "cache.salt"),
        (base(cache=pb.CacheOptions(salt="é")), "cache.salt"),
        (base(trace={"k": "v" * 1000}), "trace"),
        (base(trace={str(i): "" for i in range(9)}), "trace"),
        (base(stop=pb.StopCriteria(max_new_tokens=3, min_new_tokens=4)), "stop.min_new_tokens"),
        (base(stop=pb.StopCriteria(min_new_tokens=98)), "stop.min_new_tokens"),
        (base(stop=pb.StopCriteria(stop_token_ids=[VOCAB])), "stop.stop_token_ids"),
        (base(stop=pb.StopCriteria(stop_token_ids=range(1025))), "stop.stop_token_ids"),
        (base(output=pb.OutputOptions(logprobs=21)), "output.logprobs"),
        (base(output=pb.OutputOptions(prompt_logprobs=21)), "output.prompt_logprobs"),
        (base(output=pb.OutputOptions(logprob_token_ids=range(129))), "output.logprob_token_ids"),
        (base(output=pb.OutputOptions(logprob_token_ids=[VOCAB])), "output.logprob_token_ids"),
        (sampled(allowed_token_ids=[VOCAB]), "sampling.allowed_token_ids"),
        (sampled(allowed_token_ids=[1] * (VOCAB + 1)), "sampling.allowed_token_ids"),
        (sampled(bad_words=[ids()]), "sampling.bad_words"),
        (sampled(bad_words=[ids(VOCAB)]), "sampling.bad_words"),
        (sampled(bad_words=[ids(1)] * 257), "sampling.bad_words"),
        (sampled(bad_words=[ids(*[1] * 129)]), "sampling.bad_words"),
        (sampled(logit_bias={VOCAB: 1.0}), "sampling.logit_bias"),
        (sampled(logit_bias={1: 100.5}), "sampling.logit_bias"),
        (sampled(logit_bias={1: NAN}), "sampling.logit_bias"),
        (sampled(logit_bias={1: -INF}), "sampling.logit_bias"),
        (sampled(logit_bias=dict.fromkeys(range(1025), 0.0)), "sampling.logit_bias"),
        (sampled(top_k=-2), "sampling.top_k"),
        *(
            (sampled(**{name: value}), f"sampling.{name}")
            for name, values in {
                "temperature": [-0.1, 2.1, NAN, INF],
                "top_p": [0.0, 1.1, -1.0, NAN],
                "min_p": [-0.1, 1.1, NAN],
                "presence_penalty": [-2.1, 2.1, NAN, -INF],
                "frequency_penalty": [-2.1, 2.1, NAN],
                "repetition_penalty": [0.0, -1.0, 2.1, NAN],
            }.items()
            for value in values
        ),
    ],
)
def test_values_out_of_range(made: pb.GenerateRequest, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        convert(made)
    assert (caught.value.reason, caught.value.param) == ("invalid_value", param)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("made", "reason", "param"),
    [
        (pb.GenerateRequest(), "missing_required_parameter", "prompt"),
        (base(prompt_ids=ids(*[1] * 100)), "context_length_exceeded", "prompt"),
        (base(model="other"), "model_not_found", "model"),
        *(
            (searched(2, sampling=pb.SamplingParams(**{name: value})), "unimplemented", f"sampling.{name}")
            for name, value in {
                "presence_penalty": 1.0,
                "frequency_penalty": -1.0,
                "repetition_penalty": 1.5,
                "logit_bias": {3: 1.0},
                "allowed_token_ids": [3],
                "bad_words": [ids(3)],
            }.items()
        ),
        (
            searched(2, output=pb.OutputOptions(logprob_token_ids=[1])),
            "unimplemented",
            "output.logprob_token_ids",
        ),
        (
            base(best_of=2, output=pb.OutputOptions(logprob_token_ids=[1])),
            "unimplemented",
            "output.logprob_token_ids",
        ),
        (base(media=[pb.MediaItem()]), "unimplemented", "media"),
        (base(kv_transfer=b"x"), "unimplemented", "kv_transfer"),
        (pb.GenerateRequest(prompt_embeds=pb.PromptEmbeds()), "unimplemented", "prompt_embeds"),
        (base(scheduling=pb.SchedulingOptions(tenant="t")), "unimplemented", "scheduling.tenant"),
        (base(scheduling=pb.SchedulingOptions(weight=1.0)), "unimplemented", "scheduling.weight"),
    ],
)
def test_other_refusals(made: pb.GenerateRequest, reason: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        convert(made)
    assert (caught.value.reason, caught.value.param) == (reason, param)


def test_longest_prompt_leaves_one_token() -> None:
    assert convert(base(prompt_ids=ids(*[1] * 99))).max_new_tokens == 1


_UINT = st.one_of(st.integers(0, 20), st.sampled_from([VOCAB - 1, VOCAB, 2**31, 2**32 - 1]))
_FLOAT = st.one_of(st.floats(width=32), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
_TEXT = st.text(max_size=6)
_IDS = st.lists(_UINT, max_size=6)


def _maybe(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


_REQUESTS = _maybe(
    request_id=_TEXT,
    model=st.sampled_from(["", "m", "x"]),
    prompt_ids=_IDS.map(lambda values: common_pb2.TokenIds(ids=values)),
    n=st.integers(0, 4),
    best_of=st.integers(0, 4),
    beam_search=_maybe(
        width=st.integers(0, 6), length_penalty=_FLOAT, early_stopping=st.booleans(), exhaustive=st.booleans()
    ).map(lambda fields: pb.BeamSearch(**fields)),
    kv_transfer=st.sampled_from([b"", b"", b"x"]),
    sampling=_maybe(
        temperature=_FLOAT,
        top_p=_FLOAT,
        top_k=st.integers(-(2**31), 2**31 - 1),
        min_p=_FLOAT,
        seed=st.integers(-(2**63), 2**63 - 1),
        presence_penalty=_FLOAT,
        frequency_penalty=_FLOAT,
        repetition_penalty=_FLOAT,
        logit_bias=st.dictionaries(_UINT, _FLOAT, max_size=3),
        allowed_token_ids=_IDS,
        bad_words=st.lists(_IDS.map(lambda values: common_pb2.TokenIds(ids=values)), max_size=3),
    ).map(lambda fields: pb.SamplingParams(**fields)),
    stop=_maybe(
        max_new_tokens=_UINT, min_new_tokens=_UINT, stop_token_ids=_IDS, ignore_eos=st.booleans()
    ).map(lambda fields: pb.StopCriteria(**fields)),
    output=_maybe(logprobs=_UINT, prompt_logprobs=_UINT, logprob_token_ids=_IDS).map(
        lambda fields: pb.OutputOptions(**fields)
    ),
    cache=_maybe(salt=_TEXT, skip_read=st.booleans()).map(lambda fields: pb.CacheOptions(**fields)),
    scheduling=_maybe(
        priority=st.integers(-(2**31), 2**31 - 1), queue_timeout_us=st.integers(0, 2**64 - 1)
    ).map(lambda fields: pb.SchedulingOptions(**fields)),
).map(lambda fields: pb.GenerateRequest(**fields))

_REFUSALS = {
    "invalid_value",
    "missing_required_parameter",
    "model_not_found",
    "unimplemented",
    "context_length_exceeded",
}


def served(made: pb.GenerateRequest, number: int = 1) -> AddRequest | None:
    """The core's request, or None after a refusal that is in the table."""
    refusal = None
    try:
        return VALIDATOR.to_core(made, number, 0, 0)
    except ApiError as error:
        refusal = error
    assert refusal.reason in _REFUSALS
    assert len(refusal.message) < 300
    return None


@settings(max_examples=300)
@given(st.lists(_REQUESTS, min_size=1, max_size=4))
def test_random_requests_are_refused_by_the_table_or_served(made: list[pb.GenerateRequest]) -> None:
    harness = Harness(num_blocks=32, max_model_len=100)
    accepted = 0
    for number, one in enumerate(made):
        params = served(one, number)
        if params is None:
            continue
        accepted += 1
        params.queue_deadline_us = 0
        harness.put(params)
    harness.run()
    harness.check_idle()
    # How many blocks a search's beams do not share is known only when they part.
    failures = [failure for said in harness.said.values() for failure in said.failures]
    assert {failure.message for failure in failures} <= {str(too_wide())}
    assert harness.loop.counters.finished + len(failures) == accepted


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_by_the_table_or_served(data: bytes) -> None:
    made = base()
    try:
        made.MergeFromString(data)
    except Exception:
        return
    params = served(made)
    assert params is None or all(token < VOCAB for token in params.prompt)


def test_prompt_logprobs_are_bounded_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made = base(prompt_ids=common_pb2.TokenIds(ids=[1] * 50), output=pb.OutputOptions(prompt_logprobs=20))
    monkeypatch.setattr(validation, "MAX_PROMPT_LOGPROB_NUMBERS", 50 * 21)
    convert(made)
    monkeypatch.setattr(validation, "MAX_PROMPT_LOGPROB_NUMBERS", 50 * 21 - 1)
    with pytest.raises(ApiError) as refused:
        convert(made)
    assert (refused.value.reason, refused.value.param) == ("invalid_value", "output.prompt_logprobs")
