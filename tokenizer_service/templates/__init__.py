"""The library of named chat templates: one Jinja file each, and other names some of them go by.

`default`, `llama-2-chat`, `falcon-instruct`, `falcon-180b-chat`, `mpt-chat`, `wizardcoder` and
`phind-codellama` write exactly what LiteLLM writes for these models, which has no generation prompt and, for
`mpt-chat`, no line break after the role. The others are the formats the models were trained on.
"""

from __future__ import annotations

from importlib import resources

_ALIASES = {
    "codellama-instruct": "llama-2-chat",
    "falcon-chat": "falcon-180b-chat",
    "hermes": "chatml-tools",
}


def names() -> list[str]:
    """Every name that load() knows, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(
        [file.name[: -len(".jinja")] for file in files if file.name.endswith(".jinja")] + [*_ALIASES]
    )


def load(name: str) -> str:
    """The template's source. Raises KeyError for an unknown name."""
    if name not in names():
        raise KeyError(name)
    file = resources.files(__name__) / f"{_ALIASES.get(name, name)}.jinja"
    return file.read_text(encoding="utf-8")
