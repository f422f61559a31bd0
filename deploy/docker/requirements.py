"""Prints what the package's extras need, so that an image layer holds dependencies and not our code.

python requirements.py pyproject.toml frontend ...
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator


def requirements(project: dict[str, object], extras: list[str]) -> Iterator[str]:
    """The project's own requirements and those of `extras`, references to further extras resolved."""
    name = str(project["name"])
    optional: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    own: list[str] = project["dependencies"]  # type: ignore[assignment]
    yield from own
    pending = list(extras)
    while pending:
        for requirement in optional[pending.pop()]:
            reference = re.fullmatch(rf"{name}\[(.+)\]", requirement)
            if reference:
                pending += reference[1].split(",")
            else:
                yield requirement


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        document = tomllib.load(file)
    print("\n".join(requirements(document["project"], sys.argv[2:])))
