"""GET /openapi.json: the description of the API, generated from the types that validate it."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.classify import ClassifyRequest
from penstock.frontend.api.cohere_embed import CohereEmbedRequest
from penstock.frontend.api.completions_request import CompletionRequest
from penstock.frontend.api.embeddings import EmbeddingsRequest
from penstock.frontend.api.moderations import ModerationRequest
from penstock.frontend.api.pooling import PoolingRequest
from penstock.frontend.api.rerank import RerankRequest
from penstock.frontend.api.score import ScoreRequest
from penstock.frontend.api.tokenize import DetokenizeRequest, TokenizeRequest
from penstock.frontend.context import Context
from penstock.frontend.exchange import Exchange
from penstock.protos.errors import KINDS

_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation"),
    "/v1/completions": (CompletionRequest, "Continue one or more prompts"),
    "/v1/embeddings": (EmbeddingsRequest, "Vectors of texts"),
    "/v1/score": (ScoreRequest, "Scores of pairs of texts"),
    "/v1/rerank": (RerankRequest, "Documents by their relevance to a query"),
    "/v2/rerank": (RerankRequest, "The same, as Cohere has it"),
    "/v2/embed": (CohereEmbedRequest, "Vectors of texts, as Cohere has it"),
    "/classify": (ClassifyRequest, "Classes of texts"),
    "/pooling": (PoolingRequest, "Vectors of tokens"),
    "/v1/moderations": (ModerationRequest, "Whether texts are harmful"),
    "/tokenize": (TokenizeRequest, "Token ids of a prompt or of messages"),
    "/detokenize": (DetokenizeRequest, "Text of token ids"),
}
_GETS = {
    "/v1/models": "The served models",
    "/v1/models/{model}": "One served model",
    "/health": "200 when a model can be served",
    "/livez": "200 while the process works",
    "/readyz": "200 when a model can be served",
    "/version": "The server's version",
    "/metrics": "Metrics as Prometheus text",
    "/openapi.json": "This document",
}
_OPEN = frozenset({"/health", "/livez", "/readyz", "/version", "/metrics"})


async def openapi(exchange: Exchange, context: Context) -> None:
    await exchange.respond(200, _document())


@cache
def _document() -> bytes:
    return orjson.dumps(describe())


def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(model for model, _ in _POSTS.values())],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {path: {"get": _get(path, text)} for path, text in _GETS.items()}
    for path, (model, text) in _POSTS.items():
        paths[path] = {"post": _post(path, model, text)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": metadata.version("penstock")},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _error_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _get(path: str, text: str) -> dict[str, Any]:
    content = "text/plain" if path == "/metrics" else "application/json"
    operation = {"summary": text, "operationId": _name("get", path), **_responses(content), **_security(path)}
    if "{model}" in path:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def _post(path: str, model: type[BaseModel], text: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {
        "summary": text,
        "operationId": _name("post", path),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        **_responses("application/json"),
        **_security(path),
    }


def _responses(content_type: str) -> dict[str, Any]:
    error = {"schema": {"$ref": "#/components/schemas/Error"}}
    return {
        "responses": {
            "200": {"description": "The answer", "content": {content_type: {}}},
            "default": {"description": "An error", "content": {"application/json": error}},
        }
    }


def _security(path: str) -> dict[str, Any]:
    return {} if path in _OPEN else {"security": [{"key": []}]}


def _name(method: str, path: str) -> str:
    return (
        method + "_" + path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_")
    )


def _error_schema() -> dict[str, Any]:
    nullable = {"type": ["string", "null"]}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string", "enum": sorted({kind.type for kind in KINDS.values()})},
                    "param": nullable,
                    "code": nullable,
                },
            }
        },
    }
