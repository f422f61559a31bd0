"""Which models are served: engines paired with tokenizers by the tokenizer's fingerprint. Pure data in and
out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from penstock.protos import engine_pb2, tokenizer_pb2

# Enough of a fingerprint to tell two apart in a log line.
SHORT = 12


@dataclass(frozen=True, slots=True)
class Model:
    """What is served under one id. info and tokenizer are as last told; the replicas may be away just now."""

    id: str
    aliases: tuple[str, ...]
    info: engine_pb2.EngineInfo
    tokenizer: tokenizer_pb2.TokenizerInfo
    system_fingerprint: str

    @property
    def fingerprint(self) -> str:
        return self.tokenizer.fingerprint

    def served_by(self, engine: engine_pb2.EngineInfo) -> bool:
        """Whether the engine takes prompts that were encoded for this model."""
        return engine.model == self.id and engine.tokenizer_fingerprint == self.info.tokenizer_fingerprint

    def named_by(self, tokenizer: tokenizer_pb2.TokenizerInfo) -> bool:
        return tokenizer.model == self.id or tokenizer.model in self.aliases


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A model that cannot be served, since no tokenizer has its engine's fingerprint."""

    model: str
    engine: str  # fingerprints, shortened
    tokenizers: tuple[str, ...]


def pair(
    engines: Iterable[engine_pb2.EngineInfo],
    tokenizers: Iterable[tokenizer_pb2.TokenizerInfo],
    aliases: Mapping[str, str] | None = None,
) -> tuple[dict[str, Model], list[Mismatch]]:
    """Served models by name (ids and aliases), and the refused ones. The first engine that claims a name
    keeps it; an id wins over the operator's `aliases` (name to id or alias), those over the engines' own.
    Without any tokenizer nothing is served and nothing is a mismatch."""
    known = list(tokenizers)
    found: dict[str, Model] = {}
    mismatches: list[Mismatch] = []
    for info in engines:
        named = [item for item in known if item.model in (info.model, *info.aliases)]
        # A folder without tokenizer.json has no fingerprint at the engine: its tokenizer is made from other
        # files, and only the name pairs the two.
        if info.tokenizer_fingerprint:
            fitting = [item for item in known if item.fingerprint == info.tokenizer_fingerprint]
        else:
            fitting = named
        if fitting:
            # Models may share a tokenizer and differ in templates: then the name decides.
            named = [item for item in named if item in fitting]
            best = (named or fitting)[0]
            model = Model(info.model, tuple(info.aliases), info, best, system_fingerprint(info, best))
            found.setdefault(model.id, model)
        elif known:
            shortened = tuple(sorted({item.fingerprint[:SHORT] for item in known}))
            mismatches.append(Mismatch(info.model, info.tokenizer_fingerprint[:SHORT], shortened))
    models = dict(found)
    for model in found.values():
        for alias in model.aliases:
            models.setdefault(alias, model)
    wanted = (aliases or {}).items()
    own = {name: models[to] for name, to in wanted if name not in found and to in models}
    return models | own, mismatches


def system_fingerprint(engine: engine_pb2.EngineInfo, tokenizer: tokenizer_pb2.TokenizerInfo) -> str:
    """What the API calls by this name: equal as long as the same request gives the same tokens. It names the
    software's version and how the model is computed, then sums up all that bears on an answer; a restart, the
    size of the cache and the names of the model do not."""
    how = f"{engine.engine_version}-{engine.dtype or 'auto'}-tp{max(1, engine.tensor_parallel_size)}"
    parts = [
        how,
        engine.root,
        engine.device,
        *engine.architectures,
        *sorted(engine.capabilities),
        tokenizer.fingerprint,
        engine.generation_defaults.SerializeToString(deterministic=True).hex(),
    ]
    return f"penstock-{how}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:SHORT]}"


def listed(models: Mapping[str, Model]) -> str:
    """The ids for an error message."""
    return ", ".join(sorted({model.id for model in models.values()}))
