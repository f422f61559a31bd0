"""Published model shapes as folders without weights, for `--load-format dummy`. Knows no engine.

Dimensions are those of each model's own config.json; what does not change a shape or a habit is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON = {"hidden_act": "silu", "torch_dtype": "bfloat16", "attention_dropout": 0.0}
_LLAMA = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN2 = {
    **_COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": 151643,
}
_QWEN3 = {
    **_QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "eos_token_id": 151645,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA,
        **_sizes(4096, 14336, 32, 32, 8),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        **_sizes(4096, 14336, 32, 32, 8),
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "rope_scaling": {**_LLAMA3_SCALING, "factor": 8.0},
    },
    "llama-3.2-1b": {
        **_LLAMA,
        **_sizes(2048, 8192, 16, 32, 8),
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_scaling": {**_LLAMA3_SCALING, "factor": 32.0},
    },
    "qwen2.5-7b": {
        **_QWEN2,
        **_sizes(3584, 18944, 28, 28, 4),
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": {
        **_QWEN2,
        **_sizes(1536, 8960, 28, 12, 2),
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        **_QWEN2,
        **_sizes(896, 4864, 24, 14, 2),
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {**_QWEN3, **_sizes(4096, 12288, 36, 32, 8), "tie_word_embeddings": False},
    "qwen3-0.6b": {**_QWEN3, **_sizes(1024, 3072, 28, 16, 8), "tie_word_embeddings": True},
    # Small enough for any CPU, and wide enough that memory is what limits it: no published model.
    "llama-160m": {
        **_LLAMA,
        **_sizes(768, 2048, 12, 12, 4),
        "vocab_size": 32000,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    # Next to no model behind a vocabulary of the usual size: what is left is the server's own work.
    "tiny-32k": {
        **_LLAMA,
        **_sizes(128, 256, 2, 4, 2),
        "vocab_size": 32000,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    # For trying a benchmark out: no published model.
    "tiny": {
        **_QWEN2,
        **_sizes(64, 128, 2, 4, 2),
        "max_position_embeddings": 1024,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    },
}


def config_of(shape: str, *, layers: int = 0, context: int = 0) -> dict[str, Any]:
    """The config.json of a shape. layers: keep the first so many; context: longest in tokens; 0: published.

    Raises KeyError for an unknown shape.
    """
    config = dict(SHAPES[shape])
    if layers:
        config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
    if context:
        config["max_position_embeddings"] = min(context, config["max_position_embeddings"])
    return config


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Writes config.json, all that the engine reads of a folder with dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def write_weights(folder: Path) -> Path:
    """Writes random weights of the folder's config.json, in its dtype, as a training library would begin."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def make_folder(shape: str, folder: Path, *, layers: int = 0, context: int = 4096) -> Path:
    """Writes config.json and a byte-level tokenizer. Ids above the bytes come from no text, but have one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    config = {**config_of(shape, layers=layers, context=context), "bos_token_id": None, "eos_token_id": 0}
    write_config(folder, config)
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"Ġw{number}" for number in range(len(pieces), config["vocab_size"])]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}) + "\n"
    )
    return folder
