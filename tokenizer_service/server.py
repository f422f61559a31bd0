"""The Tokenizer servicer: requests checked, handed on and packed into answers. Knows no template or token."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from importlib import metadata
from itertools import chain
from typing import Any, TypeAlias

import grpc

from penstock.protos import tokenizer_pb2, tokenizer_pb2_grpc
from penstock.protos.errors import ApiError
from penstock.protos.log import request_id
from penstock.tokenizer_service import templates
from penstock.tokenizer_service.chat import ChatOptions, ChatPrompt, ChatRenderer, check_final_message
from penstock.tokenizer_service.infill import Infill, no_infill
from penstock.tokenizer_service.lanes import Lanes
from penstock.tokenizer_service.metrics import TokenizerMetrics
from penstock.tokenizer_service.multiplex import CallStream
from penstock.tokenizer_service.render_pool import RenderJob
from penstock.tokenizer_service.tokenizer import Encoded, EncodeOptions, LoadedTokenizer

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

CHUNK_BYTES = 1 << 20
MAX_BATCH = 4096
MAX_TEXT_CHARS = 4 << 20
MAX_BATCH_CHARS = 16 << 20
# Ids weigh more than characters when decoded: about so many characters of work each.
ID_WEIGHT = 4

_FORMATS = {
    tokenizer_pb2.CONTENT_FORMAT_AUTO: "auto",
    tokenizer_pb2.CONTENT_FORMAT_STRING: "string",
    tokenizer_pb2.CONTENT_FORMAT_OPENAI: "openai",
}
_FORMAT_VALUES = {name: value for value, name in _FORMATS.items()}


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServicer):
    """names: the ids the model answers to, its own first."""

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: LoadedTokenizer,
        chat: ChatRenderer,
        lanes: Lanes,
        metrics: TokenizerMetrics,
    ) -> None:
        self._names = tuple(names)
        self._tokenizer = tokenizer
        self._chat = chat
        self._lanes = lanes
        self._metrics = metrics
        self._infill = Infill.of(tokenizer)

    async def Render(
        self, request: tokenizer_pb2.RenderRequest, context: Context
    ) -> tokenizer_pb2.RenderResponse:
        return await self._render(request)

    async def Encode(
        self, request: tokenizer_pb2.EncodeRequest, context: Context
    ) -> tokenizer_pb2.EncodeResponse:
        return await self._encode(request)

    async def Multiplex(
        self, requests: AsyncIterator[tokenizer_pb2.TokenizerCalls], context: Context
    ) -> None:
        # At once, or a caller could not tell a service that has this call from one that has not.
        await context.send_initial_metadata(())
        await CallStream(self._render, self._encode, context.write).run(requests)

    async def _render(self, request: tokenizer_pb2.RenderRequest) -> tokenizer_pb2.RenderResponse:
        request_id.set(request.request_id)
        with self._metrics.call("Render"):
            self._check_model(request.model)
            prompt = await self._chat.render(_job(request), _options(request))
            self._metrics.tokens("Render", len(prompt.ids))
            return _rendered(prompt, request.return_text)

    async def _encode(self, request: tokenizer_pb2.EncodeRequest) -> tokenizer_pb2.EncodeResponse:
        request_id.set(request.request_id)
        with self._metrics.call("Encode"):
            self._check_model(request.model)
            texts, pairs = list(request.texts), list(request.pairs)
            if len(texts) > MAX_BATCH:
                raise ApiError("invalid_value", f"At most {MAX_BATCH} texts can be encoded at once.", "texts")
            if pairs and len(pairs) != len(texts):
                raise ApiError(
                    "invalid_value", "pairs must be empty or have one entry for each text.", "pairs"
                )
            if request.HasField("suffix"):
                return await self._encode_infill(request, texts)
            size = _checked_size(texts, pairs, request.max_tokens)
            work = partial(self._tokenizer.encode, texts, pairs, _encode_options(request))
            rows = await self._lanes.run(size, work)
            self._metrics.tokens("Encode", sum(len(row.ids) for row in rows))
            return tokenizer_pb2.EncodeResponse(encodings=[_encoding(row) for row in rows])

    async def _encode_infill(
        self, request: tokenizer_pb2.EncodeRequest, texts: list[str]
    ) -> tokenizer_pb2.EncodeResponse:
        options = _encode_options(request)
        if request.pairs or options.truncate is not None or options.offsets or options.tokens:
            raise ApiError("invalid_value", "A suffix cannot be had together with that.", "suffix")
        if self._infill is None:
            raise no_infill()
        size = _checked_size([*texts, request.suffix], [], request.max_tokens)
        work = partial(
            self._infill.encode,
            self._tokenizer,
            texts,
            request.suffix,
            options.add_special_tokens,
            options.max_tokens,
        )
        rows = await self._lanes.run(size, work)
        self._metrics.tokens("Encode", sum(map(len, rows)))
        return tokenizer_pb2.EncodeResponse(
            encodings=[tokenizer_pb2.Encoding(ids=ids) for ids in rows],
            stop_token_ids=self._infill.end_ids,
        )

    async def Decode(
        self, request: tokenizer_pb2.DecodeRequest, context: Context
    ) -> tokenizer_pb2.DecodeResponse:
        with self._metrics.call("Decode"):
            self._check_model(request.model)
            if len(request.rows) > MAX_BATCH:
                raise ApiError("invalid_value", f"At most {MAX_BATCH} rows can be decoded at once.", "rows")
            rows = [list(row.ids) for row in request.rows]
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            field = "spaces_between_special_tokens"
            spaces = request.spaces_between_special_tokens if request.HasField(field) else True
            work = partial(self._tokenizer.decode, rows, skip, spaces)
            texts = await self._lanes.run(ID_WEIGHT * sum(map(len, rows)), work)
            self._metrics.tokens("Decode", sum(map(len, rows)))
            return tokenizer_pb2.DecodeResponse(texts=texts)

    async def GetTokenizer(
        self, request: tokenizer_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[tokenizer_pb2.TokenizerChunk]:
        with self._metrics.call("GetTokenizer"):
            self._check_model(request.model)
            data, fingerprint = self._tokenizer.data, self._tokenizer.fingerprint
            if request.known_fingerprint == fingerprint:
                yield tokenizer_pb2.TokenizerChunk(fingerprint=fingerprint)
                return
            for start in range(0, len(data), CHUNK_BYTES):
                yield tokenizer_pb2.TokenizerChunk(
                    fingerprint=fingerprint, total_bytes=len(data), data=data[start : start + CHUNK_BYTES]
                )

    async def GetInfo(
        self, request: tokenizer_pb2.GetTokenizerInfoRequest, context: Context
    ) -> tokenizer_pb2.TokenizerInfo:
        with self._metrics.call("GetInfo"):
            self._check_model(request.model)
            tokenizer, chat = self._tokenizer, self._chat
            hints = chat.hints()
            return tokenizer_pb2.TokenizerInfo(
                api_version="v1",
                service_version=_version(),
                model=self._names[0],
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                special_token_ids=tokenizer.special_ids,
                has_chat_template=bool(chat.templates.by_name),
                chat_template_source=chat.templates.source,
                content_format=_FORMAT_VALUES[chat.content_format],
                supports_tools=chat.supports_tools,
                tool_parser=hints.tool_parser,
                reasoning_parser=hints.reasoning_parser,
                named_templates=templates.names(),
                all_special_ids=tokenizer.all_special_ids,
                add_bos_token=tokenizer.adds_bos,
                prompts=tokenizer.prompts,
                default_prompt_name=tokenizer.default_prompt_name,
            )

    def _check_model(self, name: str) -> None:
        if name and name not in self._names:
            served = ", ".join(self._names)
            raise ApiError(
                "model_not_found", f"The model {name[:128]!r} does not exist. Served here: {served}.", "model"
            )


def _job(request: tokenizer_pb2.RenderRequest) -> RenderJob:
    asked = request.add_generation_prompt if request.HasField("add_generation_prompt") else None
    form = _FORMATS.get(request.content_format)
    if form is None:
        raise ApiError("invalid_value", "content_format is none of the known values.", "content_format")
    return RenderJob(
        messages=request.messages_json,
        tools=request.tools_json,
        documents=request.documents_json,
        arguments=request.template_kwargs_json,
        content_format=form,
        add_generation_prompt=check_final_message(asked, request.continue_final_message),
        continue_final_message=request.continue_final_message,
        reasoning_effort=request.reasoning_effort if request.HasField("reasoning_effort") else None,
    )


def _options(request: tokenizer_pb2.RenderRequest) -> ChatOptions:
    truncate = request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None
    if truncate == 0:
        field = "truncate_prompt_tokens"
        raise ApiError("invalid_value", f"{field} must be at least 1.", field)
    return ChatOptions(
        template=request.chat_template if request.HasField("chat_template") else None,
        add_special_tokens=request.add_special_tokens,
        truncate=truncate,
        max_tokens=request.max_tokens,
        no_answer=request.no_answer,
    )


def _rendered(prompt: ChatPrompt, return_text: bool) -> tokenizer_pb2.RenderResponse:
    return tokenizer_pb2.RenderResponse(
        ids=prompt.ids,
        text=prompt.text if return_text else "",
        stop_token_ids=prompt.hints.stop_token_ids,
        ends_in_reasoning=prompt.ends_in_reasoning,
        tool_parser=prompt.hints.tool_parser,
        reasoning_parser=prompt.hints.reasoning_parser,
        content_format=_FORMAT_VALUES[prompt.content_format],
    )


def _encode_options(request: tokenizer_pb2.EncodeRequest) -> EncodeOptions:
    truncate = request.truncate_tokens if request.HasField("truncate_tokens") else None
    if truncate == 0:
        raise ApiError("invalid_value", "truncate_tokens must be at least 1.", "truncate_tokens")
    side = request.truncation_side
    if side not in (tokenizer_pb2.TRUNCATION_SIDE_LEFT, tokenizer_pb2.TRUNCATION_SIDE_RIGHT):
        raise ApiError("invalid_value", "truncation_side is none of the known values.", "truncation_side")
    return EncodeOptions(
        add_special_tokens=request.add_special_tokens if request.HasField("add_special_tokens") else True,
        truncate=truncate,
        keep_last=side == tokenizer_pb2.TRUNCATION_SIDE_LEFT,
        max_tokens=request.max_tokens,
        no_answer=request.no_answer,
        offsets=request.return_offsets,
        tokens=request.return_tokens,
    )


def _checked_size(texts: Sequence[str], pairs: Sequence[str], max_tokens: int) -> int:
    """Characters in all texts. Encoding takes some 150 bytes of memory for each."""
    longest = max(map(len, chain(texts, pairs)), default=0)
    if longest > MAX_TEXT_CHARS and max_tokens:
        raise ApiError(
            "context_length_exceeded",
            f"This model's maximum context length is {max_tokens + 1} tokens, but the prompt has {longest} "
            "characters.",
            "prompt",
        )
    size = sum(map(len, chain(texts, pairs)))
    if longest > MAX_TEXT_CHARS or size > MAX_BATCH_CHARS:
        raise ApiError(
            "request_too_large",
            f"At most {MAX_TEXT_CHARS} characters a text, {MAX_BATCH_CHARS} in all, can be encoded at once.",
            "texts",
        )
    return size


def _encoding(row: Encoded) -> tokenizer_pb2.Encoding:
    return tokenizer_pb2.Encoding(
        ids=row.ids, token_type_ids=row.type_ids, offsets=row.offsets, tokens=row.tokens
    )


def _version() -> str:
    try:
        return metadata.version("penstock")
    except metadata.PackageNotFoundError:
        return "unknown"
