"""Makes tiny random model folders of every served family, with a byte-level tokenizer and a chat template.

Biases and norms are random too, so that a model which ignores one gives other tokens. Needs transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EOS_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", EOS_TOKEN)
VOCAB_SIZE = 272  # 256 bytes, the special tokens, and ids that no text gives
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "pad_token_id": 256,
    "eos_token_id": 258,
}
_GATED: dict[str, Any] = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

# family -> (transformers' model class, configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_GATED, "num_key_value_heads": 4}),
    "llama3": (
        "Llama",
        {**_GATED, "rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True, "head_dim": 20},
    ),
    "llama-linear": (
        "Llama",
        {**_GATED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-dynamic": (
        "Llama",
        {
            **_GATED,
            "max_position_embeddings": 48,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "llama-yarn": ("Llama", {**_GATED, "rope_parameters": _YARN_ROPE}),
    "mistral": ("Mistral", {**_GATED, "sliding_window": 11}),
    "qwen2": ("Qwen2", {**_GATED, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {**_GATED, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_GATED, "head_dim": 32, "tie_word_embeddings": True}),
    "opt": ("OPT", {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-350m": ("OPT", {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}


def make_checkpoint(
    folder: Path, family: str, *, sharded: bool = False, dtype: str = "float32", **overrides: Any
) -> Path:
    """Writes config, safetensors, tokenizer and generation config; `overrides` are members of the config."""
    import torch
    import transformers

    name, config_values = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**config_values, **overrides})
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name and parameter_name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258, "pad_token_id": 256}))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: ids in the order of the byte alphabet, then the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": EOS_TOKEN,
                "pad_token": SPECIAL_TOKENS[0],
                "model_max_length": 256,
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
