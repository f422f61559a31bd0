"""Makes tiny random folders of encoders, and of decoders as embedders and classifiers. Needs transformers.

Biases and norms are random too, so that a model which ignores one gives other numbers. There is no tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 120
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
_DECODER: dict[str, Any] = {**_ENCODER, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 1}

# transformers' name before Model or For -> configuration
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": _ENCODER,
    "Roberta": {**_ENCODER, "pad_token_id": 1, "type_vocab_size": 1},
    "XLMRoberta": {**_ENCODER, "pad_token_id": 1, "type_vocab_size": 1},
    "DistilBert": {
        "vocab_size": VOCAB_SIZE, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0,
        "max_position_embeddings": 80,
    },
    "MPNet": {**_ENCODER, "pad_token_id": 1, "max_position_embeddings": 300},  # beyond the last distance
    "NomicBert": _ENCODER,
    "ModernBert": {
        **_ENCODER, "num_hidden_layers": 4, "local_attention": 16, "bos_token_id": 2, "eos_token_id": 1,
        "cls_token_id": 2, "sep_token_id": 1,
    },
    "Llama": _DECODER,
    "Mistral": {**_DECODER, "sliding_window": 8},
    "Qwen2": _DECODER,
    "Qwen3": {**_DECODER, "head_dim": 16},
}  # fmt: skip


def make_pooled(folder: Path, family: str, end: str = "Model", **overrides: Any) -> Any:
    """Writes config and safetensors; `end` is what follows the family's name in the class's. Returns
    transformers' model, in float32."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **overrides})
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{family}{end}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.2)
    model.save_pretrained(folder)
    return model


def write_modules(
    folder: Path, pooling: str = "mean", dense: tuple[int, int] | None = None, normalize: bool = True
) -> None:
    """sentence-transformers' files beside a model of 32 dimensions; `dense`: inputs and outputs of a module
    whose weights are random."""
    import torch
    from safetensors.torch import save_file

    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalize else [])]
    listed = []
    for index, kind in enumerate(kinds):
        path = f"{index}_{kind}" if index else ""
        (folder / path).mkdir(exist_ok=True)
        name = f"sentence_transformers.models.{kind}"
        listed.append({"idx": index, "name": str(index), "path": path, "type": name})
    (folder / "modules.json").write_text(json.dumps(listed))
    settings = {"word_embedding_dimension": 32, "pooling_mode": pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if dense is not None:
        inputs, outputs = dense
        settings = {"in_features": inputs, "out_features": outputs, "bias": True}
        settings["activation_function"] = "torch.nn.modules.activation.Tanh"
        (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
        torch.manual_seed(3)
        tensors = {"linear.weight": torch.randn(outputs, inputs), "linear.bias": torch.randn(outputs)}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
