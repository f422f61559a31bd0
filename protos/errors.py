"""The one error table: a reason, its gRPC status, its HTTP status and its OpenAI type. Knows no service.

Services raise `ApiError(reason, message, param)`; the wire form over gRPC is a status whose details carry
`google.rpc.ErrorInfo` (and `RetryInfo` where a retry helps), and over HTTP the OpenAI error body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "penstock"
# A caller controls parts of many messages; an answer must never grow with its input.
MAX_MESSAGE_CHARS = 2000


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row of the table. `retry_after_s` is the default hint, 0 for errors that a retry does not mend."""

    code: str
    grpc_status: grpc.StatusCode
    http_status: int
    type: str
    retry_after_s: float = 0.0


_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED
_AWAY = grpc.StatusCode.UNAVAILABLE
_LATE = grpc.StatusCode.DEADLINE_EXCEEDED
_REQUEST = "invalid_request_error"
_GONE = "service_unavailable_error"

_ROWS = (
    ErrorKind("invalid_json", _INVALID, 400, _REQUEST),
    ErrorKind("invalid_type", _INVALID, 400, _REQUEST),
    ErrorKind("invalid_value", _INVALID, 400, _REQUEST),
    ErrorKind("missing_required_parameter", _INVALID, 400, _REQUEST),
    ErrorKind("unsupported_parameter", _INVALID, 400, _REQUEST),
    ErrorKind("context_length_exceeded", _INVALID, 400, _REQUEST),
    ErrorKind("invalid_grammar", _INVALID, 400, _REQUEST),
    ErrorKind("grammar_too_complex", _INVALID, 400, _REQUEST),
    ErrorKind("invalid_api_key", grpc.StatusCode.UNAUTHENTICATED, 401, "authentication_error"),
    ErrorKind("model_not_found", grpc.StatusCode.NOT_FOUND, 404, "not_found_error"),
    ErrorKind("unknown_url", grpc.StatusCode.UNIMPLEMENTED, 404, "not_found_error"),
    ErrorKind("method_not_allowed", grpc.StatusCode.UNIMPLEMENTED, 405, "not_found_error"),
    ErrorKind("request_timeout", _LATE, 408, "timeout_error"),
    ErrorKind("request_too_large", _BUSY, 413, _REQUEST),
    ErrorKind("headers_too_large", _BUSY, 431, _REQUEST),
    ErrorKind("unsupported_media_type", _INVALID, 415, _REQUEST),
    ErrorKind("queue_full", _BUSY, 429, "rate_limit_error", 1.0),
    ErrorKind("rate_limited", _BUSY, 429, "rate_limit_error", 1.0),
    ErrorKind("internal_error", grpc.StatusCode.INTERNAL, 500, "server_error"),
    ErrorKind("engine_unavailable", _AWAY, 503, _GONE, 5.0),
    ErrorKind("engine_loading", _AWAY, 503, _GONE, 5.0),
    ErrorKind("engine_overloaded", _AWAY, 503, _GONE, 5.0),
    ErrorKind("shutting_down", _AWAY, 503, _GONE, 1.0),
    ErrorKind("engine_lost", grpc.StatusCode.ABORTED, 503, _GONE, 1.0),
    ErrorKind("timeout", _LATE, 504, "timeout_error"),
    ErrorKind("queue_timeout", _LATE, 504, "timeout_error"),
    ErrorKind("client_disconnected", grpc.StatusCode.CANCELLED, 499, _REQUEST),
    # A field or RPC of the contract that the running engine does not serve. Over HTTP the same thing is an
    # unsupported parameter, so that official clients do not retry it.
    ErrorKind("unimplemented", grpc.StatusCode.UNIMPLEMENTED, 400, _REQUEST),
)

KINDS: dict[str, ErrorKind] = {row.code: row for row in _ROWS}

