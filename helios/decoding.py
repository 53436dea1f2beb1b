"""From bytes to typed values: the only way in which Helios has msgspec look at types.

msgspec (0.22) describes a type when it is first met, and keeps that. While one thread does so, another that meets the
same type sees a description that is not finished, and reads through a null pointer: the process is gone. So types are
described under one lock, and nothing is decoded as a type before its description is whole. Decoders are kept, which
also spares looking at the type for each call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")
D = TypeVar("D")

_lock = threading.RLock()
_json: dict[Any, msgspec.json.Decoder[Any]] = {}
_msgpack: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def _made(known: dict[Any, D], make: Callable[[Any], D], kind: Any) -> D:
    """The decoder that is kept for ``kind``, made if nobody else has made it meanwhile."""
    with _lock:
        found = known.get(kind)
        if found is None:
            found = known[kind] = make(kind)
        return found


@overload
def json_decoder(kind: type[T]) -> msgspec.json.Decoder[T]: ...
@overload
def json_decoder(kind: Any) -> msgspec.json.Decoder[Any]: ...
def json_decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    """The decoder of JSON as ``kind``; always the same one. Raises TypeError for what msgspec can't decode."""
    return _json.get(kind) or _made(_json, msgspec.json.Decoder, kind)


@overload
def msgpack_decoder(kind: type[T]) -> msgspec.msgpack.Decoder[T]: ...
@overload
def msgpack_decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]: ...
def msgpack_decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """The decoder of MessagePack as ``kind``; always the same one."""
    return _msgpack.get(kind) or _made(_msgpack, msgspec.msgpack.Decoder, kind)


@overload
def from_json(data: bytes | bytearray | memoryview | str, kind: type[T]) -> T: ...
@overload
def from_json(data: bytes | bytearray | memoryview | str, kind: Any) -> Any: ...
def from_json(data: Any, kind: Any) -> Any:
    """JSON as a value of ``kind``. Raises msgspec.DecodeError, of which ValidationError is one."""
    return json_decoder(kind).decode(data)


@overload
def from_msgpack(data: bytes | bytearray | memoryview, kind: type[T]) -> T: ...
@overload
def from_msgpack(data: bytes | bytearray | memoryview, kind: Any) -> Any: ...
def from_msgpack(data: Any, kind: Any) -> Any:
    """MessagePack as a value of ``kind``. Raises msgspec.DecodeError, of which ValidationError is one."""
    return msgpack_decoder(kind).decode(data)


@overload
def converted(value: Any, kind: type[T], *, strict: bool = True) -> T: ...
@overload
def converted(value: Any, kind: Any, *, strict: bool = True) -> Any: ...
def converted(value: Any, kind: Any, *, strict: bool = True) -> Any:
    """Plain values as one of ``kind``; not ``strict``: numbers and the like may be texts. Raises ValidationError."""
    json_decoder(kind)  # describes the type
    return msgspec.convert(value, kind, strict=strict)
