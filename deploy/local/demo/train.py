"""Trains the bundled demonstration model from nothing but this package; knows nothing of serving.

Run as `python -m penstock.local.demo.train --out DIR`. A stopped run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from penstock.local.demo import template
from penstock.local.demo.dialogues import document
from penstock.local.demo.tokens import (
    CONTEXT_LENGTH,
    VOCABULARY_SIZE,
    Encoded,
    encode,
    save_tokenizer,
    train_tokenizer,
)

ROW_LIMIT = 1100
"""Longest document trained on, in tokens."""


@dataclass(frozen=True)
class Plan:
    """The numbers of one training run.

    Attributes:
        steps: optimizer steps.
        tokens: tokens a step, about.
        matrix_rate, other_rate: peak learning rates of the weight matrices and of the rest.
        warmup, cooldown: shares of the steps in which the rates rise and fall linearly.
        early: share of the steps with the early mix of documents.
        seed: seeds the corpus, the tokenizer and the weights.
    """

    steps: int
    tokens: int = 2560
    matrix_rate: float = 0.015
    other_rate: float = 2e-3
    warmup: float = 0.02
    cooldown: float = 0.5
    early: float = 0.5
    seed: int = 20

    def rate_factor(self, step: int) -> float:
        """The share of the peak rates at a step: up, flat, then down to 2 %."""
        up = step / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return max(0.02, min(1.0, up, down))


def model_config() -> LlamaConfig:
    """The shape of the model: some four million parameters, tied embeddings, grouped key and value heads."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=template.SPECIAL_TOKENS.index(template.TURN_END),
        pad_token_id=template.SPECIAL_TOKENS.index(template.END_OF_TEXT),
    )


def micro_batches(tokenizer: Tokenizer, plan: Plan, step: int) -> list[list[Encoded]]:
    """The documents of one step, grouped by length against padding; a function of seed and step alone."""
    rng = random.Random(f"{plan.seed}:{step}")
    items: list[Encoded] = []
    total = 0
    while total < plan.tokens:
        item = encode(tokenizer, document(rng, early=step < plan.early * plan.steps))
        item = Encoded(item.ids[:ROW_LIMIT], item.learnt[:ROW_LIMIT])
        items.append(item)
        total += len(item.ids)
    items.sort(key=lambda item: len(item.ids))
    groups: list[list[Encoded]] = [[]]
    for item in items:
        first = groups[-1][0] if groups[-1] else item
        padded = (len(groups[-1]) + 1) * len(item.ids)
        if padded > 4096 or len(item.ids) > 1.3 * len(first.ids) + 16:
            groups.append([])
        groups[-1].append(item)
    return groups


def batch_loss(model: LlamaForCausalLM, group: list[Encoded]) -> tuple[torch.Tensor, int]:
    """Summed loss in nats over the learnt tokens of a group, and their number."""
    width = max(len(item.ids) for item in group)
    # Padding stands at the right, where a causal model never sees it.
    ids = torch.tensor([item.ids + [0] * (width - len(item.ids)) for item in group])
    learnt = torch.tensor([item.learnt + [False] * (width - len(item.learnt)) for item in group])
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = learnt[:, 1:]
    logits = model.lm_head(hidden[wanted])
    targets = ids[:, 1:][wanted]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def half_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A bf16 copy that computes the gradients, as fast as the processor allows for short rows."""
    half: LlamaForCausalLM = copy.deepcopy(model).bfloat16()
    half.set_attn_implementation("eager")
    return half


def move_gradients(half: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    """Hands the copy's gradients to the float32 weights."""
    for source, target in zip(half.parameters(), model.parameters(), strict=True):
        target.grad = None if source.grad is None else source.grad.float()
        source.grad = None


@torch.no_grad()
def move_weights(model: LlamaForCausalLM, half: LlamaForCausalLM) -> None:
    """Rounds the float32 weights into the copy."""
    for source, target in zip(model.parameters(), half.parameters(), strict=True):
        target.copy_(source)


def optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the folder that a server loads; each file is replaced whole, so nobody reads half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        staging = Path(name)
        save_tokenizer(tokenizer, staging)
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(staging)
        eos = [template.SPECIAL_TOKENS.index(mark) for mark in (template.TURN_END, template.END_OF_TEXT)]
        GenerationConfig(
            do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=eos, pad_token_id=0
        ).save_pretrained(staging)
        weights = {
            k: v.to(torch.bfloat16).contiguous()
            for k, v in model.state_dict().items()
            if k != "lm_head.weight"
        }
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        for path in sorted(staging.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def save_checkpoint(
    path: Path, step: int, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer]
) -> None:
    """Keeps weights, optimizer states and the step, in one safetensors file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for index, opt in enumerate(opts):
        for number, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{index}.{number}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"step": str(step)})
    (path.with_suffix(".json")).write_text(json.dumps({"step": step}))
    os.replace(partial, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer]) -> int:
    """Restores what `save_checkpoint` kept; gives the step."""
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, strict=False)
    for index, opt in enumerate(opts):
        saved = opt.state_dict()
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"opt.{index}."):
                _, _, number, key = name.split(".", 3)
                states.setdefault(int(number), {})[key] = tensor
        opt.load_state_dict({"state": states, "param_groups": saved["param_groups"]})
    return int(json.loads(path.with_suffix(".json").read_text())["step"])


def run(plan: Plan, out: Path, work: Path, export_seconds: float) -> Iterator[str]:
    """Trains and yields a line of progress every few steps."""
    torch.manual_seed(plan.seed)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_path, checkpoint = work / "tokenizer.json", work / "checkpoint.safetensors"
    if not tokenizer_path.exists():
        train_tokenizer(plan.seed).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    model = LlamaForCausalLM(model_config())
    opts = optimizers(model, plan)
    start = load_checkpoint(checkpoint, model, opts) if checkpoint.exists() else 0
    if start == 0:
        export(model, tokenizer, out)
    half = half_copy(model)
    peaks = [group["lr"] for opt in opts for group in opt.param_groups]
    began = exported = time.monotonic()
    seen, loss_sum, loss_count = 0, 0.0, 0
    yield f"parameters {sum(p.numel() for p in model.parameters()):,}, first step {start}"
    for step in range(start, plan.steps):
        groups = micro_batches(tokenizer, plan, step)
        count = sum(sum(item.learnt[1:]) for group in groups for item in group)
        for group in groups:
            loss, _ = batch_loss(half, group)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item()
        loss_count += count
        seen += sum(len(item.ids) for group in groups for item in group)
        move_gradients(half, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * plan.rate_factor(step)
            opt.step()
            opt.zero_grad(set_to_none=True)
        move_weights(model, half)
        if step % 20 == 19:
            rate = seen / (time.monotonic() - began)
            yield f"step {step + 1}/{plan.steps} loss {loss_sum / loss_count:.4f} {rate:.0f} tokens/s"
            loss_sum, loss_count = 0.0, 0
        if time.monotonic() - exported > export_seconds or step == plan.steps - 1:
            exported = time.monotonic()
            save_checkpoint(checkpoint, step + 1, model, opts)
            export(model, tokenizer, out)
            yield f"exported at step {step + 1}"


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=None, help="folder of checkpoints (default: OUT.work)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="tokens a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export-seconds", type=float, default=600.0)
    parser.add_argument("--restart", action="store_true", help="forget an earlier run's checkpoints")
    options = parser.parse_args()
    work = options.work or options.out.with_name(options.out.name + ".work")
    if options.restart and work.exists():
        shutil.rmtree(work)
    torch.set_num_threads(options.threads)
    for line in run(Plan(options.steps, options.tokens), options.out, work, options.export_seconds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
