"""Measures the demonstration model on questions that training never saw; knows nothing of serving.

Run as `python -m penstock.local.demo.evaluate [--model DIR] [--write]`. An answer counts as right when it
equals the expected text (parsed, for tool calls); for jokes and stories, when it is one the model was taught.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from penstock.local.demo import dialogues, questions, smalltalk, toolbox, verse, words, writing
from penstock.local.demo.dialogues import Document
from penstock.local.demo.exchange import Exchange, is_held_out

MODEL_FOLDER = Path(__file__).parent / "model"
SEED = 7
CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One held-out prompt.

    Attributes:
        kind: family of questions.
        prompt: the whole text given to the model.
        answer: the text expected.
        calls: the tool calls expected, if any.
    """

    kind: str
    prompt: str
    answer: str
    calls: tuple[dict[str, Any], ...] = ()


def _from_maker(make: dialogues.Maker) -> Callable[[random.Random], Document]:
    def build(rng: random.Random) -> Document:
        return dialogues.chat(rng, dialogues.draw(rng, make, held_out=True), earlier=0)

    return build


def _tool_call(rng: random.Random) -> Document:
    return dialogues.tool_use(rng, held_out=True)


def _tool_answer(rng: random.Random) -> Document:
    while True:
        tool = toolbox.draw_tool(rng)
        call = toolbox.tool_call(rng, tool)
        if len(call.calls) == 1 and is_held_out(call.kind, call.key):
            break
    item = Document([], [one.schema(rng) for one in toolbox.toolbox(rng, tool)])
    dialogues.append(item.messages, call)
    item.last = dialogues.append_result(rng, item.messages, tool, call)
    return item


def _no_call(rng: random.Random) -> Document:
    makers = (questions.capital, questions.opposite, writing.sentiment, smalltalk.greeting, writing.poem)
    item = _from_maker(rng.choice(makers))(rng)
    item.tools = [tool.schema(rng) for tool in toolbox.toolbox(rng, toolbox.draw_tool(rng))]
    return item


def _plain(rng: random.Random) -> Document:
    countries = [country for country in words.CAPITALS if is_held_out("capitals", (country, "plain"))]
    if rng.random() < 0.2:
        country = rng.choice(countries)
        return Document(plain=(f"The capital of {country} is", f" {words.CAPITALS[country]}."))
    operator, left, right = dialogues.draw(rng, questions.arithmetic, held_out=True).key
    value = questions.result(operator, int(left), int(right))
    return Document(plain=(f"{left} {operator} {right} =", f" {value}"))


BUILDERS: dict[str, Callable[[random.Random], Document]] = {
    "capitals": _from_maker(questions.capital),
    "arithmetic": _from_maker(questions.arithmetic),
    "opposites": _from_maker(questions.opposite),
    "colours": _from_maker(questions.colour),
    "animals": _from_maker(questions.animal),
    "calendar": _from_maker(questions.calendar),
    "counting": _from_maker(questions.counting),
    "lists": _from_maker(questions.category),
    "translation": _from_maker(questions.translation),
    "greetings": _from_maker(smalltalk.greeting),
    "identity": _from_maker(smalltalk.identity),
    "poems": _from_maker(writing.poem),
    "jokes": _from_maker(writing.joke),
    "stories": _from_maker(writing.story),
    "sentiment": _from_maker(writing.sentiment),
    "json": _from_maker(writing.json_answer),
    "echo": _from_maker(writing.echo),
    "facts": _from_maker(smalltalk.fact),
    "unknown": _from_maker(smalltalk.unknown),
    "follow-ups": lambda rng: dialogues.follow_up(rng, held_out=True),
    "tool calls": _tool_call,
    "tool answers": _tool_answer,
    "no call needed": _no_call,
    "plain text": _plain,
}


def fixed_questions() -> frozenset[str]:
    """The normalized prompts that are always trained on, whatever the split says of them."""
    return frozenset(dialogues.normalized(question) for question, _ in smalltalk.FIXED)


def documents(kind: str, count: int) -> Iterator[Document]:
    """Different held-out documents of a kind, at most `count`; fewer where the kind has no more."""
    rng = random.Random(f"{SEED}:{kind}")
    fixed, seen = fixed_questions(), set[str]()
    for _ in range(count * 20):
        item = BUILDERS[kind](rng)
        text = item.plain[0] if item.plain else dialogues.normalized(str(item.messages[-2]["content"]))
        identity = (
            json.dumps(item.messages) if kind in ("follow-ups", "tool answers", "no call needed") else text
        )
        if identity in seen or text in fixed:
            continue
        seen.add(identity)
        yield item
        if len(seen) == count:
            return


