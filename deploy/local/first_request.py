"""The command that a server shows when it is ready: a request that one of its models answers. Asks nobody."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from penstock.local import model_source
from penstock.local.options import ModelPlan
from penstock.local.shares import generates


def curl(models: Sequence[ModelPlan], address: str, root_path: str, *, keyed: bool) -> str:
    """A command to paste, for the first model that generates text, else for the first. The key stays out of
    terminals and logs."""
    if address.startswith("unix:"):
        where = f"--unix-socket {address.removeprefix('unix:')} http://localhost{root_path}"
    else:
        where = f"http://{address}{root_path}"
    model = next((model for model in models if generates(model.engine.config)), models[0])
    path, fields = _request(model)
    body = shlex.quote(json.dumps({"model": model.ids[0], **fields}))
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    return f"curl {where}{path} -H 'Content-Type: application/json'{key} -d {body}"


def _request(model: ModelPlan) -> tuple[str, dict[str, Any]]:
    """Path and fields."""
    if not generates(model.engine.config):
        return _pooled_request(model)
    templates = model.tokenizer.config
    chats = bool(templates.chat_template or templates.custom_chat_template or templates.role_table)
    if chats or model_source.has_chat_template(model.source.folder):
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello!"}]}
    return "/v1/completions", {"prompt": "Hello"}


def _pooled_request(model: ModelPlan) -> tuple[str, dict[str, Any]]:
    config = model_source.read_config(model.source.folder)
    if not str(config.get("architectures")).endswith("ForSequenceClassification']"):
        return "/v1/embeddings", {"input": "Hello!"}
    labels = config.get("id2label")
    if isinstance(labels, dict) and len(labels) == 1:
        return "/v1/rerank", {"query": "a bird that sings", "documents": ["nightingale", "anvil"]}
    return "/classify", {"input": "Hello!"}
