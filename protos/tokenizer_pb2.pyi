from penstock.protos import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ContentFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTENT_FORMAT_AUTO: _ClassVar[ContentFormat]
    CONTENT_FORMAT_STRING: _ClassVar[ContentFormat]
    CONTENT_FORMAT_OPENAI: _ClassVar[ContentFormat]

class TruncationSide(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_SIDE_LEFT: _ClassVar[TruncationSide]
    TRUNCATION_SIDE_RIGHT: _ClassVar[TruncationSide]
CONTENT_FORMAT_AUTO: ContentFormat
CONTENT_FORMAT_STRING: ContentFormat
CONTENT_FORMAT_OPENAI: ContentFormat
TRUNCATION_SIDE_LEFT: TruncationSide
TRUNCATION_SIDE_RIGHT: TruncationSide

class RenderRequest(_message.Message):
    __slots__ = ("request_id", "model", "messages_json", "tools_json", "documents_json", "template_kwargs_json", "chat_template", "add_generation_prompt", "continue_final_message", "add_special_tokens", "reasoning_effort", "truncate_prompt_tokens", "return_text", "content_format", "max_tokens", "no_answer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_JSON_FIELD_NUMBER: _ClassVar[int]
    TOOLS_JSON_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_JSON_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_KWARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASONING_EFFORT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETURN_TEXT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NO_ANSWER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    messages_json: bytes
    tools_json: bytes
    documents_json: bytes
    template_kwargs_json: bytes
    chat_template: str
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: bool
    reasoning_effort: str
    truncate_prompt_tokens: int
    return_text: bool
    content_format: ContentFormat
    max_tokens: int
    no_answer: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., messages_json: _Optional[bytes] = ..., tools_json: _Optional[bytes] = ..., documents_json: _Optional[bytes] = ..., template_kwargs_json: _Optional[bytes] = ..., chat_template: _Optional[str] = ..., add_generation_prompt: _Optional[bool] = ..., continue_final_message: _Optional[bool] = ..., add_special_tokens: _Optional[bool] = ..., reasoning_effort: _Optional[str] = ..., truncate_prompt_tokens: _Optional[int] = ..., return_text: _Optional[bool] = ..., content_format: _Optional[_Union[ContentFormat, str]] = ..., max_tokens: _Optional[int] = ..., no_answer: _Optional[bool] = ...) -> None: ...

class RenderResponse(_message.Message):
    __slots__ = ("ids", "text", "stop_token_ids", "ends_in_reasoning", "tool_parser", "reasoning_parser", "content_format", "media")
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDS_IN_REASONING_FIELD_NUMBER: _ClassVar[int]
    TOOL_PARSER_FIELD_NUMBER: _ClassVar[int]
    REASONING_PARSER_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ends_in_reasoning: bool
    tool_parser: str
    reasoning_parser: str
    content_format: ContentFormat
    media: _containers.RepeatedCompositeFieldContainer[RenderedMedia]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ends_in_reasoning: _Optional[bool] = ..., tool_parser: _Optional[str] = ..., reasoning_parser: _Optional[str] = ..., content_format: _Optional[_Union[ContentFormat, str]] = ..., media: _Optional[_Iterable[_Union[RenderedMedia, _Mapping]]] = ...) -> None: ...

