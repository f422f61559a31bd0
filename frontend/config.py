"""The frontend's configuration: one frozen object, read at the top of the process only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from penstock.frontend.text.parsers import check_reasoning_parser, check_tool_parser
from penstock.protos.settings import Config

LogLevel = Literal["debug", "info", "warning", "error", "critical"]

# Sampling defaults an operator may override, with their ranges (low, high, low itself allowed).
OVERRIDABLE: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 2.0, True),
    "top_p": (0.0, 1.0, False),
    "top_k": (-1, 2**31 - 1, True),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 2.0, False),
    "max_new_tokens": (1, 2**31 - 1, True),
}
_INTEGERS = ("top_k", "max_new_tokens")


class FrontendConfig(Config):
    """Settings of one frontend process."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on, 0 for a free one")
    listen: tuple[str, ...] = Field(
        (), description="listen addresses such as unix:/run/penstock.sock; replaces host and port"
    )
    workers: int = Field(
        1, ge=1, le=256, description="processes that share the addresses, each as fast as one core"
    )
    engine: tuple[str, ...] = Field(
        (), description="an engine's gRPC target", json_schema_extra={"env": ["PENSTOCK_ENGINES"]}
    )
    tokenizer: tuple[str, ...] = Field(
        (), description="a tokenizer's gRPC target", json_schema_extra={"env": ["PENSTOCK_TOKENIZERS"]}
    )
    model_alias: tuple[str, ...] = Field(
        (),
        description="a further name of a model, as NAME=MODEL; answers name the model itself",
        json_schema_extra={"metavar": "NAME=MODEL"},
    )
    api_key: tuple[str, ...] = Field(
        (),
        description="a key callers must send; none: no key is needed",
        json_schema_extra={"env": ["VLLM_API_KEY"], "secret": True, "metavar": "KEY"},
    )
    api_key_file: str = Field("", description="file with one key a line, read again when it changes")
    root_path: str = Field("", description="path prefix that a proxy in front leaves on, such as /openai")
    cors_origins: tuple[str, ...] = Field((), description="origin that browsers may call from, * for all")
    strict: bool = Field(False, description="refuse unknown request fields instead of ignoring them")
    strict_length: bool = Field(
        False, description="refuse prompt + max_tokens beyond the context instead of clamping"
    )
    vllm_metrics: bool = Field(False, description="show every metric under its vllm: name too")
    metrics_source: tuple[str, ...] = Field(
        (), description="host:port of an engine's metrics to show on /metrics too (one machine only)"
    )
    override_generation_config: str = Field(
        "", description="JSON object of sampling defaults that win over the model's own"
    )
    tool_call_parser: str = Field(
        "auto", description="how tool calls are read: auto by the model's template, none, or a format's name"
    )
    reasoning_parser: str = Field(
        "auto",
        description="how reasoning is set apart: auto by the model's template, none, a format's name, or "
        "tags:OPENING,CLOSING",
    )
    score_format: Literal["list", "float"] = Field(
        "list", description="how /v1/score gives a score: in an array, or bare"
    )
    score_template: tuple[str, ...] = Field(
        (),
        description="what a generating model is asked to rerank: qwen3-reranker or a YAML file, MODEL= in "
        "front for one model",
        json_schema_extra={"metavar": "[MODEL=]NAME-OR-FILE"},
    )
    moderation_map: str = Field(
        "", description="file that maps a classifier's labels to the categories of /v1/moderations"
    )
    decode_openai_tokens: str = Field(
        "",
        description="read token arrays at /v1/embeddings as OpenAI's: cl100k_base (of an installed package) "
        "or a .tiktoken file",
    )
    log_level: LogLevel = Field("info", description="level of this service's log")
    log_format: Literal["text", "json"] = Field("text", description="log line format")
    uvicorn_log_level: LogLevel = Field("info", description="level of the HTTP server's and access log")
    drain_seconds: float = Field(45.0, ge=0, description="time that running requests get at shutdown")
    silence_seconds: float = Field(120.0, gt=0, description="longest silence of an engine that has work")
    sse_keepalive_seconds: float = Field(
        15.0, gt=0, description="silence before a comment keeps a stream open"
    )
    stream_stall_seconds: float = Field(60.0, gt=0, description="longest time a reader may not read")
    stream_buffer_bytes: int = Field(1 << 20, ge=4096, description="unsent bytes held for a slow reader")
    keep_alive_seconds: float = Field(75.0, gt=0, description="life of an idle connection")
    header_seconds: float = Field(10.0, gt=0, description="time for a request's headers to arrive")
    body_seconds: float = Field(60.0, gt=0, description="time for a request's body to arrive")
    max_header_bytes: int = Field(32 * 1024, ge=1024, description="headers of one request")
    max_headers: int = Field(100, ge=8, description="number of headers of one request")
    max_body_bytes: int = Field(32 << 20, ge=1024, description="body of one request")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where to listen: "unix:/path" or "host:port"."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.listen or (f"{host}:{self.port}",)

    @property
    def aliases(self) -> dict[str, str]:
        """Names that the operator gives models, to what they stand for."""
        return parse_aliases(self.model_alias)

    @field_validator("model_alias")
    @classmethod
    def _clear_aliases(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_aliases(value)
        return value

    @field_validator("root_path")
    @classmethod
    def _clean_prefix(cls, value: str) -> str:
        value = value.strip("/")
        return "/" + value if value else ""

    @field_validator("tool_call_parser")
    @classmethod
    def _known_tool_parser(cls, value: str) -> str:
        return check_tool_parser(value)

    @field_validator("reasoning_parser")
    @classmethod
    def _known_reasoning_parser(cls, value: str) -> str:
        return check_reasoning_parser(value)

    @field_validator("override_generation_config")
    @classmethod
    def _valid_override(cls, value: str) -> str:
        parse_override(value)
        return value


def parse_aliases(words: Sequence[str]) -> dict[str, str]:
    """Name to model of each NAME=MODEL. Raises ValueError for another form, and for a name given twice."""
    aliases: dict[str, str] = {}
    for word in words:
        name, _, model = (part.strip() for part in word.partition("="))
        if not name or not model:
            raise ValueError(f"{word[:80]!r} is not of the form NAME=MODEL")
        if aliases.setdefault(name, model) != model:
            raise ValueError(f"{name[:80]!r} cannot stand for two models")
    return aliases


def parse_override(text: str) -> dict[str, Any]:
    """The sampling defaults in a JSON object, {} for "". Raises ValueError naming the key at fault."""
    if not text:
        return {}
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError("must be a JSON object") from error
    if not isinstance(values, dict):
        raise ValueError("must be a JSON object")
    for name, value in values.items():
        if name not in OVERRIDABLE:
            raise ValueError(f"unknown key {name!r}; known: {', '.join(OVERRIDABLE)}")
        low, high, closed = OVERRIDABLE[name]
        if isinstance(value, bool) or not isinstance(value, int if name in _INTEGERS else int | float):
            raise ValueError(f"{name} must be {'an integer' if name in _INTEGERS else 'a number'}")
        if not (math.isfinite(value) and (low <= value if closed else low < value) and value <= high):
            raise ValueError(f"{name} is out of range")
    return values
