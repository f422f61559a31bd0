"""`python -m penstock.local.vllm_shim` prints the folder that holds the module `vllm`."""

from __future__ import annotations

from pathlib import Path

print(Path(__file__).parent)
