"""Shards of uploads: which files they make of which chunks, and how many they may name."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import registry.hub.upload.xet as xet
from helios.errors import InvalidInput
from registry.xet.hashes import to_text
from registry.xet.shard import TAG

XORB = bytes(range(32))
END = b"\xff" * 32 + bytes(16)


def chunk(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(3, "little") + b"\0" + len(data).to_bytes(3, "little") + data


def shard(*files: list[tuple[int, int]]) -> bytes:
    """A shard with these files, each of terms of the one xorb."""
    out = struct.pack("<32sQQ", TAG, 2, 0)
    for number, terms in enumerate(files):
        out += struct.pack("<32sIIQ", bytes([number]) * 32, 1 << 30, len(terms), 0)
        out += b"".join(struct.pack("<32s4I", XORB, 0, 0, first, stop) for first, stop in terms)
        out += bytes([number]) * 32 + bytes(16)
    return out + END + END


@pytest.fixture
def spool(tmp_path: Path) -> Any:
    (tmp_path / to_text(XORB)).write_bytes(chunk(b"ab") + chunk(b"c"))
    return SimpleNamespace(path=lambda name: tmp_path / name)


def test_a_shard_names_its_chunks(spool: Any) -> None:
    (_, one), (_, two) = xet._files(spool, shard([(0, 2), (1, 2)], [(0, 1)]))
    assert (one.size, two.size) == (4, 2)


@pytest.mark.parametrize("files", [[[(0, 2)] * 6], [[(0, 2)] * 3, [(0, 2)] * 3], [[(0, 1)] * 11]])
def test_a_short_shard_can_not_name_its_chunks_without_end(
    spool: Any, files: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 bytes name thousands of chunks, so 80 MiB would name what no memory holds."""
    monkeypatch.setattr(xet, "MAX_CHUNKS", 10)
    with pytest.raises(InvalidInput, match="more than 10 chunks"):
        xet._files(spool, shard(*files))


@pytest.mark.parametrize("term", [(0, 3), (2, 2), (1, 0), (0, 2**32 - 1)])
def test_chunks_that_the_xorb_has_not(spool: Any, term: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match="which has 2"):
        xet._files(spool, shard([term]))
