"""Reads an encoder's config.json into one EncoderSpec; what a family does differently is a flag there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.engine_service.models.config import read_dtype
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.fields import Fields
from penstock.engine_service.models.rope import RopeSpec, read_rope

# As configurations name them -> as encoder.py knows them.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_GATES = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu"}
_NOMIC_GATES = {"swiglu": "silu", "geglu": "gelu"}


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """An encoder's shape and habits. Lengths in tokens, sizes in elements."""

    family: str
    dtype: torch.dtype | None  # the checkpoint's, None: not written down
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_tokens: int  # of one input
    norm_eps: float
    activation: str  # a value of ACTIVATIONS; gated: also "silu"
    type_vocab_size: int = 0  # 0: no table of token types
    position_offset: int | None = 0  # row of the first position in its table; None: no table
    norm_before: bool = False  # of attention and feed-forward, with one norm at the end
    norm_bias: bool = True
    gated: bool = False
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    relative_bias: bool = False
    windows: tuple[int | None, ...] = ()  # tokens a layer sees to each side; empty: all, in all layers
    ropes: tuple[RopeSpec, ...] = ()  # of each layer; empty: none

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def read_encoder(family: str, config: Fields) -> EncoderSpec:
    """Raises ModelError for a configuration this engine cannot serve."""
    for name in ("is_decoder", "add_cross_attention"):
        if config.flag(name, False):
            raise ModelError(f"{config.where}: {name} is not supported in an encoder")
    spec = _READERS[family](family, config)
    if spec.hidden_size % spec.num_heads:
        raise ModelError(
            f"{config.where}: {spec.num_heads} attention heads must divide the hidden size {spec.hidden_size}"
        )
    return spec


def _bert(family: str, config: Fields) -> EncoderSpec:
    """BERT, RoBERTa, XLM-RoBERTa and MPNet, with the defaults of their published configurations."""
    config.choice("position_embedding_type", ("absolute",), "absolute")
    offset = 0
    if family != "bert":  # the rows of padding come first
        offset = 2 if family == "mpnet" else config.integer("pad_token_id", 1, minimum=0) + 1
    if family == "mpnet" and config.integer("relative_attention_num_buckets", 32) != 32:
        raise config.wrong("relative_attention_num_buckets", "32, which its model has whatever is written")
    rows = config.integer("max_position_embeddings", 512)
    if rows <= offset:
        raise config.wrong("max_position_embeddings", f"above {offset}")
    return EncoderSpec(
        family=family,
        dtype=read_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size", 768),
        num_layers=config.integer("num_hidden_layers", 12),
        num_heads=config.integer("num_attention_heads", 12),
        intermediate_size=config.integer("intermediate_size", 3072),
        max_tokens=rows - offset,
        norm_eps=config.number("layer_norm_eps", 1e-12),
        activation=_activation(config, "hidden_act", ACTIVATIONS),
        type_vocab_size=0 if family == "mpnet" else config.integer("type_vocab_size", 2),
        position_offset=offset,
        relative_bias=family == "mpnet",
    )


def _distilbert(family: str, config: Fields) -> EncoderSpec:
    return EncoderSpec(
        family=family,
        dtype=read_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("dim", 768),
        num_layers=config.integer("n_layers", 6),
        num_heads=config.integer("n_heads", 12),
        intermediate_size=config.integer("hidden_dim", 3072),
        max_tokens=config.integer("max_position_embeddings", 512),
        norm_eps=1e-12,
        activation=_activation(config, "activation", ACTIVATIONS),
    )


