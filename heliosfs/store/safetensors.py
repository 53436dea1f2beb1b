"""The head of a safetensors file, read strictly.

Layout (huggingface/safetensors, format 0.x): u64 little-endian header length, JSON header, tensor data. The data of
the tensors fills the rest of the file without gaps or overlaps; anything else is refused, because loaders disagree
about what it means.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from helios.decoding import from_json, json_decoder
from helios.errors import InvalidInput

MAX_HEADER: Final = 25_000_000
"""Longest header accepted, in bytes: the limit of the Hugging Face Hub's own parser."""

DTYPE_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32,
    "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

METADATA: Final = "__metadata__"

_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor; ``start`` and ``end`` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_length(first8: bytes, size: int, where: str) -> int:
    """Length in bytes of the JSON header of a file of ``size`` bytes; raises InvalidInput naming ``where``."""
    if len(first8) < 8:
        raise InvalidInput(f"{where}: a safetensors file of {size} bytes has no header; it is truncated")
    length = int.from_bytes(first8, "little")
    if length > MAX_HEADER:
        raise InvalidInput(f"{where}: its safetensors header claims {length} bytes, more than {MAX_HEADER}")
    if 8 + length > size:
        raise InvalidInput(f"{where}: its safetensors header of {length} bytes is truncated (file: {size} bytes)")
    return length


def parse_header(header: bytes, size: int, where: str) -> list[Tensor]:
    """Read the JSON header (without its length field) of a file of ``size`` bytes.

    Returns the tensors in file order. Raises InvalidInput naming ``where`` for anything that is not a well-formed
    file: bad JSON, duplicate keys, unknown types, offsets that overlap, leave gaps or leave the file, sizes that
    contradict shapes.
    """
    try:
        header.decode()
        entries = from_json(header, dict[str, msgspec.Raw])
        if metadata := entries.pop(METADATA, None):
            from_json(metadata, dict[str, str] | None)
        _refuse_duplicates(header, len(entries))
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{where}: its safetensors header is not valid: {error}") from None
    base = 8 + len(header)
    tensors = [_tensor(name, entry, base, where) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            problem = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise InvalidInput(f"{where}: the tensor {tensor.name!r} {problem} (offset {tensor.start}, expected {end})")
        end = tensor.end
    if end != size:
        raise InvalidInput(f"{where}: its tensors end at byte {end} but the file has {size}; it is damaged")
    return tensors


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


_decode_entry = json_decoder(_Entry).decode


def _tensor(name: str, entry: msgspec.Raw, base: int, where: str) -> Tensor:
    try:
        info = _decode_entry(entry)
        bits = DTYPE_BITS[info.dtype]
    except KeyError as error:
        raise InvalidInput(f"{where}: the tensor {name!r} has the unknown type {error}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(f"{where}: the entry of tensor {name!r} in its header is malformed: {error}") from None
    start, end = info.data_offsets
    for dimension in info.shape:
        bits *= dimension
    if end < start or (end - start) * 8 != bits:
        raise InvalidInput(
            f"{where}: the tensor {name!r} has {end - start} bytes at offsets {start}..{end}, "
            f"but {info.dtype}{list(info.shape)} needs {bits / 8:g}"
        )
    return Tensor(name, sys.intern(info.dtype), info.shape, base + start, base + end)


def _refuse_duplicates(header: bytes, tensors: int) -> None:
    """Raise ValueError if a key appears twice in an object: the format forbids it, and parsers disagree on who wins.

    Counting suffices for every ordinary header, where each tensor has each key once and nothing is escaped.
    """
    counts = {header.count(key) for key in (b'"dtype"', b'"shape"', b'"data_offsets"')}
    if b"\\" in header or header.count(b'"__metadata__"') > 1 or (counts != {tensors}):
        json.loads(header, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} appears twice in one object")
        seen.add(key)
