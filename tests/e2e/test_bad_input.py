"""Bad input gets the one right answer, and the next request works."""

from __future__ import annotations

import json
from typing import Any

import grpc
import httpx
import pytest

from penstock.protos import common_pb2, engine_pb2, engine_pb2_grpc
from penstock.protos.errors import from_rpc

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
HI = [{"role": "user", "content": "hi"}]

CASES: list[tuple[str, str, Any, int, str, str | None]] = [
    ("trailing comma", CHAT, b'{"model": "tiny", "messages": [],}', 400, "invalid_json", None),
    ("not an object", CHAT, b"[1, 2]", 400, "invalid_type", None),
    ("empty body", TEXT, b"", 400, "invalid_json", None),
    ("NaN", TEXT, b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "invalid_json", None),
    ("deep", CHAT, b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "invalid_json", None),
    ("wrong type", TEXT, {"prompt": "x", "max_tokens": "many"}, 400, "invalid_type", "max_tokens"),
    ("bool as number", TEXT, {"prompt": "x", "max_tokens": True}, 400, "invalid_type", "max_tokens"),
    ("range", TEXT, {"prompt": "x", "temperature": 9}, 400, "invalid_value", "temperature"),
    ("top_p 0", CHAT, {"messages": HI, "top_p": 0}, 400, "invalid_value", "top_p"),
    ("penalty", CHAT, {"messages": HI, "presence_penalty": 3}, 400, "invalid_value", "presence_penalty"),
    ("huge n", TEXT, {"prompt": "x", "n": 10**9}, 400, "invalid_value", "n"),
    ("bias", TEXT, {"prompt": "x", "logit_bias": {"5": 101}}, 400, "invalid_value", "logit_bias"),
    ("bias id", TEXT, {"prompt": "x", "logit_bias": {"99999": 1}}, 400, "invalid_value", "logit_bias"),
    ("empty stop", TEXT, {"prompt": "x", "stop": [""]}, 400, "invalid_value", "stop[0]"),
    ("no messages", CHAT, {}, 400, "missing_required_parameter", "messages"),
    ("no prompt", TEXT, {}, 400, "missing_required_parameter", "prompt"),
    ("unknown model", TEXT, {"prompt": "x", "model": "nope"}, 404, "model_not_found", "model"),
    ("too long", TEXT, {"prompt": "x" * 400}, 400, "context_length_exceeded", "prompt"),
    ("too long chat", CHAT, {"messages": [{"role": "user", "content": "x" * 400}]}, 400,
     "context_length_exceeded", "messages"),
    ("id outside", TEXT, {"prompt": [99999]}, 400, "invalid_value", "prompt"),
    ("negative id", TEXT, {"prompt": [-1]}, 400, "invalid_value", "prompt[0]"),
    ("empty ids", TEXT, {"prompt": []}, 400, "invalid_value", "prompt"),
    ("min above max", TEXT, {"prompt": "x", "min_tokens": 9, "max_tokens": 3}, 400, "invalid_value",
     "min_tokens"),
    ("tools", CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400,
     "unsupported_parameter", "tools"),
    ("keyword", CHAT, {"messages": HI, "guided_json": {"not": {}}}, 400, "invalid_grammar", "guided_json"),
    ("pattern", TEXT, {"prompt": "x", "guided_regex": "(?=a)"}, 400, "invalid_grammar", "guided_regex"),
    ("large pattern", TEXT, {"prompt": "x", "guided_regex": "a" * 70_000}, 400, "invalid_value",
     "guided_regex"),
    ("large schema", CHAT, {"messages": HI, "guided_json": {"enum": ["x" * 999 for _ in range(9999)]}}, 400,
     "grammar_too_complex", "guided_json"),
    ("deep schema", CHAT, {"messages": HI, "guided_json": '{"items":' * 90 + "{}" + "}" * 90}, 400,
     "invalid_value", "guided_json"),
    ("remote", CHAT, {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"$ref": "http://example.com/x"}}}}, 400, "invalid_grammar",
     "response_format.json_schema.schema"),
    ("recursion", CHAT, {"messages": HI, "structured_outputs": {"json": {"$ref": "#"}}}, 400,
     "invalid_grammar", "structured_outputs.json"),
    ("beams", TEXT, {"prompt": "x", "use_beam_search": True, "n": 33}, 400, "invalid_value", "n"),
    ("wide beams", TEXT, {"prompt": "x", "use_beam_search": True, "best_of": 17}, 400, "invalid_value",
     "best_of"),
    ("beams too long", TEXT, {"prompt": "x" * 200, "use_beam_search": True, "best_of": 16, "ignore_eos": True,
                              "max_tokens": 50}, 400, "invalid_value", "best_of"),
    ("best_of", TEXT, {"prompt": "x", "best_of": 1, "n": 2}, 400, "invalid_value", "best_of"),
    ("beams with a form", TEXT, {"prompt": "x", "use_beam_search": True, "n": 2, "guided_choice": ["a"]}, 400,
     "unsupported_parameter", "guided_choice"),
    ("suffix", TEXT, {"prompt": "x", "suffix": "y"}, 400, "unsupported_parameter", "suffix"),
    ("endless template", CHAT, {"messages": HI, "chat_template": ENDLESS}, 400, "invalid_value",
     "messages"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_each_mistake_has_its_answer_and_harms_nobody(
    stack: Any, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(
        stack.url + path, content=content, headers={"content-type": "application/json"}, timeout=60
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    if param is not None:
        assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 4096
    assert answer.headers["x-request-id"]
    fine = httpx.post(stack.url + TEXT, json={"prompt": "fine", "max_tokens": 2}, timeout=60)
    assert fine.status_code == 200, fine.text


@pytest.mark.parametrize(
    ("request_", "reason", "param"),
    [
        (
            engine_pb2.GenerateRequest(prompt_ids=common_pb2.TokenIds(ids=[5, 99999])),
            "invalid_value",
            "prompt",
        ),
        (engine_pb2.GenerateRequest(prompt_ids=common_pb2.TokenIds(ids=[])), "invalid_value", "prompt"),
        (
            engine_pb2.GenerateRequest(
                prompt_ids=common_pb2.TokenIds(ids=[5]), constraint=engine_pb2.Constraint(regex="[")
            ),
            "invalid_grammar",
            "constraint.regex",
        ),
        (
            engine_pb2.GenerateRequest(prompt_ids=common_pb2.TokenIds(ids=[5] * 300)),
            "context_length_exceeded",
            None,
        ),
    ],
    ids=["outside", "empty", "constraint", "long"],
)
async def test_the_engine_validates_by_itself(
    stack: Any, request_: engine_pb2.GenerateRequest, reason: str, param: str | None
) -> None:
    async with grpc.aio.insecure_channel(stack.engine) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(request_, timeout=60):
                pass
        error = from_rpc(caught.value)
        assert error.reason == reason
        if param is not None:
            assert error.param == param
        fine = engine_pb2.GenerateRequest(prompt_ids=common_pb2.TokenIds(ids=[5]))
        fine.stop.max_new_tokens = 2
        events = [event async for event in stub.Generate(fine, timeout=60)]
        assert events[-1].HasField("finished")
