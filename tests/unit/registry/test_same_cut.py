"""A client and the registry cut a file alike, whatever it is, and refuse the same ones."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.errors import InvalidInput
from heliosfs.store.cutting import recipe_of
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.recipe import Recipe
from registry.ingest.ingest import Ingest
from tests.support.ingest import Bytes, MemoryIndex, seeded

KIB = 1 << 10


@pytest.fixture
def small_chunks() -> Iterator[None]:
    """The rules with everything a 64th of its size: files of some KiB have all that large ones have."""
    sizes = {"MAX_CHUNK": 64 * KIB, "SMALL_TENSOR": 16 * KIB, "LARGE": 512 * KIB, "EDGE": KIB}
    with ExitStack() as stack:
        for name, size in sizes.items():
            stack.enter_context(patch(f"heliosfs.store.chunking.{name}", size))
        yield


lengths = st.lists(st.sampled_from([0, 1, 700, 16 * KIB - 1, 16 * KIB, 64 * KIB, 100_000, 200_000]), max_size=8)


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    header: dict[str, object] = {"__metadata__": {"a": "b"}} if draw(st.booleans()) else {}
    offset = 0
    for number, length in enumerate(draw(lengths)):
        header[f"t{number}"] = {"dtype": "U8", "shape": [length], "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode() + b" " * draw(st.sampled_from([0, 7, 70_000]))
    return len(text).to_bytes(8, "little") + text + seeded(offset, draw(st.integers(0, 3)))


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    sizes = draw(lengths)
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(sizes), 1)
    vocabulary = draw(st.sampled_from([0, 10, 9000]))
    out += struct.pack("<Q1sIIQ", 1, b"k", 9, 8, vocabulary) + struct.pack("<Q2s", 2, b"ab") * vocabulary
    offset = 0
    for number, size in enumerate(sizes):
        out += struct.pack("<Q1sIQIQ", 1, b"%d" % (number % 10), 1, size, 0, offset)
        offset += size + -size % 32
    return out + bytes(-len(out) % 32) + seeded(offset, draw(st.integers(0, 3)))


plain_files = st.builds(seeded, st.sampled_from([0, 1, 8, 9, 64 * KIB, 64 * KIB + 1, 600_000]), st.integers(0, 3))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file with bytes changed near its start, or cut off, or with more at its end; or none of that."""
    content = bytearray(draw(st.one_of(safetensors_files(), gguf_files(), plain_files)))
    for _ in range(draw(st.integers(0, 2)) if content else 0):
        content[draw(st.integers(0, min(len(content), 400) - 1))] = draw(st.integers(0, 255))
    match draw(st.sampled_from(["", "", "cut", "more"])):
        case "cut":
            del content[draw(st.integers(0, len(content))) :]
        case "more":
            content += b"x" * draw(st.sampled_from([1, 100_000]))
    return bytes(content)


def ingested(store: DirectoryStore, path: str, content: bytes) -> Recipe:
    return Ingest(store, MemoryIndex()).ingest(path, len(content), Bytes(content, most=50_001)).recipe


def outcome(call: Callable[[], Recipe]) -> Recipe | str:
    """The recipe, or why there is none."""
    try:
        return call()
    except InvalidInput as error:
        return error.message


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=damaged(), path=st.sampled_from(["m.safetensors", "m.SafeTensors", "m.gguf", "m.bin", "dir.x/plain"]))
def test_both_cut_a_file_alike(
    tmp_path_factory: pytest.TempPathFactory, small_chunks: None, content: bytes, path: str
) -> None:
    root = tmp_path_factory.mktemp("cut")
    (root / "file").write_bytes(content)
    read: list[int] = []
    with DirectoryStore(root / "store") as store:
        recipe = outcome(lambda: recipe_of(root / "file", path, len(content), read.append))
        assert outcome(lambda: ingested(store, path, content)) == recipe
    if isinstance(recipe, str):
        return
    assert recipe.blob == hashlib.sha256(content).hexdigest()
    assert sum(read) == len(content)


@pytest.mark.parametrize("size", [4 << 20, (32 << 20) - 1, (32 << 20) + 5])
def test_files_of_real_size(tmp_path: Path, size: int) -> None:
    content = seeded(size, 1)
    (tmp_path / "file").write_bytes(content)
    with DirectoryStore(tmp_path / "store") as store:
        assert ingested(store, "w.bin", content) == recipe_of(tmp_path / "file", "w.bin", size)


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    for size in (999, 1001):
        with pytest.raises(InvalidInput, match=r"w\.bin: (more than|ended after)"):
            recipe_of(tmp_path / "file", "w.bin", size)
    with pytest.raises(InvalidInput, match=r"w\.bin: can't be read"):
        recipe_of(tmp_path / "none", "w.bin", 1)
