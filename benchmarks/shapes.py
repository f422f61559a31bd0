"""Model folders without weights: real shapes for `--load-format dummy`, with a tokenizer that knows every id.

python benchmarks/shapes.py qwen2.5-0.5b OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    # The published shape of Qwen2.5-0.5B; the context is cut to what benchmarks need.
    "qwen2.5-0.5b": {
        **_QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "vocab_size": 151936,
    },
    # For trying a benchmark out.
    "tiny": {
        **_QWEN,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "vocab_size": 1024,
    },
}


def make_folder(shape: str, folder: Path) -> Path:
    """Writes config.json and a byte-level tokenizer. Ids above the bytes come from no text, but have one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    config = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
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


if __name__ == "__main__":
    print(make_folder(sys.argv[1], Path(sys.argv[2])))
