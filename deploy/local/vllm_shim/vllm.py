"""The names that programs for vLLM's offline interface import, such as litellm for its prefix `vllm/`.

Only those of penstock.local: what else such a program may look for is an AttributeError here.
"""

from __future__ import annotations

import threading
from typing import Any

from penstock.local import LLM as _LLM
from penstock.local import CompletionOutput, RequestOutput
from penstock.local import SamplingParams as _SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

_lock = threading.Lock()
_loaded: dict[str, _LLM] = {}


def LLM(*args: Any, **options: Any) -> _LLM:
    """penstock.local.LLM, loaded once for the same arguments: litellm's batches ask for a model from several
    threads at once, and would otherwise load it in each."""
    key = repr((args, sorted(options.items())))
    with _lock:  # for as long as a model takes to load: the others wait for this one
        if key not in _loaded or _loaded[key].closed:
            _loaded[key] = _LLM(*args, **options)
        return _loaded[key]


def SamplingParams(**options: Any) -> _SamplingParams:
    """penstock.local.SamplingParams. litellm's batches also say that they do not stream."""
    if options.get("stream") is False:
        del options["stream"]
    return _SamplingParams(**options)
