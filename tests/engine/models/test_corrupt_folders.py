"""Every way a model folder can be broken has its one-line answer, naming file, tensor, expected and found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine_service.core.build import build
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.models.errors import ModelError

INDEX = "model.safetensors.index.json"
ARCHITECTURES = (
    "OPTForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM; to embed or "
    "classify Bert, Roberta, XLMRoberta, Camembert, DistilBert, MPNet, ModernBert, NomicBert, Llama, "
    "Mistral, Qwen2, Qwen3 with Model or ForSequenceClassification"
)


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "the-model"))


@pytest.fixture
def sharded(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama", sharded=True), tmp_path / "in-shards"))


def fails(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ModelError) as caught:
        build(Configure(str(folder), num_kv_blocks=64, **options), lambda done, total: None)
    assert str(caught.value) == message
    assert str(folder.parent) not in message
    assert "\n" not in message


def edit(path: Path, **members: Any) -> None:
    """Sets members of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **members}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_the_copies_are_sound(folder: Path, sharded: Path) -> None:
    for path in (folder, sharded):
        assert build(Configure(str(path), num_kv_blocks=64), lambda done, total: None).num_blocks == 64


class TestConfig:
    def test_no_folder(self, tmp_path: Path) -> None:
        fails(tmp_path / "nothing-here", "model folder 'nothing-here' does not exist")

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        fails(folder, "config.json: not found in the model folder")

    def test_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"architectures": [}')
        fails(folder, "config.json: not valid JSON (line 1, column 20)")

    def test_not_text(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(b'{"a": "\xff"}')
        fails(folder, "config.json: not valid JSON")

    def test_endless_nesting(self, folder: Path) -> None:
        (folder / "config.json").write_text("[" * 200_000)
        fails(folder, "config.json: not valid JSON")

    def test_not_an_object(self, folder: Path) -> None:
        (folder / "config.json").write_text("[1]")
        fails(folder, "config.json: must be a JSON object")

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            (
                {"architectures": ["MambaForCausalLM"]},
                f"architecture 'MambaForCausalLM' is not supported; supported: {ARCHITECTURES}",
            ),
            ({"architectures": None}, "architectures must be a list of names, found None"),
            (
                {"auto_map": {"AutoModel": "modeling.Mine"}},
                "auto_map asks for code from the model folder, which is never run",
            ),
            (
                {"quantization_config": {"quant_method": "awq"}},
                "quantization_config is not supported; use unquantized weights",
            ),
            ({"hidden_size": None}, "hidden_size is missing"),
            ({"hidden_size": "64"}, "hidden_size must be an integer of at least 1, found '64'"),
            ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, found 0"),
            (
                {"num_attention_heads": True},
                "num_attention_heads must be an integer of at least 1, found True",
            ),
            (
                {"num_key_value_heads": 3},
                "num_key_value_heads must be a divisor of num_attention_heads (4), found 3",
            ),
            ({"head_dim": 15}, "head_dim must be even for rotary embedding, found 15"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu, swish"),
            ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0, found -1"),
            ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, found 'no'"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
            ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, found 'int8'"),
            ({"rope_parameters": 7}, "rope_parameters must be an object, found 7"),
        ],
    )
    def test_a_wrong_member(self, folder: Path, members: dict[str, Any], message: str) -> None:
        edit(folder / "config.json", **members)
        fails(folder, f"config.json: {message}")

    def test_an_unknown_rope_type_in_either_form(self, folder: Path) -> None:
        kinds = "supported: default, linear, dynamic, llama3, yarn"
        edit(folder / "config.json", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})
        fails(folder, f"config.json: rope_parameters: rope_type 'longrope' is not supported; {kinds}")
        edit(folder / "config.json", rope_parameters=None, rope_scaling={"type": "su", "factor": 2.0})
        fails(folder, f"config.json: rope_scaling: type 'su' is not supported; {kinds}")

    def test_scaling_without_its_factor(self, folder: Path) -> None:
        edit(folder / "config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4})
        fails(folder, "config.json: rope_parameters: factor is missing")

    def test_layer_types_of_another_number(
        self, tiny_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(tiny_checkpoint("qwen2-window"), tmp_path / "the-model"))
        edit(folder / "config.json", layer_types=["full_attention"])
        fails(
            folder,
            "config.json: layer_types must be 2 of full_attention and sliding_attention, "
            "found ['full_attention']",
        )

    def test_generation_config(self, folder: Path) -> None:
        edit(folder / "generation_config.json", temperature="hot")
        fails(folder, "generation_config.json: temperature must be a number from 0 to 100, found 'hot'")
        edit(folder / "generation_config.json", temperature=None, eos_token_id="</s>")
        fails(
            folder, "generation_config.json: eos_token_id must be a token id or a list of them, found '</s>'"
        )


class TestOptions:
    def test_longer_than_the_model(self, folder: Path) -> None:
        fails(folder, "--max-model-len 257 is more than the 256 tokens the model supports", max_model_len=257)

    def test_unknown_names(self, folder: Path) -> None:
        fails(
            folder,
            "dtype 'int4' is not supported; supported: auto, float32, bfloat16, float16",
            dtype="int4",
        )
        fails(folder, "load format 'pt' is not supported; supported: auto, dummy", load_format="pt")
        fails(folder, "device 'tpu' is not supported; supported: auto, cpu, cuda", device="tpu")

    def test_too_little_cache_for_one_sequence(self, folder: Path) -> None:
        start = "the KV cache has room for {} tokens, less than one sequence of 256: "
        for options, room, advice in (
            ({"num_kv_blocks": 15}, 240, "raise --num-kv-blocks or lower --max-model-len"),
            ({"kv_cache_memory_bytes": 100_000}, 96, "raise --kv-cache-memory or lower --max-model-len"),
        ):
            with pytest.raises(ModelError) as caught:
                build(Configure(str(folder), **options), lambda done, total: None)
            assert str(caught.value) == start.format(room) + advice


class TestSingleFile:
    def test_absent(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        fails(folder, "model.safetensors: not found in the model folder")

    def test_only_pickles(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        fails(
            folder,
            "model.safetensors: not found; 'pytorch_model.bin' is pickled and never loaded, "
            "convert it to safetensors",
        )

    def test_missing_tensor(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
        fails(
            folder,
            "model.safetensors: tensor 'model.layers.1.self_attn.k_proj.weight' is missing, "
            "expected shape [64, 64]",
        )

    def test_left_over_tensors(self, folder: Path) -> None:
        edit(folder / "config.json", num_hidden_layers=1)
        fails(
            folder,
            "model.safetensors: tensor 'model.layers.1.input_layernorm.weight' (and 8 more) "
            "belongs to no part of the model",
        )

    def test_wrong_shape(self, folder: Path) -> None:
        edit(folder / "config.json", vocab_size=300)
        fails(
            folder,
            "model.safetensors: tensor 'model.embed_tokens.weight' has shape [272, 64], expected [300, 64]",
        )

    def test_a_dtype_that_is_no_float(self, folder: Path) -> None:
        rewrite(
            folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})
        )
        fails(
            folder,
            "model.safetensors: tensor 'model.norm.weight' has dtype I8, expected one of F32, F16, BF16, F64",
        )

    def test_empty(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"")
        fails(folder, "model.safetensors: 0 bytes is too short for a safetensors file")

    def test_no_tensors(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        fails(folder, "model.safetensors: holds no tensors")

    def test_header_longer_than_the_file(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
        fails(folder, f"model.safetensors: header of {1 << 62} bytes does not fit a file of 10 bytes")

    def test_header_not_json(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"\xff{}}")
        fails(folder, "model.safetensors: header is not valid JSON")

    def test_cut_off(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        payload = len(data) - 8 - int.from_bytes(data[:8], "little")
        path.write_bytes(data[:-1])
        last = "model.norm.weight"
        fails(
            folder,
            f"model.safetensors: tensor '{last}' ends at byte {payload}, but the file has {payload - 1} "
            "(is it truncated?)",
        )

    def test_bytes_nobody_claims(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        payload = len(data) - 8 - int.from_bytes(data[:8], "little")
        path.write_bytes(data + b"\0")
        fails(
            folder,
            f"model.safetensors: tensors take {payload} bytes, but the file has {payload + 1} for them",
        )

    def test_offsets_that_do_not_match_the_shape(self, folder: Path) -> None:
        set_header(folder, lambda header: header["model.norm.weight"].update(shape=[63]))
        fails(folder, "model.safetensors: tensor 'model.norm.weight' takes 256 bytes, expected 252")

    @pytest.mark.parametrize("entry", [7, {}, {"dtype": "F32", "shape": [1], "data_offsets": [0]}])
    def test_malformed_entry(self, folder: Path, entry: Any) -> None:
        set_header(folder, lambda header: header.update({"model.norm.weight": entry}))
        fails(folder, "model.safetensors: tensor 'model.norm.weight' has a malformed header entry")

    def test_a_huge_shape_allocates_nothing(self, folder: Path) -> None:
        set_header(folder, lambda header: header["model.norm.weight"].update(shape=[1 << 40, 1 << 20]))
        fails(folder, f"model.safetensors: tensor 'model.norm.weight' takes 256 bytes, expected {1 << 62}")

    def test_two_tensors_over_the_same_bytes(self, folder: Path) -> None:
        def overlap(header: dict[str, Any]) -> None:
            header["model.layers.1.input_layernorm.weight"] = header["model.layers.0.input_layernorm.weight"]

        set_header(folder, overlap)
        fails(
            folder, "model.safetensors: tensor 'model.layers.1.input_layernorm.weight' overlaps another one"
        )


class TestShards:
    def first(self, folder: Path) -> tuple[str, str]:
        placed = json.loads((folder / INDEX).read_text())["weight_map"]
        return next(iter(placed.items()))

    def test_a_file_that_is_not_there(self, sharded: Path) -> None:
        tensor, file = self.first(sharded)
        (sharded / file).unlink()
        fails(sharded, f"{file}: not found in the model folder, but {INDEX} names it for tensor '{tensor}'")

    def test_a_tensor_that_is_not_in_its_file(self, sharded: Path) -> None:
        placed = json.loads((sharded / INDEX).read_text())["weight_map"]
        tensor, file = self.first(sharded)
        other = next(name for name in placed.values() if name != file)
        edit(sharded / INDEX, weight_map={**placed, tensor: other})
        fails(sharded, f"{other}: tensor '{tensor}' is missing, but {INDEX} names it")

    def test_a_tensor_that_the_index_lacks(self, sharded: Path) -> None:
        placed = json.loads((sharded / INDEX).read_text())["weight_map"]
        del placed["model.norm.weight"]
        edit(sharded / INDEX, weight_map=placed)
        fails(sharded, f"{INDEX}: tensor 'model.norm.weight' is missing, expected shape [64]")

    @pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", 7, "model.bin"])
    def test_a_file_elsewhere(self, sharded: Path, file: object) -> None:
        placed = json.loads((sharded / INDEX).read_text())["weight_map"]
        edit(sharded / INDEX, weight_map={**placed, "model.norm.weight": file})
        fails(
            sharded,
            f"{INDEX}: tensor 'model.norm.weight' must lie in a .safetensors file, found {str(file)!r}",
        )

    def test_no_map(self, sharded: Path) -> None:
        edit(sharded / INDEX, weight_map=None)
        fails(sharded, f"{INDEX}: weight_map must be an object from tensor to file name")

    def test_not_json(self, sharded: Path) -> None:
        (sharded / INDEX).write_text("{")
        fails(sharded, f"{INDEX}: not valid JSON (line 1, column 2)")
