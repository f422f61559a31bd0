"""The engine's configuration, and what the core is told of it. Knows no files but the model folder's name."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from penstock.engine_service.core.messages import Configure
from penstock.protos.settings import Config

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


class EngineConfig(Config):
    """One engine: a model, its limits, and where it listens."""

    model: str = Field(
        description="folder of the model (config.json and *.safetensors)",
        json_schema_extra={"positional": True, "metavar": "FOLDER"},
    )
    served_model_name: tuple[str, ...] = Field(
        (), description="id of the model, further ones are aliases; default: the folder's name"
    )
    model_root: str = Field("", description="origin of the model as shown to callers, such as a hub id")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    listen: tuple[str, ...] = Field(
        (), description='gRPC addresses such as "unix:/run/engine.sock"; replaces host and port'
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="HTTP port of /metrics; 0 is off")
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        "info", description="least severe level that is logged"
    )
    log_format: Literal["text", "json"] = Field("text", description="form of the log lines")
    drain_seconds: float = Field(
        45.0, ge=0, le=86400, description="longest wait for running requests at shutdown"
    )

    task: Literal["auto", "generate", "embed", "embedding", "score", "classify"] = Field(
        "auto",
        description="what the model is served for; auto: as its files say; embed also makes an embedder of a "
        "model that generates; embedding is the same",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of weights and KV cache"
    )
    quantization: Literal["none", "fp8", "int8"] = Field(
        "none",
        description="rounds weights at load and activations per token, for CUDA to fp8, for CPUs to int8; "
        "some quality is lost",
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = Field(
        "auto", description="type of the KV cache; auto is dtype's, fp8 halves it and loses some quality"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto reads safetensors, dummy makes random weights"
    )
    max_model_len: int = Field(
        0, ge=0, description="longest prompt and output together, in tokens; 0: model's"
    )
    max_num_seqs: int = Field(256, ge=1, le=65536, description="sequences in one step")
    max_num_batched_tokens: int = Field(2048, ge=1, le=2**20, description="tokens in one step")
    num_kv_blocks: int = Field(0, ge=0, description="blocks of the KV cache; 0: as memory allows")
    kv_cache_memory: str = Field("", description='memory of the KV cache, such as "4GiB"; empty: decide')
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of the device's memory that may be used"
    )
    enable_prefix_caching: bool = Field(True, description="reuse keys and values of equal prompt beginnings")
    speculative: Literal["none", "ngram"] = Field(
        "none", description="ngram drafts what followed the last time the text ended like this; same answers"
    )
    speculative_tokens: int = Field(
        7, ge=1, le=32, description="tokens drafted for a sequence in a step, at most"
    )
    enforce_eager: bool = Field(
        False, description="launch every kernel of a step by itself, record no CUDA graphs"
    )
    async_scheduling: bool = Field(
        True, description="on CUDA, prepare each step while the one before it runs"
    )
    threads: int = Field(0, ge=0, le=1024, description="compute threads of the CPU backend; 0: decide")
    tensor_parallel_size: int = Field(
        1, ge=1, le=1024, description="processes that hold the model together, each a part, each on a device"
    )
    nnodes: int = Field(
        1, ge=1, le=1024, description="machines of those processes", json_schema_extra={"env": ["NNODES"]}
    )
    node_rank: int = Field(
        0,
        ge=0,
        description="which of the machines this is; 0 serves, the others only compute",
        json_schema_extra={"env": ["NODE_RANK"]},
    )
    master_addr: str = Field(
        "",
        description="address of machine 0, if there are several",
        json_schema_extra={"env": ["MASTER_ADDR"]},
    )
    master_port: int = Field(
        29500,
        ge=1,
        le=65535,
        description="port on machine 0 where the others meet it",
        json_schema_extra={"env": ["MASTER_PORT"]},
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="seed of requests that bring none; unset: new at each start",
    )

    max_queued_requests: int = Field(256, ge=0, description="requests that may wait; more are refused")
    max_queued_tokens: int = Field(1_000_000, ge=0, description="prompt tokens that may wait")
    queue_timeout_seconds: float = Field(60.0, ge=0, description="longest wait in the queue; 0: no limit")
    silence_seconds: float = Field(
        120.0, gt=0, description="a core that says nothing for so long is restarted"
    )

    @field_validator("model")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("a model folder is needed")
        return value

    @field_validator("kv_cache_memory")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @model_validator(mode="after")
    def _slots_fit_the_budget(self) -> EngineConfig:
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError("max_num_seqs must not be larger than max_num_batched_tokens")
        return self

    @model_validator(mode="after")
    def _ranks_fit_the_machines(self) -> EngineConfig:
        if self.tensor_parallel_size % self.nnodes:
            raise ValueError("tensor_parallel_size must be a multiple of nnodes")
        if self.node_rank >= self.nnodes:
            raise ValueError("node_rank must be less than nnodes")
        if self.nnodes > 1 and not self.master_addr:
            raise ValueError("several machines need a master_addr")
        return self

    @property
    def model_id(self) -> str:
        return self.served_model_name[0] if self.served_model_name else Path(self.model).resolve().name

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.served_model_name[1:]

    @property
    def root(self) -> str:
        """What callers see as the origin: never a path."""
        return self.model_root or Path(self.model).resolve().name

    @property
    def addresses(self) -> tuple[str, ...]:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.listen or (f"{host}:{self.port}",)

    def configure(self) -> Configure:
        """The core's first message."""
        return Configure(
            model_path=self.model,
            dtype=self.dtype,
            device=self.device,
            load_format=self.load_format,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_kv_blocks=self.num_kv_blocks,
            kv_cache_memory_bytes=parse_size(self.kv_cache_memory),
            gpu_memory_utilization=self.gpu_memory_utilization,
            enable_prefix_caching=self.enable_prefix_caching,
            speculative="" if self.speculative == "none" else self.speculative,
            speculative_tokens=self.speculative_tokens,
            enforce_eager=self.enforce_eager,
            lookahead=self.async_scheduling,
            task="embed" if self.task == "embedding" else self.task,
            threads=self.threads,
            quantization="" if self.quantization == "none" else self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            tensor_parallel_size=self.tensor_parallel_size,
            nnodes=self.nnodes,
            master_addr=self.master_addr,
            master_port=self.master_port,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )


def parse_size(text: str) -> int:
    """Bytes of "4GiB", "512 MB" or "1000000"; 0 for an empty text. Raises ValueError."""
    if not text.strip():
        return 0
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError('a size is a number and a unit, such as "4GiB" or "512MB"')
    return int(float(match[1]) * _UNITS[match[2].lower()])
