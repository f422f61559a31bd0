"""What a folder's JSON files say that it can do, and how it is refused where this engine cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.pooled import Pooling, varlen_batch
from penstock.engine_service.models.pooled_config import read_pooled_info

BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}
QWEN3: dict[str, Any] = {**BERT, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2}
# As the first configurations of this family are published.
NOMIC: dict[str, Any] = {
    "architectures": ["NomicBertModel"],
    "auto_map": {"AutoModel": "modeling.NomicBertModel"},
    "vocab_size": 120,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 8192,
    "max_trained_positions": 2048,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_scaling_factor": None,
    "activation_function": "swiglu",
    "layer_norm_epsilon": 1e-12,
    "qkv_proj_bias": False,
}
MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "config.json", BERT)
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def test_an_encoder_alone_embeds_by_the_mean(folder: Path) -> None:
    info = read_pooled_info(folder)
    assert info is not None
    assert (info.tasks, info.pooling, info.normalize) == (("embed",), Pooling.MEAN, False)
    assert (info.dimensions, info.hidden_size, info.max_input_tokens) == (32, 32, 80)
    assert (info.vocab_size, info.type_vocab_size, info.labels) == (120, 2, ())


def test_roberta_has_no_rows_of_padding_for_tokens(folder: Path) -> None:
    write(folder, "config.json", {**BERT, "architectures": ["XLMRobertaModel"], "pad_token_id": 1})
    info = read_pooled_info(folder)
    assert info is not None
    assert info.max_input_tokens == 78


def test_the_longest_input_is_what_the_modules_or_the_tokenizer_say(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"model_max_length": 60})
    assert getattr(read_pooled_info(folder), "max_input_tokens", 0) == 60
    write(folder, "sentence_bert_config.json", {"max_seq_length": 50})
    assert getattr(read_pooled_info(folder), "max_input_tokens", 0) == 50
    write(folder, "tokenizer_config.json", {"model_max_length": 1e30})
    write(folder, "sentence_bert_config.json", {"max_seq_length": None})
    assert getattr(read_pooled_info(folder), "max_input_tokens", 0) == 80


def test_prompts_and_sizes_are_read(folder: Path) -> None:
    prompts = {"query": "query: ", "passage": None}
    write(folder, "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "query"})
    write(folder, "config.json", {**BERT, "matryoshka_dimensions": [8, 16]})
    info = read_pooled_info(folder)
    assert info is not None
    assert (dict(info.prompts), info.default_prompt_name) == ({"query": "query: ", "passage": ""}, "query")
    assert info.matryoshka == (8, 16, 32)
    write(folder, "config.json", {**BERT, "is_matryoshka": True})
    assert getattr(read_pooled_info(folder), "matryoshka", None) == ()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pooling_mode": "cls"}, Pooling.CLS),
        ({"pooling_mode": ["lasttoken"]}, Pooling.LAST),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling.CLS),
        ({"word_embedding_dimension": 32}, Pooling.MEAN),
        ({"pooling_mode": "max"}, "pooling mode max is not supported; supported: cls, mean, lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, "is not supported"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"include_prompt": False}, "include_prompt"),
    ],
)
def test_pooling(folder: Path, settings: dict[str, Any], wanted: Pooling | str) -> None:
    write(folder, "modules.json", MODULES)
    write(folder, "1_Pooling/config.json", settings)
    if isinstance(wanted, Pooling):
        assert getattr(read_pooled_info(folder), "pooling", None) is wanted
    else:
        with pytest.raises(ModelError, match=wanted):
            read_pooled_info(folder)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ({"path": "2", "type": "custom_code.Thing"}, "code in the folder is never run"),
        ({"path": "2", "type": "sentence_transformers.models.CNN"}, "module CNN at place 2 is not supported"),
        ({"path": "../../2", "type": "sentence_transformers.models.Dense"}, "a folder under the model's"),
        ({"path": "2", "type": "sentence_transformers.models.Dense"}, "2/config.json: not found"),
    ],
)
def test_modules_that_are_refused(folder: Path, module: dict[str, Any], wanted: str) -> None:
    write(folder, "modules.json", [*MODULES, module])
    write(folder, "1_Pooling/config.json", {})
    with pytest.raises(ModelError, match=wanted):
        read_pooled_info(folder)


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"id2label": {"0": "cat", "1": "dog"}}, ("cat", "dog")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({}, ("LABEL_0", "LABEL_1")),
        ({"id2label": {"0": "one"}}, ("one",)),
    ],
)
def test_labels(folder: Path, members: dict[str, Any], wanted: tuple[str, ...]) -> None:
    write(folder, "config.json", {**BERT, "architectures": ["BertForSequenceClassification"], **members})
    info = read_pooled_info(folder)
    assert info is not None
    assert info.labels == wanted
    assert info.tasks == (("score", "classify") if len(wanted) == 1 else ("classify",))


def test_a_decoder_generates_unless_told_or_its_modules_say_otherwise(folder: Path) -> None:
    write(folder, "config.json", QWEN3)
    assert read_pooled_info(folder) is None
    assert read_pooled_info(folder, "score") is None
    told = read_pooled_info(folder, "embed")
    assert told is not None
    assert (told.tasks, told.pooling, told.normalize) == (("embed",), Pooling.LAST, True)
    write(folder, "modules.json", MODULES)
    write(folder, "1_Pooling/config.json", {"pooling_mode": "mean"})
    found = read_pooled_info(folder)
    assert found is not None
    assert (found.pooling, found.normalize) == (Pooling.MEAN, False)
    assert read_pooled_info(folder, "generate") is None
    with pytest.raises(ModelError, match="has no classifier"):
        read_pooled_info(folder, "classify")


def test_a_wrong_task_is_told_what_the_model_can_do(folder: Path) -> None:
    with pytest.raises(ModelError, match="task 'classify' does not suit BertModel, which can embed"):
        read_pooled_info(folder, "classify")
    with pytest.raises(ModelError, match="task must be one of auto"):
        read_pooled_info(folder, "sing")


def test_nomics_first_configuration(folder: Path) -> None:
    write(folder, "config.json", NOMIC)
    info = read_pooled_info(folder)
    assert info is not None
    assert (info.hidden_size, info.max_input_tokens) == (32, 8192)
    write(folder, "config.json", {**NOMIC, "rotary_scaling_factor": 2})
    assert getattr(read_pooled_info(folder), "max_input_tokens", 0) == 2048


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder is not supported in an encoder"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"num_attention_heads": 5}, "5 attention heads must divide the hidden size 32"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "never run"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"matryoshka_dimensions": [64]}, "sizes of at most 32"),
    ],
)
def test_configurations_that_are_refused(folder: Path, members: dict[str, Any], wanted: str) -> None:
    write(folder, "config.json", {**BERT, **members})
    with pytest.raises(ModelError, match=wanted):
        read_pooled_info(folder)


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression"}, "identity"),
        ({}, "softmax"),
        ({"id2label": {"0": "x"}}, "sigmoid"),
    ],
)
def test_what_becomes_of_logits(folder: Path, members: dict[str, Any], wanted: str) -> None:
    from penstock.engine_service.models.classifier_config import read_classifier
    from penstock.engine_service.models.fields import Fields

    assert read_classifier("bert", Fields(members, "config.json")).final == wanted
    with pytest.raises(ModelError, match=r"activation function 'evil\.Thing'"):
        read_classifier("bert", Fields({"sbert_ce_default_activation_function": "evil.Thing"}, ""))


def test_a_batch_is_laid_end_to_end() -> None:
    batch = varlen_batch([[5, 6, 7], [8]], [None, [1]])
    assert batch.token_ids.tolist() == [5, 6, 7, 8]
    assert batch.token_type_ids.tolist() == [0, 0, 0, 1]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.starts.tolist() == [0, 3, 4]
    assert (batch.max_length, batch.lengths) == (3, (3, 1))
    with pytest.raises(ValueError, match="no tokens"):
        varlen_batch([[5], []])
    with pytest.raises(ValueError, match="2 token types for 1"):
        varlen_batch([[5]], [[0, 0]])
