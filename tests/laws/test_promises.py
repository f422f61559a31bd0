"""Every promise of tests/promises.toml has a test that names it, and no test names what is not there."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
LISTED = tomllib.loads((TESTS / "promises.toml").read_text())
OPEN = set(LISTED.pop("open"))
KEPT = {row for section in LISTED.values() for row in section}


def _marked(path: Path) -> Iterator[str]:
    """Ids in the decorators of a file's tests, its pytestmark and the marks of its parameters."""
    text = path.read_text()
    if "mark.row" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.row":
            yield from (ast.literal_eval(word) for word in node.args)


MARKED = {row for path in sorted(TESTS.rglob("test_*.py")) for row in _marked(path)}


def test_each_promise_has_a_test() -> None:
    assert not sorted(KEPT - MARKED)


def test_each_mark_is_a_promise() -> None:
    assert not sorted(MARKED - KEPT), "unknown, or listed as open"


def test_a_promise_is_listed_once_and_in_words() -> None:
    words = list(LISTED.values())
    assert sum(map(len, words)) == len(KEPT)
    assert not KEPT & OPEN
    assert all(len(text) > 3 for section in words for text in section.values())
