"""Chooses who makes drafts, by name. Knows no tokens."""

from __future__ import annotations

from penstock.engine_service.core.messages import Configure
from penstock.engine_service.core.ngram import NgramDrafter
from penstock.engine_service.core.plan import Drafter

# Rows up to which a step costs about what it costs with one, drafted rows included: on a CPU 8 rows take the time
# of 1 and 32 take 1.25 times it (docs/log.md); on a GPU weights are the cost far longer.
_FREE_ROWS = {"cpu": 32}
_FREE_ROWS_DEVICE = 128


def make_drafter(configure: Configure, device: str) -> Drafter | None:
    """The drafter that `configure` names, None for none. Raises ValueError for a name nobody has."""
    if configure.speculative in ("", "none"):
        return None
    if configure.speculative != "ngram":
        raise ValueError(
            f"speculation '{configure.speculative[:20]}' is not supported; supported: none, ngram"
        )
    return NgramDrafter(configure.speculative_tokens, _FREE_ROWS.get(device, _FREE_ROWS_DEVICE))
