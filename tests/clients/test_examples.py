"""Every file of examples/clients runs against a real server, unchanged, and prints what it promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "clients"
PARIS = "The capital of France is Paris."

PROMISED = {
    "openai_sync.py": [
        "model: penstock-demo",
        f"chat: {PARIS}",
        f"stream: {PARIS}",
        "tokens: 17 8",
        "logprobs: ['The', ' capital', ' of']",
        "tool: get_weather {'city':",
        "parsed: City",
        "marks: {'trace_id': 'one'} asked-once chatcmpl-asked-once",
        "choice: ",
        "unknown model: model_not_found",
        "bad value: temperature",
    ],
    "openai_async.py": [f"France: {PARIS}", "Spain: The capital of Spain is Madrid.", "finish: stop"],
    "litellm_client.py": [
        f"openai: {PARIS}",
        f"hosted_vllm: {PARIS}",
        f"stream: {PARIS}",
        f"alias: {PARIS}",
        "unknown model: NotFoundError",
        "batch: 1 of 5",
    ],
    "langchain_client.py": [
        f"invoke: {PARIS}",
        f"stream: {PARIS}",
        "tool: get_weather {'city':",
        "structured: City",
    ],
    "llama_index_client.py": [f"chat: {PARIS}", f"stream: {PARIS}", "complete: "],
    "instructor_client.py": ["TOOLS: City", "JSON_SCHEMA: City"],
    "openai_node.mjs": [
        f"chat: {PARIS}",
        f"stream: {PARIS}",
        f"helper: {PARIS}",
        "bad value: 400 temperature",
    ],
    "curl.sh": [PARIS, "data: [DONE]", '"code":"invalid_json"', "status 400"],
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir()))
@pytest.mark.row("A1.16", "A10.1", "A10.8", "A11.1", "A11.2", "A11.3", "A11.4", "A11.5", "A11.6", "A11.9")
def test_an_example_runs(name: str, run_client: Callable[..., str]) -> None:
    printed = run_client(name)
    for words in PROMISED[name]:
        assert words in printed, printed
