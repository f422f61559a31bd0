"""Prompts to token ids, through the tokenizer service. Knows the request types, not the answers."""

from __future__ import annotations

import orjson

from penstock.frontend.api.chat_request import ChatRequest, messages_json
from penstock.frontend.api.completions_request import CompletionRequest
from penstock.frontend.api.tool_use import ToolUse
from penstock.frontend.catalog import Model
from penstock.frontend.effective import check_prompt_ids
from penstock.frontend.tokenizer_client import ModelTokenizer
from penstock.protos import tokenizer_pb2
from penstock.protos.common_pb2 import TokenIds
from penstock.protos.errors import ApiError


async def render_chat(
    tokenizer: ModelTokenizer,
    model: Model,
    request: ChatRequest,
    raw_messages: object,
    request_id: str,
    timeout_s: float | None,
    use: ToolUse | None = None,
) -> tokenizer_pb2.RenderResponse:
    """raw_messages: as the client sent them. use: the tools to tell the model of. Raises ApiError: template
    errors, context_length_exceeded."""
    render = tokenizer_pb2.RenderRequest(
        request_id=request_id,
        model=tokenizer.info.model,
        messages_json=messages_json(raw_messages),
        continue_final_message=bool(request.continue_final_message),
        add_special_tokens=bool(request.add_special_tokens),
    )
    if use is not None:
        render.tools_json = orjson.dumps(use.for_template())
    if request.documents:
        render.documents_json = orjson.dumps(request.documents)
    if request.chat_template_kwargs:
        render.template_kwargs_json = orjson.dumps(request.chat_template_kwargs)
    if request.chat_template is not None:
        render.chat_template = request.chat_template
    if request.add_generation_prompt is not None:
        render.add_generation_prompt = request.add_generation_prompt
    elif request.continue_final_message:
        render.add_generation_prompt = False
    if request.reasoning_effort is not None:
        render.reasoning_effort = request.reasoning_effort
    if request.truncate_prompt_tokens is not None:
        render.truncate_prompt_tokens = request.truncate_prompt_tokens
    else:
        render.max_tokens = max(1, model.info.max_model_len - 1)
    answer = await tokenizer.render(render, timeout_s)
    if not answer.ids:
        raise ApiError("invalid_value", "The messages make an empty prompt.", "messages")
    return answer


async def encode_prompts(
    tokenizer: ModelTokenizer,
    model: Model,
    request: CompletionRequest,
    request_id: str,
    timeout_s: float | None,
) -> list[list[int]]:
    """The ids of each prompt, in order. Raises ApiError: ids outside the vocabulary, empty prompts,
    context_length_exceeded."""
    texts = request.texts
    if texts is None:
        id_lists = request.id_lists
        check_prompt_ids(id_lists, model.info.vocab_size)
        keep = request.truncate_prompt_tokens
        return [ids[-keep:] for ids in id_lists] if keep is not None else id_lists
    encode = tokenizer_pb2.EncodeRequest(request_id=request_id, model=tokenizer.info.model, texts=texts)
    if request.add_special_tokens is not None:
        encode.add_special_tokens = request.add_special_tokens
    if request.truncate_prompt_tokens is not None:
        encode.truncate_tokens = request.truncate_prompt_tokens
    else:
        encode.max_tokens = max(1, model.info.max_model_len - 1)
    answer = await tokenizer.encode(encode, timeout_s)
    prompts = [list(encoding.ids) for encoding in answer.encodings]
    for index, ids in enumerate(prompts):
        if not ids:
            name = "prompt" if isinstance(request.prompt, str) else f"prompt[{index}]"
            raise ApiError("invalid_value", f"'{name}' has no tokens.", name)
    return prompts


async def encode_gaps(
    tokenizer: ModelTokenizer,
    model: Model,
    request: CompletionRequest,
    request_id: str,
    timeout_s: float | None,
) -> tuple[list[list[int]], list[int]]:
    """The ids that ask for what stands between each prompt and the request's suffix, and the ids that end
    such an answer. Raises ApiError, unsupported_parameter for a model that cannot."""
    encode = tokenizer_pb2.EncodeRequest(
        request_id=request_id,
        model=tokenizer.info.model,
        texts=request.texts or [],
        suffix=request.suffix or "",
        max_tokens=max(1, model.info.max_model_len - 1),
    )
    if request.add_special_tokens is not None:
        encode.add_special_tokens = request.add_special_tokens
    answer = await tokenizer.encode(encode, timeout_s)
    return [list(encoding.ids) for encoding in answer.encodings], list(answer.stop_token_ids)


async def encode_bad_words(
    tokenizer: ModelTokenizer, words: list[str], timeout_s: float | None
) -> list[TokenIds]:
    """Each word as it looks at the start of a text and, where that differs, inside one, after a space."""
    bare = [word.lstrip() for word in words]
    for word in bare:
        if not word:
            raise ApiError("invalid_value", "'bad_words' must hold more than spaces.", "bad_words")
    answer = await tokenizer.encode(
        tokenizer_pb2.EncodeRequest(
            model=tokenizer.info.model,
            texts=[*bare, *(" " + word for word in bare)],
            add_special_tokens=False,
        ),
        timeout_s,
    )
    rows = [list(encoding.ids) for encoding in answer.encodings]
    found: list[TokenIds] = []
    for alone, inside in zip(rows[: len(bare)], rows[len(bare) :], strict=True):
        if alone:
            found.append(TokenIds(ids=alone))
        if inside and inside != alone:
            found.append(TokenIds(ids=inside))
    return found
