"""Which tensors a model has and where they lie: from an index, from the files' headers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from helios.decoding import from_json
from helios.errors import EntryNotFound, InvalidInput
from heliosfs.client.values import TensorInfo
from heliosfs.store.safetensors import header_length, parse_header

INDEX: Final = "model.safetensors.index.json"
"""The index that transformers writes beside the shards of a model."""

SUFFIX: Final = ".safetensors"
HEAD: Final = 8
"""Bytes of a safetensors file that say how long its header is."""


class Readable(Protocol):
    """What a header is read from."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    async def read(self, offset: int, size: int) -> bytearray: ...


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_index(data: bytes, path: str, files: Collection[str]) -> dict[str, str]:
    """The file of each tensor, by a model's index at ``path``; raises InvalidInput for one that names no files."""
    try:
        weight_map = from_json(data, _Index).weight_map
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(f"{path} is not an index of tensors: {error}") from None
    folder = path[: len(path) - len(INDEX)]
    found = {name: folder + file for name, file in weight_map.items()}
    if missing := set(found.values()) - set(files):
        raise InvalidInput(f"{path} names files that are not there: {', '.join(sorted(missing)[:5])}")
    return found


def find_shards(wanted: Mapping[str, str], folder: str, files: Collection[str], model: str) -> list[str]:
    """The safetensors files to open, in loading order: those of the index, else all in the folder.

    Raises EntryNotFound where there are none.
    """
    prefix = f"{folder}/" if folder else ""
    here = (path for path in files if path.endswith(SUFFIX) and path.rpartition("/")[0] == folder)
    shards = sorted(set(wanted.values())) or sorted(here)
    if not shards:
        raise EntryNotFound(
            f"{model} has no safetensors file in {prefix or 'its top folder'}",
            hint="Name the files with paths=[...], or their folder with folder=...",
        )
    return shards


async def read_header(file: Readable) -> list[TensorInfo]:
    """A file's tensors in file order. Raises InvalidInput for a malformed header."""
    length = header_length(bytes(await file.read(0, HEAD)), file.size, file.path)
    header = bytes(await file.read(HEAD, length))
    return [
        TensorInfo(t.name, t.dtype, t.shape, t.end - t.start, file.path, t.start)
        for t in parse_header(header, file.size, file.path)
    ]


def list_tensors(headers: Mapping[str, Sequence[TensorInfo]], wanted: Mapping[str, str]) -> dict[str, TensorInfo]:
    """All tensors by name, in file order; ``wanted`` is what an index says. Raises InvalidInput when they disagree."""
    out: dict[str, TensorInfo] = {}
    for path, tensors in headers.items():
        for tensor in tensors:
            if (other := out.get(tensor.name)) is not None:
                raise InvalidInput(
                    f"the tensor {tensor.name!r} is in {other.file} and in {path}",
                    hint="These are alternatives, not shards: name the files to open with paths=[...].",
                )
            out[tensor.name] = tensor
    for name, path in wanted.items():
        if name not in out or out[name].file != path:
            raise InvalidInput(f"the index says that the tensor {name!r} is in {path}, but it is not there")
    return out
