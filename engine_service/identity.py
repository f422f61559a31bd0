"""What this engine says about itself in GetInfo. Knows no requests."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from penstock.engine_service import batch_validation, validation
from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core.messages import PooledFacts, Ready, Sampling
from penstock.protos import engine_pb2 as pb

API_VERSION = "penstock.v1"


@dataclass(frozen=True, slots=True)
class Identity:
    """Fixed for the life of the process."""

    model: str
    aliases: tuple[str, ...]
    root: str
    tokenizer_fingerprint: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    tensor_parallel_size: int = 1
    instance_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(cls, config: EngineConfig) -> Identity:
        return cls(
            config.model_id,
            config.aliases,
            config.root,
            fingerprint(Path(config.model)),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_queued_requests,
            config.max_queued_tokens,
            config.tensor_parallel_size,
        )

    @property
    def models(self) -> frozenset[str]:
        return frozenset((self.model, *self.aliases))

    def info(self, ready: Ready, created_unix_s: int) -> pb.EngineInfo:
        info = pb.EngineInfo(
            api_version=API_VERSION,
            engine_version=version(),
            instance_id=self.instance_id,
            model=self.model,
            aliases=self.aliases,
            architectures=ready.architectures,
            tasks=ready.tasks,
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            eos_token_ids=ready.eos_token_ids,
            bos_token_id=ready.bos_token_id,
            pad_token_id=ready.pad_token_id,
            generation_defaults=_sampling_message(ready.generation_defaults),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            capabilities=ready.capabilities,
            limits=self._limits(),
            dtype=ready.dtype,
            device=ready.device,
            tensor_parallel_size=self.tensor_parallel_size,
            kv_block_size=ready.kv_block_size,
            kv_blocks=ready.kv_blocks,
            created_unix_s=created_unix_s,
            root=self.root,
            default_max_new_tokens=ready.default_max_new_tokens,
        )
        if ready.pooled is not None:
            _describe(info, ready.pooled)
        return info

    def _limits(self) -> pb.EngineLimits:
        return pb.EngineLimits(
            max_n=validation.MAX_N,
            max_logprobs=validation.MAX_LOGPROBS,
            max_logit_bias=validation.MAX_LOGIT_BIAS,
            max_bad_words=validation.MAX_BAD_WORDS,
            max_stop_token_ids=validation.MAX_STOP_TOKEN_IDS,
            max_running=self.max_num_seqs,
            max_batched_tokens=self.max_num_batched_tokens,
            max_waiting=self.max_queued_requests,
            max_waiting_tokens=self.max_queued_tokens,
            max_batch_inputs=batch_validation.MAX_BATCH_INPUTS,
        )


def _describe(info: pb.EngineInfo, pooled: PooledFacts) -> None:
    info.pooling = batch_validation.POOLINGS[pooled.pooling]
    info.embedding_dimensions = pooled.dimensions
    info.matryoshka_dimensions.extend(pooled.matryoshka)
    info.any_dimensions = pooled.any_dimensions
    info.labels.extend(pooled.labels)
    info.max_input_tokens = info.max_model_len


def fingerprint(folder: Path) -> str:
    """SHA-256 of the folder's tokenizer.json in hex, empty when there is none."""
    try:
        return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    except OSError:
        return ""


def version() -> str:
    try:
        return metadata.version("penstock")
    except metadata.PackageNotFoundError:
        return "0"


def _sampling_message(sampling: Sampling) -> pb.SamplingParams:
    """Only what the model's configuration changes: the rest stays unset, and so at its default."""
    plain = Sampling()
    message = pb.SamplingParams()
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = getattr(sampling, name)
        if value != getattr(plain, name):
            setattr(message, name, value)
    return message
