"""Small tokenizers made on the spot, and the service over them in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from penstock.protos import tokenizer_pb2_grpc
from penstock.protos.serving import CLIENT_OPTIONS, GrpcService
from penstock.tokenizer_service.config import TokenizerConfig
from penstock.tokenizer_service.main import SERVICE, Parts, assemble

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]"]
CORPUS = ["Hello world, this is a small text.", "the quick brown fox jumps over the lazy dog 0123456789"] * 8

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(adds_bos: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)]
        )
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, template: Any = CHATML, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "pad_token": "</s>",
        **config,
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a ChatML template and a tokenizer that adds bos. Read only."""
    return write_folder(tmp_path_factory.mktemp("models") / "chatty", make_tokenizer())


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template. Read only."""
    return write_folder(tmp_path_factory.mktemp("models") / "base", make_tokenizer(), template=None)


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[[Any], Path]:
    """model_folder(template) -> a folder with that chat_template in tokenizer_config.json."""
    return lambda template: write_folder(tmp_path / "model", make_tokenizer(), template)


Served = tuple[tokenizer_pb2_grpc.TokenizerStub, Parts]
Serve = Callable[..., Awaitable[Served]]


@pytest_asyncio.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """serve(folder, **config) -> (stub, parts): a service on a unix socket, ended after the test."""
    async with AsyncExitStack() as stack:
        count = 0

        async def start(folder: Path, **options: Any) -> Served:
            nonlocal count
            count += 1
            target = f"unix:{tmp_path}/s{count}"
            config = TokenizerConfig(model=str(folder), **{"render_processes": 1, **options})
            parts = assemble(config)
            register = tokenizer_pb2_grpc.add_TokenizerServicer_to_server
            service = GrpcService([(register, parts.servicer, SERVICE)], [target])
            stack.callback(parts.lanes.close)
            stack.push_async_callback(parts.pool.close)
            stack.push_async_callback(service.stop, 0)
            await parts.pool.start()
            await parts.chat.prepare(strict=False)
            await service.start()
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(target, options=CLIENT_OPTIONS)
            )
            return tokenizer_pb2_grpc.TokenizerStub(channel), parts

        yield start
