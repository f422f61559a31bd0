"""How the core's messages travel over a socket: msgpack arrays with a tag. Knows no meaning of any field.

One frame each: 4 bytes of little-endian length, then the body. For every message there is a msgspec struct
with the same fields; msgspec checks types while it decodes. Needs msgspec, which the core itself does not.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from array import array
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import msgspec

from penstock.engine_service.core import messages
from penstock.engine_service.core.messages import FromCore, ToCore

FRAME_HEADER_BYTES = 4
MAX_FRAME_BYTES = 256 * 1024 * 1024

_TAGS = {
    messages.Configure: "configure",
    messages.AddRequest: "add",
    messages.AddPooled: "add_pooled",
    messages.AbortRequests: "abort",
    messages.EndChoice: "end_choice",
    messages.Ping: "ping",
    messages.FlushCache: "flush",
    messages.Shutdown: "shutdown",
    messages.StepOutput: "step",
    messages.Pong: "pong",
    messages.CacheFlushed: "flushed",
    messages.Progress: "progress",
    messages.Ready: "ready",
    messages.LoadFailed: "load_failed",
}

DecodeError = msgspec.MsgspecError

_Convert = Callable[[Any], Any]


def encode(message: ToCore | FromCore) -> bytes:
    """One frame. Raises OverflowError for prompt ids beyond 32 bits."""
    body = _encoder.encode(_codecs[type(message)].to_struct(message))
    return len(body).to_bytes(FRAME_HEADER_BYTES, "little") + body


def decode_to_core(body: bytes | memoryview) -> ToCore:
    """Raises DecodeError."""
    struct = _to_core.decode(body)
    return _by_struct[type(struct)].to_message(struct)  # type: ignore[no-any-return]


def decode_from_core(body: bytes | memoryview) -> FromCore:
    """Raises DecodeError."""
    struct = _from_core.decode(body)
    return _by_struct[type(struct)].to_message(struct)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """A field's type on the wire, and the ways there and back; None where the value travels as it is."""

    type: Any
    pack: _Convert | None = None
    unpack: _Convert | None = None


class _Codec:
    """A dataclass and its struct."""

    def __init__(self, cls: type) -> None:
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        kinds = [_kind(hints[name]) for name in names]
        self._message = cls
        self.struct = msgspec.defstruct(
            cls.__name__,
            [(name, kind.type) for name, kind in zip(names, kinds, strict=True)],
            array_like=True,
            tag=_TAGS.get(cls),
            gc=False,
        )
        self._values = _getter(names)
        self._packers = [(i, kind.pack) for i, kind in enumerate(kinds) if kind.pack is not None]
        self._unpackers = [(i, kind.unpack) for i, kind in enumerate(kinds) if kind.unpack is not None]

    def to_struct(self, message: Any) -> Any:
        return self.struct(*_converted(self._values(message), self._packers))

    def to_message(self, struct: Any) -> Any:
        return self._message(*_converted(self._values(struct), self._unpackers))


def _converted(values: tuple[Any, ...], converters: list[tuple[int, _Convert]]) -> Sequence[Any]:
    if not converters:
        return values
    converted = list(values)
    for index, convert in converters:
        converted[index] = convert(converted[index])
    return converted


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if not names:
        return lambda message: ()
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda message: (get(message),)


def _kind(hint: Any) -> _Kind:
    if dataclasses.is_dataclass(hint):
        codec = _codec(hint)
        return _Kind(codec.struct, codec.to_struct, codec.to_message)
    origin = typing.get_origin(hint)
    arguments: tuple[Any, ...] = typing.get_args(hint)
    if origin is Sequence:  # only ids are sequences of an unnamed kind
        return _Kind(bytes, _pack_ids, _unpack_ids)
    if origin in (types.UnionType, typing.Union) and dataclasses.is_dataclass(arguments[0]):
        pack, unpack = _both(arguments[0])
        return _Kind(
            _codec(arguments[0]).struct | None,
            lambda value: None if value is None else pack(value),
            lambda value: None if value is None else unpack(value),
        )
    if origin is list and dataclasses.is_dataclass(arguments[0]):
        pack, unpack = _both(arguments[0])
        return _Kind(
            types.GenericAlias(list, (_codec(arguments[0]).struct,)),
            lambda values: [pack(value) for value in values],
            lambda values: [unpack(value) for value in values],
        )
    if origin is dict and dataclasses.is_dataclass(arguments[1]):
        pack, unpack = _both(arguments[1])
        return _Kind(
            types.GenericAlias(dict, (arguments[0], _codec(arguments[1]).struct)),
            lambda values: {key: pack(value) for key, value in values.items()},
            lambda values: {key: unpack(value) for key, value in values.items()},
        )
    return _Kind(hint)


def _both(cls: Any) -> tuple[_Convert, _Convert]:
    codec = _codec(cls)
    return codec.to_struct, codec.to_message


def _pack_ids(ids: Sequence[int]) -> bytes:
    return (ids if isinstance(ids, array) else array("i", ids)).tobytes()


def _unpack_ids(packed: bytes) -> array[int]:
    ids = array("i")
    try:
        ids.frombytes(packed)
    except ValueError as error:
        raise DecodeError("ids of a broken length") from error
    return ids


_codecs: dict[type, _Codec] = {}


def _codec(cls: Any) -> _Codec:
    if cls not in _codecs:
        _codecs[cls] = _Codec(cls)
    return _codecs[cls]


def _structs_of(union: Any) -> Any:
    return typing.Union[tuple(_codec(cls).struct for cls in typing.get_args(union))]  # noqa: UP007


_encoder = msgspec.msgpack.Encoder()
_to_core: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_structs_of(ToCore))
_from_core: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_structs_of(FromCore))
_by_struct = {codec.struct: codec for codec in _codecs.values()}
