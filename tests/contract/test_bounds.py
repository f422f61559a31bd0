"""Every field × every wrong type and every value just beyond a bound, made from the types that validate.

The fields, their types and their bounds are read from the JSON schema that /openapi.json shows, so a new
field is tested without a line here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.completions_request import CompletionRequest
from penstock.frontend.api.generation_request import GenerationRequest

KINDS: dict[str, tuple[type[GenerationRequest], str, dict[str, Any]]] = {
    "chat": (ChatRequest, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    "completions": (CompletionRequest, "/v1/completions", {"prompt": "hi"}),
}
SAMPLES: dict[str, Any] = {
    "boolean": True,
    "integer": 7,
    "number": 1.5,
    "string": "x",
    "array": [{"a": 1}],
    "object": {"a": 1},
}
# Longer lists are left to the unit of validation: a body of megabytes for each is not worth the seconds.
LONGEST = 20_000


def forms(schema: dict[str, Any], defs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a schema, references followed, null left out."""
    if "$ref" in schema:
        yield from forms(defs[schema["$ref"].rpartition("/")[2]], defs)
    elif "anyOf" in schema or "oneOf" in schema:
        for part in schema.get("anyOf", schema.get("oneOf", ())):
            yield from forms(part, defs)
    elif schema.get("type") != "null":
        yield schema


def types_of(found: list[dict[str, Any]]) -> set[str]:
    accepted = {form["type"] for form in found if "type" in form}
    for form in found:
        known = form.get("enum", [form["const"]] if "const" in form else [])
        accepted |= {"string" if isinstance(value, str) else "boolean" for value in known}
    return accepted | ({"integer"} if "number" in accepted else set())


def beyond(form: dict[str, Any], defs: dict[str, Any], *, alone: bool) -> Iterator[Any]:
    """Values of the right type that this form does not take. alone: no other form has its type."""
    step = 1 if form.get("type") == "integer" else 0.25
    if "minimum" in form:
        yield form["minimum"] - step
    if "maximum" in form:
        yield form["maximum"] + step
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if name in form:
            yield form[name]
    if form.get("minLength"):
        yield ""
    if "maxLength" in form:
        yield "x" * (form["maxLength"] + 1)
    if "pattern" in form:
        yield "\x00"
    if "enum" in form and alone:
        yield "neither"
    if form.get("maxProperties", LONGEST) < LONGEST:
        yield {str(i): 1 for i in range(form["maxProperties"] + 1)}
    if form.get("type") == "array":
        yield from of_lists(form, defs, alone=alone)


def of_lists(form: dict[str, Any], defs: dict[str, Any], *, alone: bool) -> Iterator[Any]:
    found = list(forms(form.get("items", {}), defs))
    if form.get("minItems"):
        yield []
    good = next((SAMPLES[kind] for kind in ("integer", "string", "object") if kind in types_of(found)), None)
    if form.get("maxItems", LONGEST) < LONGEST and good is not None:
        yield [good] * (form["maxItems"] + 1)
    if not alone:  # what is no item of this form may be one of another
        return
    for item in found:
        for value in beyond(item, defs, alone=True):
            yield [value]
    if found:
        yield from ([value] for value in wrong_types(found))


def wrong_types(found: list[dict[str, Any]]) -> Iterator[Any]:
    accepted = types_of(found)
    if accepted:  # else anything goes
        yield from (value for kind, value in SAMPLES.items() if kind not in accepted)


def cases(kind: type[GenerationRequest]) -> Iterator[tuple[str, Any]]:
    schema = kind.model_json_schema()
    defs = schema.get("$defs", {})
    for name, described in schema["properties"].items():
        found = list(forms(described, defs))
        for value in wrong_types(found):
            yield name, value
        for form in found:
            alone = sum(form.get("type") == other.get("type") for other in found) == 1
            for value in beyond(form, defs, alone=alone):
                yield name, value


CASES = {name: list(cases(kind)) for name, (kind, _, _) in KINDS.items()}


def test_the_cases_are_many_and_name_every_field() -> None:
    """What the test below rests on."""
    for name, (kind, _, _) in KINDS.items():
        assert {field for field, _ in CASES[name]} == set(kind.model_fields)
        assert len(CASES[name]) > 5 * len(kind.model_fields)
    common = [case for case in CASES["chat"] if case[0] == "temperature"]
    assert common[-2:] == [("temperature", -0.25), ("temperature", 2.25)]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.row("D1", "D5")
async def test_each_is_refused_by_name_before_anything_runs(served: Any, name: str, stream: bool) -> None:
    _, path, valid = KINDS[name]
    limit = asyncio.Semaphore(8)

    async def ask(field: str, value: Any) -> str | None:
        body = {**valid, "stream": stream, field: value}
        async with limit:
            answer = await served.post(path, body)
        shown = f"{field} = {str(value)[:60]}: {answer.status_code} {answer.text[:200]}"
        if answer.status_code != 400 or answer.headers["content-type"] != "application/json":
            return shown
        error = answer.json()["error"]
        named = str(error["param"]).replace("[", ".").split(".")[0]
        good = named == field and error["type"] == "invalid_request_error" and len(answer.content) < 4096
        return None if good else shown

    found = await asyncio.gather(*(ask(field, value) for field, value in CASES[name]))
    wrong = [shown for shown in found if shown]
    assert not wrong, "\n".join(wrong)
    assert not served.engine.requests
    assert (await served.post(path, {**valid, "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "86401"])
async def test_a_wrong_timeout_is_refused_by_its_header(served: Any, value: str) -> None:
    for send in (served.chat, served.complete):
        error = (await send(headers={"x-request-timeout": value})).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "x-request-timeout")
    assert not served.engine.requests
