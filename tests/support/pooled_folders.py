"""Makes tiny random BERT folders with a tokenizer: an embedder, a reranker, a classifier. Needs transformers.

A text is framed as `<|im_start|> text <|im_end|>`,
and a pair as `<|im_start|> text <|im_end|> text <|im_end|>` with token types 0 and 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

LABELS = ("anger", "joy", "fear")
_SIZES = {"vocab_size": 272, "max_position_embeddings": 96, "pad_token_id": 256}


def make_folder(folder: Path, kind: str, checkpoints: ModuleType, pooled: ModuleType) -> Path:
    """kind: embedder (mean, normalized), reranker (one label) or classifier (LABELS). checkpoints, pooled:
    the modules beside this one that make tokenizers and models."""
    labels = {"embedder": (), "reranker": ("LABEL_0",), "classifier": LABELS}[kind]
    overrides: dict[str, Any] = dict(_SIZES)
    if labels:
        overrides["id2label"] = dict(enumerate(labels))
        overrides["label2id"] = {label: index for index, label in enumerate(labels)}
    pooled.make_pooled(folder, "Bert", "ForSequenceClassification" if labels else "Model", **overrides)
    checkpoints.write_tokenizer(folder)
    _frame(folder / "tokenizer.json")
    if not labels:
        pooled.write_modules(folder)
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    return folder


def _frame(file: Path) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(file))
    begin, end = "<|im_start|>", "<|im_end|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )
    tokenizer.save(str(file))
