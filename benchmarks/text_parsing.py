"""What reading reasoning and tool calls costs per token in the text path, beside detokenizing alone.

    python benchmarks/text_parsing.py [--rounds 7]

Every token of an answer goes through one pipeline as a stream's would, each followed by taking the events
that came of it. Times are CPU time of this thread; the ways are interleaved, and each figure is the median
over the rounds. The tokenizer is the demonstration model's: a large vocabulary's tokens are longer and fewer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from penstock.frontend.text.message import MessageParser
from penstock.frontend.text.pipeline import TextPipeline
from penstock.frontend.text.reasoning_formats import REASONING_PARSERS
from penstock.frontend.text.tools import TOOL_PARSERS
from penstock.frontend.text.tools.events import Tools
from penstock.frontend.text.vocabulary import Vocabulary

TOKENIZER = Path(__file__).parents[1] / "deploy/local/demo/model/tokenizer.json"
PROSE = "The weather in Paris is mild today, and it will stay so until the end of the week. " * 40
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}, "count": {"type": "integer"}}}
TOOLS = Tools({"write": SCHEMA})
ARGUMENTS = {"text": PROSE[:1200], "count": 3}
CALL = json.dumps({"name": "write", "arguments": ARGUMENTS})
XML = (
    f"<function=write>\n<parameter=text>\n{PROSE[:1200]}\n</parameter>\n"
    "<parameter=count>\n3\n</parameter>\n</function>"
)
GLM = f"write\n<arg_key>text</arg_key>\n<arg_value>{PROSE[:1200]}</arg_value>\n"
INVOKE = (
    f'<invoke name="write">\n<parameter name="text">{PROSE[:1200]}</parameter>\n'
    '<parameter name="count">3</parameter>\n</invoke>'
)
KIMI = f"<|tool_call_begin|>functions.write:0<|tool_call_argument_begin|>{json.dumps(ARGUMENTS)}"
CHANNEL, NEXT = "<|channel|>", "<|end|><|start|>assistant"
HARMONY = f"{CHANNEL}commentary to=functions.write <|constrain|>json<|message|>{json.dumps(ARGUMENTS)}"
PYTHONIC = f"[write(text={PROSE[:1200]!r}, count=3)]"

Make = Callable[[], MessageParser | None]


def message(tools: str | None, reasoning: str | None = None) -> Make:
    def make() -> MessageParser:
        return MessageParser(
            REASONING_PARSERS[reasoning].parser(inside=False) if reasoning else None,
            TOOL_PARSERS[tools](TOOLS) if tools else None,
        )

    return make


CASES: dict[str, tuple[str, Make]] = {
    "detokenizing alone": (PROSE, lambda: None),
    "reasoning": (f"<think>\n{PROSE}\n</think>\n", message(None, reasoning="qwen3")),
    "answer after reasoning": (f"<think>\nHm.\n</think>\n\n{PROSE}", message(None, reasoning="qwen3")),
    **{f"text, {name}": (PROSE, message(name)) for name in ("hermes", "mistral", "qwen3_xml", "deepseek_v3")},
    "text, llama3_json": (PROSE, message("llama3_json")),
    "reasoning, harmony": (f"{CHANNEL}analysis<|message|>{PROSE}{NEXT}", message(None, reasoning="harmony")),
    "answer, harmony": (f"{CHANNEL}final<|message|>{PROSE}", message("harmony", reasoning="harmony")),
    "text, reasoning and hermes": (
        f"<think>\nHm.\n</think>\n\n{PROSE}",
        message("hermes", reasoning="qwen3"),
    ),
    "call, hermes": (f"<tool_call>\n{CALL}\n</tool_call>", message("hermes")),
    "call, llama3_json": (CALL.replace("arguments", "parameters"), message("llama3_json")),
    "call, mistral": (f"[TOOL_CALLS][{CALL}]", message("mistral")),
    "call, pythonic": (PYTHONIC, message("pythonic")),
    "call, qwen3_xml": (f"<tool_call>\n{XML}\n</tool_call>", message("qwen3_xml")),
    "call, glm": (f"<tool_call>{GLM}</tool_call>", message("glm")),
    "call, minimax_m2": (f"<minimax:tool_call>\n{INVOKE}\n</minimax:tool_call>", message("minimax_m2")),
    "call, kimi_k2": (f"<|tool_calls_section_begin|>{KIMI}", message("kimi_k2")),
    "call, harmony": (HARMONY, message("harmony", reasoning="harmony")),
}


def once(vocabulary: Vocabulary, ids: list[int], make: Make) -> float:
    """CPU seconds for one answer."""
    sink = make()
    pipeline = TextPipeline.create(vocabulary, [], sink=sink)
    feed = pipeline.feed
    begin = time.thread_time()
    if sink is None:
        for token_id in ids:
            feed(token_id)
    else:
        for token_id in ids:
            if feed(token_id):
                sink.take()
        sink.finish()
    return time.thread_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    vocabulary = Vocabulary.from_buffer(TOKENIZER.read_bytes())
    encoded = {name: vocabulary.tokenizer.encode(text).ids for name, (text, _) in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds + 1):  # the first warms up
        for name, (_, make) in CASES.items():
            took = sum(once(vocabulary, encoded[name], make) for _ in range(10)) / 10
            times[name].append(took / len(encoded[name]) * 1e6)
    base = statistics.median(times["detokenizing alone"][1:])
    print("| what | us per token | beyond detokenizing |\n|---|---|---|")
    for name, row in times.items():
        took = statistics.median(row[1:])
        print(f"| {name} | {took:.2f} | {took - base:.2f} |")


if __name__ == "__main__":
    main()