class RenderedMedia(_message.Message):
    __slots__ = ("kind", "offset", "length", "hash")
    KIND_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    kind: str
    offset: int
    length: int
    hash: bytes
    def __init__(self, kind: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., hash: _Optional[bytes] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("request_id", "model", "texts", "pairs", "add_special_tokens", "truncate_tokens", "truncation_side", "return_offsets", "return_tokens", "max_tokens", "suffix", "no_answer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_SIDE_FIELD_NUMBER: _ClassVar[int]
    RETURN_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    RETURN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    NO_ANSWER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    pairs: _containers.RepeatedScalarFieldContainer[str]
    add_special_tokens: bool
    truncate_tokens: int
    truncation_side: TruncationSide
    return_offsets: bool
    return_tokens: bool
    max_tokens: int
    suffix: str
    no_answer: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., pairs: _Optional[_Iterable[str]] = ..., add_special_tokens: _Optional[bool] = ..., truncate_tokens: _Optional[int] = ..., truncation_side: _Optional[_Union[TruncationSide, str]] = ..., return_offsets: _Optional[bool] = ..., return_tokens: _Optional[bool] = ..., max_tokens: _Optional[int] = ..., suffix: _Optional[str] = ..., no_answer: _Optional[bool] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("encodings", "stop_token_ids")
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    encodings: _containers.RepeatedCompositeFieldContainer[Encoding]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, encodings: _Optional[_Iterable[_Union[Encoding, _Mapping]]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Encoding(_message.Message):
    __slots__ = ("ids", "token_type_ids", "offsets", "tokens")
    IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TYPE_IDS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    token_type_ids: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., token_type_ids: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("model", "rows", "skip_special_tokens", "spaces_between_special_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPACES_BETWEEN_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    rows: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenIds]
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    def __init__(self, model: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[_common_pb2.TokenIds, _Mapping]]] = ..., skip_special_tokens: _Optional[bool] = ..., spaces_between_special_tokens: _Optional[bool] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ("model", "known_fingerprint")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model: str
    known_fingerprint: str
    def __init__(self, model: _Optional[str] = ..., known_fingerprint: _Optional[str] = ...) -> None: ...

class TokenizerChunk(_message.Message):
    __slots__ = ("fingerprint", "total_bytes", "data")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    total_bytes: int
    data: bytes
    def __init__(self, fingerprint: _Optional[str] = ..., total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class GetTokenizerInfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class TokenizerInfo(_message.Message):
    __slots__ = ("api_version", "service_version", "model", "fingerprint", "vocab_size", "special_token_ids", "has_chat_template", "chat_template_source", "content_format", "supports_tools", "tool_parser", "reasoning_parser", "named_templates", "all_special_ids", "add_bos_token", "prompts", "default_prompt_name")
    class SpecialTokenIdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PromptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    API_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_SOURCE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_TOOLS_FIELD_NUMBER: _ClassVar[int]
    TOOL_PARSER_FIELD_NUMBER: _ClassVar[int]
    REASONING_PARSER_FIELD_NUMBER: _ClassVar[int]
    NAMED_TEMPLATES_FIELD_NUMBER: _ClassVar[int]
    ALL_SPECIAL_IDS_FIELD_NUMBER: _ClassVar[int]
    ADD_BOS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PROMPT_NAME_FIELD_NUMBER: _ClassVar[int]
    api_version: str
    service_version: str
    model: str
    fingerprint: str
    vocab_size: int
    special_token_ids: _containers.ScalarMap[str, int]
    has_chat_template: bool
    chat_template_source: str
    content_format: ContentFormat
    supports_tools: bool
    tool_parser: str
    reasoning_parser: str
    named_templates: _containers.RepeatedScalarFieldContainer[str]
    all_special_ids: _containers.RepeatedScalarFieldContainer[int]
    add_bos_token: bool
    prompts: _containers.ScalarMap[str, str]
    default_prompt_name: str
    def __init__(self, api_version: _Optional[str] = ..., service_version: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., special_token_ids: _Optional[_Mapping[str, int]] = ..., has_chat_template: _Optional[bool] = ..., chat_template_source: _Optional[str] = ..., content_format: _Optional[_Union[ContentFormat, str]] = ..., supports_tools: _Optional[bool] = ..., tool_parser: _Optional[str] = ..., reasoning_parser: _Optional[str] = ..., named_templates: _Optional[_Iterable[str]] = ..., all_special_ids: _Optional[_Iterable[int]] = ..., add_bos_token: _Optional[bool] = ..., prompts: _Optional[_Mapping[str, str]] = ..., default_prompt_name: _Optional[str] = ...) -> None: ...

class TokenizerCalls(_message.Message):
    __slots__ = ("calls", "cancels")
    CALLS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    calls: _containers.RepeatedCompositeFieldContainer[TokenizerCall]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, calls: _Optional[_Iterable[_Union[TokenizerCall, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenizerCall(_message.Message):
    __slots__ = ("number", "render", "encode")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RENDER_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    number: int
    render: RenderRequest
    encode: EncodeRequest
    def __init__(self, number: _Optional[int] = ..., render: _Optional[_Union[RenderRequest, _Mapping]] = ..., encode: _Optional[_Union[EncodeRequest, _Mapping]] = ...) -> None: ...

class TokenizerAnswers(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[TokenizerAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[TokenizerAnswer, _Mapping]]] = ...) -> None: ...

class TokenizerAnswer(_message.Message):
    __slots__ = ("number", "render", "encode", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RENDER_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    render: RenderResponse
    encode: EncodeResponse
    error: CallError
    def __init__(self, number: _Optional[int] = ..., render: _Optional[_Union[RenderResponse, _Mapping]] = ..., encode: _Optional[_Union[EncodeResponse, _Mapping]] = ..., error: _Optional[_Union[CallError, _Mapping]] = ...) -> None: ...

class CallError(_message.Message):
    __slots__ = ("reason", "message", "param", "retry_after_us")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_US_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    param: str
    retry_after_us: int
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., retry_after_us: _Optional[int] = ...) -> None: ...
