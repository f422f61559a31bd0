"""What encoder families call their tensors. Knows no shapes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncoderNames:
    """Names under the encoder's prefix, without `.weight`; of a layer, under the layer's."""

    prefix: str  # of the whole encoder, where there is a head beside it
    word: str
    embedding_norm: str
    layer: str  # with {} for its number
    qkv: tuple[str, ...]  # three projections, or one that holds all
    output: str
    attention_norm: str
    up: tuple[str, ...]  # gated: the gate first, or one that holds both, the gate first
    down: str
    mlp_norm: str
    position: str = ""
    types: str = ""
    final_norm: str = ""
    relative_bias: str = ""
    # Tensors that vectors have no use for, as the checkpoint names them in full or under the prefix.
    unused: tuple[str, ...] = ("embeddings.position_ids", "embeddings.token_type_ids")


_BERT_MLM = (
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.predictions.transform.LayerNorm.gamma",
    "cls.predictions.transform.LayerNorm.beta",
    "cls.predictions.transform.layer_norm.weight",
    "cls.predictions.transform.layer_norm.bias",
)
_ROBERTA_MLM = (
    "lm_head.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "lm_head.dense.weight",
    "lm_head.dense.bias",
    "lm_head.layer_norm.weight",
    "lm_head.layer_norm.bias",
)
_DISTILBERT_MLM = (
    "vocab_transform.weight",
    "vocab_transform.bias",
    "vocab_layer_norm.weight",
    "vocab_layer_norm.bias",
    "vocab_projector.weight",
    "vocab_projector.bias",
)
_MODERNBERT_MLM = ("head.dense.weight", "head.dense.bias", "head.norm.weight", "head.norm.bias",
                   "decoder.weight", "decoder.bias")  # fmt: skip
# Heads of language modelling by family.
MLM_HEADS: dict[str, tuple[str, ...]] = {
    "bert": _BERT_MLM,
    "roberta": _ROBERTA_MLM,
    "xlm-roberta": _ROBERTA_MLM,
    "mpnet": _ROBERTA_MLM,
    "distilbert": _DISTILBERT_MLM,
    "nomic_bert": _BERT_MLM,
    "modernbert": _MODERNBERT_MLM,
}


def _bert(prefix: str, qkv: tuple[str, ...], output: str, norm: str, relative: str = "") -> EncoderNames:
    return EncoderNames(
        prefix=prefix,
        word="embeddings.word_embeddings",
        position="embeddings.position_embeddings",
        types="embeddings.token_type_embeddings",
        embedding_norm="embeddings.LayerNorm",
        layer="encoder.layer.{}",
        qkv=qkv,
        output=output,
        attention_norm=norm,
        up=("intermediate.dense",),
        down="output.dense",
        mlp_norm="output.LayerNorm",
        relative_bias=relative,
    )


_SELF = ("attention.self.query", "attention.self.key", "attention.self.value")
_SELF_NAMES = (_SELF, "attention.output.dense", "attention.output.LayerNorm")

NAMES: dict[str, EncoderNames] = {
    "bert": _bert("bert", *_SELF_NAMES),
    "roberta": _bert("roberta", *_SELF_NAMES),
    "xlm-roberta": _bert("roberta", *_SELF_NAMES),
    "mpnet": _bert(
        "mpnet",
        ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "attention.attn.o",
        "attention.LayerNorm",
        "encoder.relative_attention_bias",
    ),
    "distilbert": EncoderNames(
        prefix="distilbert",
        word="embeddings.word_embeddings",
        position="embeddings.position_embeddings",
        embedding_norm="embeddings.LayerNorm",
        layer="transformer.layer.{}",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up=("ffn.lin1",),
        down="ffn.lin2",
        mlp_norm="output_layer_norm",
    ),
    "nomic_bert": EncoderNames(
        prefix="bert",
        word="embeddings.word_embeddings",
        types="embeddings.token_type_embeddings",
        embedding_norm="emb_ln",
        layer="encoder.layers.{}",
        qkv=("attn.Wqkv",),
        output="attn.out_proj",
        attention_norm="norm1",
        up=("mlp.fc12", "mlp.fc11"),
        down="mlp.fc2",
        mlp_norm="norm2",
    ),
    "modernbert": EncoderNames(
        prefix="model",
        word="embeddings.tok_embeddings",
        embedding_norm="embeddings.norm",
        layer="layers.{}",
        qkv=("attn.Wqkv",),
        output="attn.Wo",
        attention_norm="attn_norm",
        up=("mlp.Wi",),
        down="mlp.Wo",
        mlp_norm="mlp_norm",
        final_norm="final_norm",
    ),
}
# Nomic's by the names of transformers' own model.
NOMIC_NATIVE = EncoderNames(
    prefix="nomic_bert",
    word="embeddings.word_embeddings",
    types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    layer="layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    mlp_norm="post_mlp_layernorm",
)
