"""From what a caller sent to a grammar as llguidance takes it. Knows no tokens and no requests.

Runs where an input that hurts costs a process nobody waits for (see grammar_process). Raises GrammarError for
whatever is no grammar; whether it can be compiled shows later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from penstock.engine_service.core.messages import ConstraintSource, RequestError

# Between the parts of JSON, when nobody says: a blank, and a new line with its indentation (eight levels of
# four; what is deeper stays there). More would be valid too, but a model that has lost its way fills its
# answer with it.
WHITESPACE = r"[ \t]?(\r?\n[ \t]{0,32})?"
MAX_DEPTH = 64
_META = frozenset("\\.+*?()|[]{}^$")
# The first rule, which may be marked (`?start`) and have options in brackets.
_LARK = re.compile(r"^\s*(%llguidance\b|[?!]{0,2}start\s*(\[[^\]\n]*\])?\s*:(?!:))", re.MULTILINE)


class GrammarError(RequestError):
    """The source is at fault, not the server."""

    def __init__(self, message: str, reason: str = "invalid_grammar") -> None:
        super().__init__(reason, message)


def grammar_of(source: ConstraintSource) -> str:
    """The grammar of a constraint, without its preamble. Raises GrammarError."""
    match source.kind:
        case "json_schema":
            return _of_schema(source.text, source.whitespace_pattern)
        case "json_object":
            return _of_schema('{"type": "object"}', source.whitespace_pattern)
        case "regex":
            return _library().grammar_from_lark(f"start: {in_slashes(source.text)}")
        case "choice":
            return _of_choice(json.loads(source.text))
        case "grammar":
            return _of_grammar(source.text)
        case "structural_tag":
            from penstock.engine_service.core.structural_tag import lark_of_tag

            return lark_of_tag(_object(source.text))
    raise GrammarError(f"A constraint of kind '{source.kind[:40]}' is not known.")


def behind(preamble: str, grammar: str) -> str:
    """A grammar with something that stands before it. Each keeps its own names, so neither can reach into the
    other."""
    answer = {"lark_grammar": grammar}
    if grammar.startswith("{"):
        (answer,) = json.loads(grammar)["grammars"]
    parts = [
        {"lark_grammar": "start: @preamble @answer"},
        {"name": "preamble", "lark_grammar": preamble},
        {**answer, "name": "answer"},
    ]
    return json.dumps({"grammars": parts})


def json_options(whitespace_pattern: str | None) -> dict[str, Any]:
    """How llguidance is to read a schema: nothing it cannot enforce is let through."""
    pattern = WHITESPACE if whitespace_pattern is None else whitespace_pattern
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False}
    if pattern:
        options["whitespace_pattern"] = pattern
    else:
        options["whitespace_flexible"] = False
    return options


def literal(text: str) -> str:
    """A regular expression that matches this text alone."""
    return "".join("\\" + char if char in _META else char for char in text)


def in_slashes(pattern: str) -> str:
    """The pattern as Lark takes it; a digit is one of ten, as JSON and JavaScript have it."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(pattern, 'd')}/"


def _of_schema(text: str, whitespace_pattern: str | None) -> str:
    from penstock.engine_service.core.schema_checks import check_schema

    schema = _object(text)
    check_schema(schema)
    # Options a schema brings along could loosen what is enforced.
    schema.pop("x-guidance", None)
    return _library().grammar_from_json_schema(json.dumps(schema), overrides=json_options(whitespace_pattern))


def _of_choice(choices: Sequence[str]) -> str:
    return _library().grammar_from_regex("|".join(map(literal, dict.fromkeys(choices))))


def _of_grammar(text: str) -> str:
    """Lark as it is; anything without a rule of its `start` is another dialect of EBNF, with `::=`."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        lark = text if _LARK.search(text) else gbnf_to_lark(text)
    except RecursionError:
        raise GrammarError("The grammar is nested too deeply.", "grammar_too_complex") from None
    except Exception as error:
        raise GrammarError(f"The grammar is not valid: {str(error)[:500]}") from None
    return _library().grammar_from_lark(lark)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        depth = _depth(value)
    except RecursionError:
        depth = MAX_DEPTH + 1
    except ValueError as error:
        raise GrammarError(f"The constraint is not valid JSON: {error}.") from None
    if depth > MAX_DEPTH:
        raise GrammarError(f"The constraint is nested deeper than {MAX_DEPTH} levels.", "grammar_too_complex")
    if not isinstance(value, dict):
        raise GrammarError("The constraint must be a JSON object.")
    return value


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _library() -> Any:
    from llguidance import LLMatcher

    return LLMatcher
