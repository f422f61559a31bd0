"""Starts the tokenizer service: files, renderers, gRPC server, and an orderly end. Knows no request."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass

from prometheus_client import start_http_server

from penstock.protos import log as service_log
from penstock.protos import loop, memory, tokenizer_pb2, tokenizer_pb2_grpc
from penstock.protos.errors import ApiError
from penstock.protos.serving import GrpcService
from penstock.protos.settings import ConfigError
from penstock.protos.signals import on_shutdown_signal
from penstock.tokenizer_service import chat_template, tokenizer_files
from penstock.tokenizer_service.chat import ChatRenderer
from penstock.tokenizer_service.chat_template import ChatTemplates
from penstock.tokenizer_service.config import TokenizerConfig
from penstock.tokenizer_service.lanes import Lanes
from penstock.tokenizer_service.metrics import TokenizerMetrics
from penstock.tokenizer_service.render_pool import RenderPool
from penstock.tokenizer_service.server import TokenizerServicer
from penstock.tokenizer_service.tokenizer import load

SERVICE = tokenizer_pb2.DESCRIPTOR.services_by_name["Tokenizer"].full_name

EXIT_OK, EXIT_RUNTIME, EXIT_USAGE, EXIT_MODEL_FILES = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Parts:
    """The collaborators of one service, made but not started."""

    servicer: TokenizerServicer
    chat: ChatRenderer
    pool: RenderPool
    lanes: Lanes
    metrics: TokenizerMetrics


def run(config: TokenizerConfig) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 0, 1 runtime, 2 configuration, 3 model files."""
    service_log.setup("tokenizer", config.log_level, config.log_format)
    # The lanes are the parallelism; a pool of the library's own threads would compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        parts = assemble(config)
        memory.give_back()
        loop.run(_serve(config, parts))
    except tokenizer_files.ModelFilesError as error:
        return _fail(str(error), EXIT_MODEL_FILES)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except OSError as error:
        return _fail(str(error), EXIT_RUNTIME)
    except ApiError as error:
        return _fail(error.message, EXIT_RUNTIME)
    return EXIT_OK


def assemble(config: TokenizerConfig) -> Parts:
    """Loads the files and puts the service together. Raises ModelFilesError, ConfigError."""
    files = tokenizer_files.read(config.tokenizer or config.model)
    tokenizer = load(files)
    templates = _templates(config, files)
    metrics = TokenizerMetrics()
    lanes = Lanes()
    pool = RenderPool(config.render_processes, config.render_timeout_seconds, metrics.renderer_killed)
    metrics.watch_waiting(lambda: pool.waiting)
    chat = ChatRenderer(
        tokenizer,
        templates,
        pool,
        lanes,
        config.chat_template_content_format,
        config.trust_request_chat_template,
    )
    servicer = TokenizerServicer(config.names(), tokenizer, chat, lanes, metrics)
    return Parts(servicer, chat, pool, lanes, metrics)


def _fail(line: str, code: int) -> int:
    print(f"penstock tokenizer: {' '.join(line.split())}", file=sys.stderr, flush=True)
    return code


def _templates(config: TokenizerConfig, files: tokenizer_files.TokenizerFiles) -> ChatTemplates:
    names = (*config.names(), files.folder.resolve().name, config.model)
    model_templates = files.templates
    if config.tokenizer and not model_templates:
        model_templates = tokenizer_files.read(config.model).templates
    return chat_template.find(
        config.chat_template, config.role_table, names, model_templates, config.custom_chat_template
    )


async def _serve(config: TokenizerConfig, parts: Parts) -> None:
    stop = asyncio.Event()
    on_shutdown_signal(stop.set)
    register = tokenizer_pb2_grpc.add_TokenizerServicer_to_server
    service = GrpcService([(register, parts.servicer, SERVICE)], config.addresses())
    port = config.metrics_port
    http = start_http_server(port, config.host, parts.metrics.registry) if port else None
    try:
        await service.start()
        await parts.pool.start()
        await _prepare(parts.chat)
        await service.set_serving(True)
        await stop.wait()
        await _drain(service, config.drain_seconds)
    finally:
        await service.stop(0)
        await parts.pool.close()
        parts.lanes.close()
        if http is not None:
            http[0].shutdown()
            http[0].server_close()


async def _drain(service: GrpcService, limit_s: float) -> None:
    """Refuses new calls and lets the live ones end, for at most limit_s seconds."""
    await service.drain()
    await service.stop(limit_s)


async def _prepare(chat: ChatRenderer) -> None:
    """A template that the operator gave must be right; a model's own may be broken and only chats fail."""
    try:
        await chat.prepare(strict=chat.templates.source != "model")
    except ApiError as error:
        raise ConfigError(error.message) from error