def case_of(kind: str, item: Document, tokenizer: PreTrainedTokenizerBase) -> Case:
    """Renders a document as prompt and expected answer."""
    if item.plain is not None:
        return Case(kind, item.plain[0], item.plain[1])
    tools: list[Any] | None = item.tools
    prompt = tokenizer.apply_chat_template(
        item.messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True
    )
    last = item.last or Exchange(kind, "", "", ())
    return Case(kind, str(prompt), last.answer, last.calls)


def is_right(case: Case, reply: str) -> bool:
    """Whether a reply is what the case expects."""
    if case.calls:
        try:
            return [json.loads(text) for text in CALL.findall(reply)] == list(case.calls)
        except json.JSONDecodeError:
            return False
    if case.answer in verse.STORIES:
        return reply in verse.STORIES
    if case.kind == "jokes" and " about " not in case.prompt:
        return reply in {text for _, text in verse.JOKES}
    return reply == case.answer or (case.kind == "plain text" and reply.split("\n")[0] == case.answer)


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int = 160
) -> list[str]:
    """Greedy continuations, computed in batches of prompts of similar length.

    Args:
        limit: most new tokens of a continuation.
    """
    replies = [""] * len(prompts)
    rows = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        width = max(len(rows[index]) for index in chosen)
        ids = torch.tensor([[0] * (width - len(rows[index])) + rows[index] for index in chosen])
        mask = torch.tensor([[0] * (width - len(rows[index])) + [1] * len(rows[index]) for index in chosen])
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            temperature=None,
            top_p=None,
        )
        for index, row in zip(chosen, out[:, width:].tolist(), strict=True):
            replies[index] = str(tokenizer.decode(row, skip_special_tokens=True))
    return replies


def evaluate(folder: Path, count: int) -> tuple[dict[str, dict[str, Any]], list[tuple[Case, str]]]:
    """Right answers by kind, and the cases answered wrongly with the replies."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table: dict[str, dict[str, Any]] = {}
    wrong: list[tuple[Case, str]] = []
    for kind in BUILDERS:
        cases = [case_of(kind, item, tokenizer) for item in documents(kind, count)]
        replies = greedy(model, tokenizer, [case.prompt for case in cases])
        missed = [
            (case, reply) for case, reply in zip(cases, replies, strict=True) if not is_right(case, reply)
        ]
        table[kind] = {"questions": len(cases), "right": len(cases) - len(missed)}
        table[kind]["accuracy"] = round(table[kind]["right"] / len(cases), 4)
        wrong += missed
    return table, wrong


def main() -> None:
    """Reads the command line, prints the table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--count", type=int, default=100, help="questions a kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--write", action="store_true", help="write evaluation.json and the card's table into the folder"
    )
    parser.add_argument("--show-wrong", type=int, default=0, help="print this many wrong answers a kind")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table, wrong = evaluate(options.model, options.count)
    for kind, row in table.items():
        print(f"{kind:16} {row['right']:4} of {row['questions']:4}  {row['accuracy']:.1%}")
        for case, reply in [pair for pair in wrong if pair[0].kind == kind][: options.show_wrong]:
            print(
                f"    {case.prompt[-160:]!r}\n      wanted {case.answer or case.calls!r}\n"
                f"      got    {reply!r}"
            )
    if options.write:
        write_results(options.model, table)


def write_results(folder: Path, table: dict[str, dict[str, Any]]) -> None:
    """Writes evaluation.json, and the table between the card's two marks."""
    total = {name: sum(row[name] for row in table.values()) for name in ("questions", "right")}
    report = {"decoding": "greedy, float32, transformers", "seed": SEED, "total": total, "kinds": table}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = [
        f"| {kind} | {row['questions']} | {row['right'] / row['questions']:.1%} |"
        for kind, row in table.items()
    ]
    rows.append(f"| **all** | {total['questions']} | {total['right'] / total['questions']:.1%} |")
    card = folder / "README.md"
    head, _, rest = card.read_text().partition("<!-- results -->")
    tail = rest.partition("<!-- end of results -->")[2]
    lines = "\n".join(["| kind | held-out questions | right |", "|---|---|---|", *rows])
    card.write_text(f"{head}<!-- results -->\n{lines}\n<!-- end of results -->{tail}")


if __name__ == "__main__":
    main()
