"""How the small kernels are launched: whether each may start while the kernel before it still runs.

A kernel launched so (programmatic dependent launch) waits on the device before it touches anything that a
kernel may have written. Only constants, such as a norm's weights, are read earlier: they must not come from
the kernel just before, which holds for weights placed at start-up. Knows nothing of what a kernel does.
"""

from __future__ import annotations

import torch

_FIRST_CAPABILITY = (9, 0)

_dependent = False


def use_dependent_launch(enabled: bool) -> None:
    """Switches dependent launch for every later launch in this process; it is off at first.

    Raises ValueError where the current device cannot do it: it needs compute capability 9.0. A captured CUDA
    graph keeps what was in force when it was captured.
    """
    global _dependent
    if enabled:
        able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _FIRST_CAPABILITY
        if not able:
            raise ValueError("dependent launch needs a device of compute capability 9.0 or later")
    _dependent = enabled


def options() -> dict[str, object]:
    """Keyword arguments of a launch of a kernel with a DEPENDENT constexpr."""
    return {"DEPENDENT": True, "launch_pdl": True} if _dependent else {"DEPENDENT": False}
