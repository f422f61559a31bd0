"""The tokenizer service's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from penstock.protos.settings import Config


class TokenizerConfig(Config):
    model: str = Field(
        description="Folder of the model, with its tokenizer.", json_schema_extra={"positional": True}
    )
    served_model_name: tuple[str, ...] = Field(
        (), description="Ids the model answers to, the first is its id. Default: the folder's name."
    )
    tokenizer: str = Field("", description="Folder of the tokenizer, if not the model's.")
    chat_template: str = Field(
        "", description="Chat template: a file, the template itself, or the name of a shipped one."
    )
    custom_chat_template: str = Field(
        "",
        description="Chat template for a model that has none.",
        json_schema_extra={"env": ["CUSTOM_CHAT_TEMPLATE"]},
    )
    role_table: str = Field("", description="File with a role table (YAML or JSON) instead of a template.")
    chat_template_content_format: Literal["auto", "string", "openai"] = Field(
        "auto", description="How message contents reach the template: as a string or as a list of parts."
    )
    trust_request_chat_template: bool = Field(
        False, description="Accept chat templates inside requests. They are code: for trusted callers only."
    )
    render_timeout_seconds: float = Field(
        5.0, gt=0, le=600, description="Longest rendering of a chat template; then its process is replaced."
    )
    render_processes: int = Field(2, ge=1, le=64, description="Processes that render chat templates.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(50052, ge=0, le=65535, description="Port to listen on (gRPC).")
    listen: tuple[str, ...] = Field(
        (), description="gRPC addresses such as unix:/run/tokenizer.sock, instead of host and port."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of /metrics (HTTP), 0 for none.")
    drain_seconds: float = Field(45.0, ge=0, description="How long requests may finish after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        "info", description="Least level that is logged."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines as text or JSON.")

    def names(self) -> tuple[str, ...]:
        """The ids of the model, its own first."""
        return self.served_model_name or (Path(self.model).resolve().name,)

    def addresses(self) -> tuple[str, ...]:
        return self.listen or (f"{self.host}:{self.port}",)
