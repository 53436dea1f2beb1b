"""Which tensors of a model are read: its safetensors files, found and checked before anything is delivered."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Final

from helios.errors import EntryNotFound, InvalidInput
from heliosfs.client.index import HEAD, INDEX, SUFFIX, list_tensors, read_index
from heliosfs.client.values import TensorInfo
from heliosfs.loader.sources import Folder, Source
from heliosfs.store.safetensors import header_length, parse_header

HEADERS_AT_ONCE: Final = 8
TOGETHER: Final = 8 << 20
"""Small tensors that lie side by side are read as one range of up to this many bytes."""

OTHERS: Final = {".gguf": "GGUF", ".bin": "PyTorch's pickle", ".pt": "PyTorch's pickle", ".pth": "PyTorch's pickle"}


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes from ``start`` to ``stop`` of a file, with the tensors that lie in them, in file order."""

    source: Source
    start: int
    stop: int
    tensors: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def choose_files(folder: Folder, patterns: Sequence[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """The safetensors files to read, in loading order, and what the model's index says: the file of each tensor.

    Those that fit one of ``patterns``, or else that the index names, or else all of the folder. Raises EntryNotFound
    and InvalidInput with what to do instead.
    """
    files = folder.files
    wanted: dict[str, str] = {}
    if patterns is not None:
        chosen = next((found for pattern in patterns if (found := [f for f in files if fnmatch(f, pattern)])), [])
        chosen = [file for file in chosen if file.endswith(SUFFIX)]
    elif INDEX in files:
        wanted = read_index(folder.read(INDEX), INDEX, files)
        chosen = list(set(wanted.values()))
    else:
        chosen = [file for file in files if file.endswith(SUFFIX)]
    if not chosen:
        raise EntryNotFound(f"{folder.name} has no safetensors files{_others(files)}", hint=_HINT)
    return sorted(chosen, key=_natural), wanted


def read_headers(
    sources: Sequence[Source], wanted: Mapping[str, str], needed: Callable[[str], bool] = lambda _: True
) -> list[Range]:
    """Read and check the headers of all files, and cut what is ``needed`` of them into ranges, in loading order.

    Raises InvalidInput for a file that is truncated or damaged, and where files or the index contradict each other.
    """
    with ThreadPoolExecutor(max(1, min(HEADERS_AT_ONCE, len(sources)))) as threads:
        headers = list(threads.map(_header, sources))
    list_tensors({source.path: infos for source, infos in zip(sources, headers, strict=True)}, wanted)
    out: list[Range] = []
    for source, infos in zip(sources, headers, strict=True):
        out += cut(source, [info for info in infos if needed(info.name)])
    return out


def cut(source: Source, infos: Sequence[TensorInfo]) -> list[Range]:
    """Ranges with these tensors of one file, which are in file order; a large tensor has a range of its own."""
    out: list[Range] = []
    group: list[TensorInfo] = []
    for info in infos:
        if group and (info.offset != _end(group[-1]) or _end(info) - group[0].offset > TOGETHER):
            out.append(Range(source, group[0].offset, _end(group[-1]), tuple(group)))
            group = []
        group.append(info)
    if group:
        out.append(Range(source, group[0].offset, _end(group[-1]), tuple(group)))
    return out


_HINT: Final = "--load-format helios reads safetensors only; take --load-format auto, or convert the model."


def _others(files: Collection[str]) -> str:
    kinds = sorted({kind for file in files for suffix, kind in OTHERS.items() if file.endswith(suffix)})
    return f" (its weights are in the format of {' and '.join(kinds)})" if kinds else ""


def refuse_file(path: str) -> None:
    """Raises InvalidInput for a model that is named as one file, as GGUF's are."""
    for suffix, kind in OTHERS.items():
        if path.endswith(suffix):
            raise InvalidInput(f"{path} is a file in the format of {kind}", hint=_HINT)


def _header(source: Source) -> list[TensorInfo]:
    first = bytearray(min(HEAD, source.size))
    source.read_into(memoryview(first), 0)
    header = bytearray(header_length(bytes(first), source.size, source.path))
    source.read_into(memoryview(header), HEAD)
    return [
        TensorInfo(t.name, t.dtype, t.shape, t.end - t.start, source.path, t.start)
        for t in parse_header(bytes(header), source.size, source.path)
    ]


def _end(info: TensorInfo) -> int:
    return info.offset + info.nbytes


def _natural(path: str) -> list[tuple[int, str]]:
    """Numbers in names by their value: layer-2 before layer-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path)]