# What a bare status means when the peer sent no ErrorInfo: a transport failure, or another implementation.
_BARE = {
    grpc.StatusCode.INVALID_ARGUMENT: "invalid_value",
    grpc.StatusCode.OUT_OF_RANGE: "invalid_value",
    grpc.StatusCode.FAILED_PRECONDITION: "invalid_value",
    grpc.StatusCode.ALREADY_EXISTS: "invalid_value",
    grpc.StatusCode.NOT_FOUND: "model_not_found",
    grpc.StatusCode.UNAUTHENTICATED: "invalid_api_key",
    grpc.StatusCode.PERMISSION_DENIED: "invalid_api_key",
    grpc.StatusCode.UNIMPLEMENTED: "unimplemented",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "queue_full",
    grpc.StatusCode.UNAVAILABLE: "engine_unavailable",
    grpc.StatusCode.ABORTED: "engine_lost",
    grpc.StatusCode.DEADLINE_EXCEEDED: "timeout",
    grpc.StatusCode.CANCELLED: "client_disconnected",
    grpc.StatusCode.INTERNAL: "internal_error",
    grpc.StatusCode.UNKNOWN: "internal_error",
    grpc.StatusCode.DATA_LOSS: "internal_error",
    grpc.StatusCode.OK: "internal_error",
}


class ApiError(Exception):
    """An answer to the caller.

    reason: a code of the table, lower case ("context_length_exceeded"). message: for people, no paths, no
    addresses; cut at MAX_MESSAGE_CHARS. param: the request field at fault. retry_after_s: seconds, default
    from the table. Raises KeyError for a reason that is not in the table.
    """

    def __init__(
        self, reason: str, message: str, param: str | None = None, *, retry_after_s: float | None = None
    ) -> None:
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[: MAX_MESSAGE_CHARS - 3] + "..."
        super().__init__(message)
        self.kind = KINDS[reason]
        self.reason = reason
        self.message = message
        self.param = param
        self.retry_after_s = self.kind.retry_after_s if retry_after_s is None else retry_after_s

    @property
    def http_status(self) -> int:
        return self.kind.http_status

    def body(self) -> dict[str, Any]:
        """The OpenAI error body."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.type,
                "param": self.param,
                "code": "unsupported_parameter" if self.reason == "unimplemented" else self.reason,
            }
        }

    def to_status(self) -> grpc.Status:
        """The gRPC form, with ErrorInfo and, where a retry helps, RetryInfo in the details."""
        code = self.kind.grpc_status.value[0]
        status = status_pb2.Status(code=code, message=self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason.upper(), domain=DOMAIN)
        if self.param is not None:
            info.metadata["param"] = self.param
        status.details.append(_packed(info))
        if self.retry_after_s > 0:
            delay = duration_pb2.Duration()
            delay.FromMicroseconds(int(self.retry_after_s * 1e6))
            status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        return rpc_status.to_status(status)


def from_parts(
    reason: str, message: str, param: str | None = None, retry_after_s: float | None = None
) -> ApiError:
    """An ApiError from wire parts; a reason this build does not know becomes internal_error."""
    code = reason.lower()
    return ApiError(code if code in KINDS else "internal_error", message, param, retry_after_s=retry_after_s)


def from_rpc(error: grpc.RpcError) -> ApiError:
    """The ApiError behind a failed call. A status without ErrorInfo is a transport failure: its text names
    sockets and addresses, so a fixed sentence stands in for it."""
    status = rpc_status.from_call(error) if hasattr(error, "trailing_metadata") else None
    if status is not None:
        parsed = _from_details(status)
        if parsed is not None:
            return parsed
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    reason = _BARE.get(code, "internal_error")
    return ApiError(reason, _BARE_TEXT.get(reason, "The request could not be served."))


_BARE_TEXT = {
    "engine_unavailable": "No engine is reachable right now.",
    "engine_lost": "The engine was lost while it served the request.",
    "timeout": "The deadline passed before the request was finished.",
    "queue_full": "The service is at its limit.",
    "internal_error": "An internal error occurred.",
    "unimplemented": "The service does not implement this call.",
}


def _from_details(status: status_pb2.Status) -> ApiError | None:
    found: ApiError | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            found = from_parts(info.reason, status.message, info.metadata.get("param"))
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) and found is not None:
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            found.retry_after_s = retry.retry_delay.ToMicroseconds() / 1e6
    return found


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
