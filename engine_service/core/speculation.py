"""Chooses who makes drafts, by name. Knows no tokens."""

from __future__ import annotations

from penstock.engine_service.core.messages import Configure
from penstock.engine_service.core.ngram import NgramDrafter
from penstock.engine_service.core.plan import Drafter

# Rows, drafted ones included, up to which a step costs about what it costs with one: reading the weights is
# the cost, on a GPU for longer than on a CPU.
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


def most_drafted(configure: Configure, device: str) -> int:
    """Draft tokens of one step at most, all sequences together. Raises ValueError as make_drafter does."""
    drafter = make_drafter(configure, device)
    if drafter is None:
        return 0
    return max(count * drafter.budget(count) for count in range(1, configure.max_num_seqs + 1))
