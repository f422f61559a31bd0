"""Ties a child process to its supervisor: when the supervisor dies, however it dies, the child does too."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import MutableMapping

# Set by the supervisor for its children: its own process id.
VARIABLE = "PENSTOCK_SUPERVISOR"
_PR_SET_PDEATHSIG = 1


def hold(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Asks the kernel to kill this process when its parent dies. Does nothing without a supervisor, and on
    systems other than Linux. Leaves with 1 when the supervisor is gone already. Whether there is one."""
    supervisor = environ.pop(VARIABLE, "")
    if not supervisor or not sys.platform.startswith("linux"):
        return bool(supervisor)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if str(os.getppid()) != supervisor:
        os._exit(1)
    return True
