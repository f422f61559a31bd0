"""From a Configure message to a running engine: what Ready says, how many blocks there are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plans import plan_rows

from penstock.engine_service.core.build import build
from penstock.engine_service.core.memory import num_blocks
from penstock.engine_service.core.messages import AddRequest, Configure, Sampling
from penstock.engine_service.core.request import Request
from penstock.engine_service.core.slots import SlotTable
from penstock.engine_service.models.errors import ModelError


def ignore(done: int, total: int) -> None:
    return


def test_ready_tells_what_was_loaded(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("qwen2", dtype="bfloat16"), tmp_path / "model"))
    own = {"eos_token_id": [258, 256], "temperature": 0.7, "top_k": 20, "max_new_tokens": 99}
    (folder / "generation_config.json").write_text(json.dumps(own))
    built = build(Configure(str(folder), max_model_len=100, num_kv_blocks=50, device="cpu"), ignore)
    ready = built.ready
    assert ready.architectures == ["Qwen2ForCausalLM"]
    assert (ready.max_model_len, ready.vocab_size) == (100, 272) == (built.max_model_len, built.vocab_size)
    assert ready.eos_token_ids == [258, 256]
    assert (ready.bos_token_id, ready.pad_token_id) == (None, 256)
    assert ready.generation_defaults == Sampling(temperature=0.7, top_k=20)
    assert ready.default_max_new_tokens == 99
    assert (ready.dtype, ready.device) == ("bfloat16", "cpu")
    assert (ready.kv_block_size, ready.kv_blocks) == (16, 50) == (built.block_size, built.num_blocks)
    assert ready.tasks == ["generate"]
    assert "prefix_caching" in ready.capabilities


def test_prefix_caching_switched_off_is_no_capability(tiny_checkpoint: Callable[..., Path]) -> None:
    configure = Configure(str(tiny_checkpoint("llama")), enable_prefix_caching=False, num_kv_blocks=20)
    assert "prefix_caching" not in build(configure, ignore).ready.capabilities


@pytest.mark.parametrize(
    "options", [{}, {"load_format": "dummy"}, {"dtype": "bfloat16"}, {"dtype": "float16"}]
)
def test_what_is_built_generates(tiny_checkpoint: Callable[..., Path], options: dict[str, Any]) -> None:
    built = build(Configure(str(tiny_checkpoint("llama3")), num_kv_blocks=20, **options), ignore)
    sequence = Request.create(AddRequest(1, [1, 2, 3], Sampling(temperature=0.0))).sequences[0]
    table = SlotTable(2, 20, built.block_size)
    table.take(0, sequence)
    table.append_blocks(0, [7])
    result = built.runner.start(plan_rows(table, [(sequence, 3)])).wait()
    assert not result.errors
    assert result.num_tokens.tolist() == [1]
    assert 0 <= result.tokens[0, 0] < built.vocab_size
    built.runner.forget(sequence)


def test_dummy_weights_need_only_the_configuration(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copy(tiny_checkpoint("qwen3") / "config.json", tmp_path)
    seen: list[tuple[int, int]] = []
    configure = Configure(str(tmp_path), load_format="dummy", num_kv_blocks=20)
    build(configure, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] > 0


class TestNumBlocks:
    def count(self, **changes: int) -> int:
        sizes = {
            "block_bytes": 1000,
            "block_size": 16,
            "max_model_len": 100,
            "max_num_seqs": 4,
            "available_bytes": 1_000_000,
            "default_bytes": 20_000,
        }
        return num_blocks(**{**sizes, **changes})

    def test_the_default_budget(self) -> None:
        assert self.count() == 20

    def test_never_more_than_all_sequences_could_fill(self) -> None:
        assert self.count(default_bytes=900_000) == 7 * 4
        assert self.count(asked_bytes=900_000) == 7 * 4

    def test_what_was_asked_for(self) -> None:
        assert self.count(asked_bytes=15_999) == 15
        assert self.count(asked_blocks=300) == 300

    def test_one_whole_sequence_must_fit(self) -> None:
        assert self.count(asked_blocks=7) == 7
        with pytest.raises(ModelError, match=r"room for 96 tokens, .* of 100: raise --num-kv-blocks"):
            self.count(asked_blocks=6)
        with pytest.raises(ModelError, match="raise --kv-cache-memory or lower --max-model-len"):
            self.count(default_bytes=6_999)

    def test_memory_that_is_not_there(self) -> None:
        with pytest.raises(
            ModelError, match="of 300000 bytes does not fit the 200000 free bytes: lower --num"
        ):
            self.count(asked_blocks=300, available_bytes=200_000)
