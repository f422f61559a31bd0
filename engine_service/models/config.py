"""Reads config.json into one ModelSpec; what a family does differently is a flag there. Knows no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.engine_service.models.architectures import described
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.fields import Fields, read_json
from penstock.engine_service.models.rope import RopeSpec, longest_context, read_rope

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's shape and habits. Lengths in tokens, sizes in elements."""

    architecture: str
    dtype: torch.dtype | None  # the checkpoint's, None: not written down
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int  # longest context, rotary scaling included
    norm_eps: float
    activation: str
    windows: tuple[int | None, ...]  # a layer's sliding window, its own token included
    tie_embeddings: bool
    rope: RopeSpec | None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    # OPT only
    embedding_size: int = 0
    norm_before: bool = True
    final_norm: bool = True
    norm_affine: bool = True


def read_spec(folder: Path) -> ModelSpec:
    """Raises ModelError for a folder or configuration this engine cannot serve."""
    if not folder.is_dir():
        raise ModelError(f"model folder '{folder.name}' does not exist")
    config = Fields(read_json(folder, "config.json"), "config.json")
    if "auto_map" in config:
        raise ModelError("config.json: auto_map asks for code from the model folder, which is never run")
    architecture = _architecture(config)
    if "quantization_config" in config:
        raise ModelError("config.json: quantization_config is not supported; use unquantized weights")
    return _READERS[architecture](architecture, config)


def _architecture(config: Fields) -> str:
    names = config.raw("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise config.wrong("architectures", "a list of names")
    if names[0] not in _READERS:
        known = f"{', '.join(_READERS)}; {described()}"
        raise ModelError(f"config.json: architecture '{names[0][:60]}' is not supported; supported: {known}")
    return names[0]


def read_dtype(config: Fields) -> torch.dtype | None:
    """The checkpoint's dtype as written down; None where it is not."""
    name = "dtype" if "dtype" in config else "torch_dtype"
    value = config.raw(name)
    if value is None or value == "auto":
        return None
    dtype = DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None:
        raise config.wrong(name, f"one of {', '.join(DTYPES)}")
    return dtype


def _heads(config: Fields, default_head_dim: int | None) -> tuple[int, int, int]:
    """(query heads, key/value heads, elements of a head)."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    hidden = config.integer("hidden_size")
    if "head_dim" not in config and default_head_dim is None and hidden % heads:
        raise config.wrong("num_attention_heads", f"a divisor of hidden_size ({hidden})")
    return heads, kv_heads, config.integer("head_dim", default_head_dim or hidden // heads)


def _windows(config: Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    full: tuple[int | None, ...] = (None,) * num_layers
    if architecture == "LlamaForCausalLM" or config.is_null("sliding_window"):
        return full
    if architecture != "MistralForCausalLM" and not config.flag("use_sliding_window", False):
        return full
    window = config.integer("sliding_window", 4096)
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    kinds = config.raw("layer_types")
    if kinds is None:
        first = config.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    named = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in named for kind in kinds):
        raise config.wrong("layer_types", f"{num_layers} of full_attention and sliding_attention")
    return tuple(named[kind] for kind in kinds)


def read_decoder(architecture: str, config: Fields) -> ModelSpec:
    """Llama, Mistral, Qwen2 and Qwen3; the defaults are those of the family's published configuration.
    Raises ModelError."""
    qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
    heads, kv_heads, head_dim = _heads(config, 128 if qwen3 else None)
    num_layers = config.integer("num_hidden_layers")
    max_position = config.integer("max_position_embeddings", None if qwen2 or qwen3 else 2048)
    rope = read_rope(config, head_dim, max_position)
    bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and config.flag("attention_bias", False)
    return ModelSpec(
        architecture=architecture,
        dtype=read_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        max_position=longest_context(rope, max_position),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=config.choice("hidden_act", ("silu", "swish"), "silu"),
        windows=_windows(config, architecture, num_layers),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        rope=rope,
        qkv_bias=qwen2 or bias,
        output_bias=bias,
        mlp_bias=architecture == "LlamaForCausalLM" and config.flag("mlp_bias", False),
        qk_norm=qwen3,
    )


def _read_opt(architecture: str, config: Fields) -> ModelSpec:
    heads, kv_heads, head_dim = _heads(config, None)
    hidden = config.integer("hidden_size")
    bias = config.flag("enable_bias", True)
    before = config.flag("do_layer_norm_before", True)
    return ModelSpec(
        architecture=architecture,
        dtype=read_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("ffn_dim"),
        max_position=config.integer("max_position_embeddings"),
        norm_eps=1e-5,
        activation=config.choice("activation_function", ("relu", "gelu", "gelu_new"), "relu"),
        windows=(None,) * config.integer("num_hidden_layers"),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        rope=None,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        embedding_size=config.integer("word_embed_proj_dim", hidden),
        norm_before=before,
        final_norm=before and not config.flag("_remove_final_layer_norm", False),
        norm_affine=config.flag("layer_norm_elementwise_affine", True),
    )


_READERS: dict[str, Callable[[str, Fields], ModelSpec]] = {
    "OPTForCausalLM": _read_opt,
    "LlamaForCausalLM": read_decoder,
    "MistralForCausalLM": read_decoder,
    "Qwen2ForCausalLM": read_decoder,
    "Qwen3ForCausalLM": read_decoder,
}
