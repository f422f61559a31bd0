"""A tokenizer service for tests: a real byte-level tokenizer made here, a fixed chat template, faults on
demand."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock.protos import common_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from penstock.protos.errors import ApiError
from penstock.protos.serving import GrpcService
from penstock.tokenizer_service.multiplex import CallStream

SERVICE = "penstock.v1.Tokenizer"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_TEXT = (
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today? I am fine, thank you. "
    "Once upon a time there was a tiny model that could count: one, two, three, four, five. Über naïve."
)


def byte_level_tokenizer(special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Some 350 tokens; every byte has one. Special tokens have the ids 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        show_progress=False,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([_TEXT] * 3, trainer)
    return tokenizer


def render_chat(messages: Sequence[dict[str, object]], generation_prompt: bool = True) -> str:
    """The fixed template of the fake."""
    text = ""
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        text += f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if generation_prompt else "")


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServicer):
    """One replica. error: raised by Render, Encode and Decode. answering: an event; cleared, these calls
    hang. calls: names of the RPCs that came. renders, encodes: the requests of Render and Encode. prompts,
    default_prompt_name: of embedding models. tool_parser, reasoning_parser,
    ends_in_reasoning: what Render tells of the template. special: the tokenizer's special tokens."""

    def __init__(
        self,
        address: str,
        *,
        model: str = "fake-model",
        tokenizer: Tokenizer | None = None,
        salt: str = "",
        special: Sequence[str] = SPECIAL,
        supports_tools: bool = True,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str = "",
    ) -> None:
        """salt: changes the file, and thus the fingerprint, and nothing else."""
        self.address = address
        self.special = tuple(special)
        self.tokenizer = tokenizer or byte_level_tokenizer(special)
        self.data = self.tokenizer.to_str().encode() + b"\n" * len(salt)
        self.fingerprint = hashlib.sha256(self.data).hexdigest()
        self.model = model
        self.has_chat_template = True
        self.fills_in = False
        self.error: ApiError | None = None
        self.answering = asyncio.Event()
        self.answering.set()
        self.calls: list[str] = []
        self.renders: list[tokenizer_pb2.RenderRequest] = []
        self.encodes: list[tokenizer_pb2.EncodeRequest] = []
        self.prompts = prompts or {}
        self.default_prompt_name = default_prompt_name
        self.tool_parser = "hermes"
        self.reasoning_parser = ""
        self.ends_in_reasoning = False
        self.supports_tools = supports_tools
        self._service: GrpcService | None = None

    @property
    def eos_id(self) -> int:
        return SPECIAL.index("<|im_end|>")

    async def start(self) -> FakeTokenizer:
        add = tokenizer_pb2_grpc.add_TokenizerServicer_to_server
        self._service = GrpcService([(add, self, SERVICE)], [self.address])
        await self._service.start()
        await self._service.set_serving(True)
        return self

    async def stop(self) -> None:
        """Goes away at once."""
        if self._service is not None:
            service, self._service = self._service, None
            await service.stop(0)

    async def _begin(self, name: str) -> None:
        self.calls.append(name)
        await self.answering.wait()
        if self.error is not None:
            raise self.error

    async def Render(
        self, request: tokenizer_pb2.RenderRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.RenderResponse:
        self.renders.append(request)
        await self._begin("Render")
        if not self.has_chat_template:
            raise ApiError("invalid_value", "The model has no chat template.", "messages")
        generation_prompt = not request.HasField("add_generation_prompt") or request.add_generation_prompt
        text = render_chat(json.loads(request.messages_json), generation_prompt)
        ids = self._limited(self.tokenizer.encode(text).ids, request.max_tokens, "messages")
        return tokenizer_pb2.RenderResponse(
            ids=ids,
            text=text if request.return_text else "",
            stop_token_ids=[self.eos_id],
            tool_parser=self.tool_parser,
            reasoning_parser=self.reasoning_parser,
            ends_in_reasoning=self.ends_in_reasoning,
        )

    async def Encode(
        self, request: tokenizer_pb2.EncodeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.EncodeResponse:
        await self._begin("Encode")
        response = tokenizer_pb2.EncodeResponse()
        if request.HasField("suffix"):
            if not self.fills_in:
                raise ApiError("unsupported_parameter", "No suffix here.", "suffix")
            for text in request.texts:
                ids = self.tokenizer.encode(f"<{text}|{request.suffix}>").ids
                response.encodings.append(tokenizer_pb2.Encoding(ids=ids))
            response.stop_token_ids.append(5)
            return response
        self.encodes.append(request)
        for text, pair in zip(request.texts, request.pairs or [None] * len(request.texts), strict=True):
            found = self.tokenizer.encode(text, pair)
            if request.HasField("truncate_tokens"):
                first = request.truncation_side == tokenizer_pb2.TRUNCATION_SIDE_RIGHT
                found.truncate(request.truncate_tokens, direction="right" if first else "left")
            name = f"prompt[{len(response.encodings)}]" if len(request.texts) > 1 else "prompt"
            response.encodings.append(
                tokenizer_pb2.Encoding(
                    ids=self._limited(found.ids, request.max_tokens, name),
                    token_type_ids=found.type_ids if request.pairs else [],
                    tokens=found.tokens if request.return_tokens else [],
                    offsets=[edge for span in found.offsets for edge in span]
                    if request.return_offsets
                    else [],
                )
            )
        return response

    async def Multiplex(
        self, requests: AsyncIterator[tokenizer_pb2.TokenizerCalls], context: grpc.aio.ServicerContext
    ) -> None:
        self.calls.append("Multiplex")
        await context.send_initial_metadata(())
        stream = CallStream(
            lambda request: self.Render(request, context),
            lambda request: self.Encode(request, context),
            context.write,
        )
        await stream.run(requests)

    async def Decode(
        self, request: tokenizer_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.DecodeResponse:
        await self._begin("Decode")
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        rows: list[common_pb2.TokenIds] = list(request.rows)
        texts = [self.tokenizer.decode(list(row.ids), skip_special_tokens=skip) for row in rows]
        return tokenizer_pb2.DecodeResponse(texts=texts)

    async def GetTokenizer(
        self, request: tokenizer_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[tokenizer_pb2.TokenizerChunk]:
        self.calls.append("GetTokenizer")
        for start in range(0, len(self.data), 4096):
            yield tokenizer_pb2.TokenizerChunk(
                fingerprint=self.fingerprint,
                total_bytes=len(self.data),
                data=self.data[start : start + 4096],
            )

    async def GetInfo(
        self, request: tokenizer_pb2.GetTokenizerInfoRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.TokenizerInfo:
        self.calls.append("GetInfo")
        return tokenizer_pb2.TokenizerInfo(
            api_version="penstock.v1",
            model=self.model,
            fingerprint=self.fingerprint,
            vocab_size=self.tokenizer.get_vocab_size(),
            special_token_ids={"eos": self.eos_id},
            has_chat_template=self.has_chat_template,
            chat_template_source="model" if self.has_chat_template else "none",
            all_special_ids=[self.tokenizer.token_to_id(text) for text in self.special],
            supports_tools=self.supports_tools,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
        )

    def _limited(self, ids: list[int], limit: int, param: str) -> list[int]:
        if limit and len(ids) > limit:
            raise ApiError(
                "context_length_exceeded", f"The prompt has {len(ids)} tokens, at most {limit} fit.", param
            )
        return ids