def _nomic(family: str, config: Fields) -> EncoderSpec:
    """Both the members of its first configuration, which is GPT-2's, and those of BERT's."""
    for name, wanted in (("prenorm", False), ("rotary_emb_interleaved", False), ("use_rms_norm", False)):
        if config.flag(name, wanted) != wanted:
            raise config.wrong(name, "false")
    if config.number("rotary_emb_fraction", 1.0) != 1.0:
        raise config.wrong("rotary_emb_fraction", "1.0: parts of a head")
    if config.raw("rotary_emb_scale_base") is not None:
        raise config.wrong("rotary_emb_scale_base", "null")
    hidden, heads = _either(config, "hidden_size", "n_embd"), _either(config, "num_attention_heads", "n_head")
    positions = _either(config, "max_position_embeddings", "n_positions", 2048)
    if config.raw("rotary_scaling_factor") is not None:
        # Beyond the trained length the frequencies would change with the length of the batch.
        positions = min(positions, config.integer("max_trained_positions", 2048))
    layers = _either(config, "num_hidden_layers", "n_layer")
    theta = config.number("rotary_emb_base", config.number("rope_theta", 1000.0))
    given = config.raw("rope_parameters")
    rotary = Fields({"rope_theta": theta, "rope_parameters": given}, config.where)
    rope = read_rope(rotary, hidden // heads, positions)
    if "activation_function" in config:
        activation = _activation(config, "activation_function", _NOMIC_GATES)
    else:
        activation = _activation(config, "hidden_act", _GATES, "silu")
    bias = config.flag("mlp_fc1_bias", False)
    if config.flag("mlp_fc2_bias", bias) != bias:
        raise config.wrong("mlp_fc2_bias", "as mlp_fc1_bias")
    return EncoderSpec(
        family=family,
        dtype=read_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=_either(config, "intermediate_size", "n_inner"),
        max_tokens=positions,
        norm_eps=config.number("layer_norm_eps", config.number("layer_norm_epsilon", 1e-12)),
        activation=activation,
        type_vocab_size=config.integer("type_vocab_size", 2),
        position_offset=None,
        gated=True,
        qkv_bias=config.flag("qkv_proj_bias", False),
        output_bias=config.flag("qkv_proj_bias", False),
        mlp_bias=bias,
        ropes=(rope,) * layers,
    )


def _modernbert(family: str, config: Fields) -> EncoderSpec:
    layers = config.integer("num_hidden_layers", 22)
    hidden, heads = config.integer("hidden_size", 768), config.integer("num_attention_heads", 12)
    positions = config.integer("max_position_embeddings", 8192)
    sliding = _sliding_layers(config, layers)
    given = config.inner("rope_parameters")
    ropes = {}
    for kind, old, theta in (("full", "global", 160000.0), ("sliding", "local", 10000.0)):
        inner = given.inner(f"{kind}_attention") if given is not None else None
        members = {
            "rope_theta": config.number(f"{old}_rope_theta", theta),
            "rope_parameters": inner.members if inner is not None else config.raw("rope_scaling"),
        }
        ropes[kind] = read_rope(Fields(members, config.where), hidden // heads, positions)
    reach = config.integer("local_attention", 128) // 2
    return EncoderSpec(
        family=family,
        dtype=read_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=config.integer("intermediate_size", 1152),
        max_tokens=positions,
        norm_eps=config.number("norm_eps", 1e-5),
        activation=_activation(config, "hidden_activation", _GATES),
        position_offset=None,
        norm_before=True,
        norm_bias=config.flag("norm_bias", False),
        gated=True,
        qkv_bias=config.flag("attention_bias", False),
        output_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
        windows=tuple(reach if slides else None for slides in sliding),
        ropes=tuple(ropes["sliding" if slides else "full"] for slides in sliding),
    )


def _sliding_layers(config: Fields, layers: int) -> list[bool]:
    kinds = config.raw("layer_types")
    if kinds is None:
        every = config.integer("global_attn_every_n_layers", 3)
        return [bool(layer % every) for layer in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise config.wrong("layer_types", f"{layers} of full_attention and sliding_attention")
    return [kind == "sliding_attention" for kind in kinds]


def _activation(config: Fields, name: str, known: dict[str, str], default: str = "gelu") -> str:
    return known[config.choice(name, tuple(known), default)]


def _either(config: Fields, name: str, other: str, default: int | None = None) -> int:
    return config.integer(other if other in config and name not in config else name, default)


_READERS: dict[str, Callable[[str, Fields], EncoderSpec]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "mpnet": _bert,
    "distilbert": _distilbert,
    "nomic_bert": _nomic,
    "modernbert": _modernbert,
}
