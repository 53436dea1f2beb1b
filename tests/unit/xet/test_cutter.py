"""hf-xet as it is pinned: where it cuts, what it hashes, and what its xorbs look like.

``v1/repeats.xet`` is the layout of ``CONTENT`` that hf-xet 1.8.0 made. A later version that cuts otherwise fails here
before it can give files other hashes than the Hub's.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import hf_xet
import pytest

from helios.errors import IntegrityError
from registry.xet.hashes import chunk_hash, file_hash, to_text, xorb_hash
from registry.xet.layout import Layout
from registry.xet.maker import cut
from tests.support.xet_client import put_together

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests/golden/v1/repeats.xet"
A, B = hashlib.shake_256(b"xet a").digest(1_500_000), hashlib.shake_256(b"xet b").digest(500_000)
CONTENT = A + B + A + bytes(300_000)
FILE = "ba9f0f81f02d3626656ab0f84da057a6dd014e9136b7240026b0e62d6ce84c90"
XORB = "5a8a702ff2f6728716f63ec7664bc4307d7a6b407b9d2de5247d2cc4d332eaf5"
BLOB = hashlib.sha256(CONTENT).hexdigest()

KEEP = """
import os, sys
from pathlib import Path
from registry.xet import cutter

class Keep(cutter.Upload):
    def take(self, xorb, left):
        Path(xorb).write_bytes(self.rfile.read(left))

file, shards = cutter.cut(sys.stdin.fileno(), int(sys.argv[2]), Keep)
sys.stdout.buffer.write(cutter.lay_out(sys.argv[1], int(sys.argv[2]), file, shards).encode())
"""


def lay_out(content: bytes, scratch: Path) -> Layout:
    scratch.mkdir(exist_ok=True)
    pieces = (memoryview(content)[at : at + 70_001] for at in range(0, len(content), 70_001))
    return Layout.decode(cut(hashlib.sha256(content).hexdigest(), len(content), pieces, scratch, lambda: None))


def test_what_is_cut_today_is_what_was_cut_then(tmp_path: Path) -> None:
    layout = lay_out(CONTENT, tmp_path / "scratch")
    assert layout.encode() == GOLDEN.read_bytes()
    assert (to_text(layout.file), [to_text(xorb.digest) for xorb in layout.xorbs]) == (FILE, [XORB])
    plan = layout.reconstruct(0, len(CONTENT))
    assert len(plan.parts) > 2, "the second A is not stored twice"
    assert layout.xorbs[0].ends[-1] < len(CONTENT) - 1_000_000
    assert layout.size == len(CONTENT)


def test_the_layout_says_the_truth_by_the_protocols_own_hashes(tmp_path: Path) -> None:
    """Every chunk's hash from the file's bytes, the xorb's and the file's from the chunks', and hf-xet agrees."""
    layout = Layout.decode(GOLDEN.read_bytes())
    (xorb,) = layout.xorbs
    data = b"".join(CONTENT[span.offset : span.offset + span.count] for span in xorb.spans(0, xorb.position(len(xorb))))
    chunks = [(chunk_hash(data[a:b]), b - a) for a, b in pairwise([0, *xorb.ends])]
    assert xorb_hash(chunks) == xorb.digest
    parts = layout.reconstruct(0, layout.size).parts
    assert file_hash([chunk for part in parts for chunk in chunks[part.first : part.stop]]) == layout.file
    (tmp_path / "content").write_bytes(CONTENT)
    (hashed,) = hf_xet.hash_files([str(tmp_path / "content")])
    assert (hashed.hash, hashed.file_size) == (to_text(layout.file), len(CONTENT))


def test_a_served_xorb_is_byte_for_byte_the_one_that_hf_xet_uploads(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEEP, BLOB, str(len(CONTENT))],
        input=CONTENT,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_XET_CACHE": "cache"},
        capture_output=True,
        check=True,
    )
    layout = Layout.decode(done.stdout)
    (xorb,) = layout.xorbs
    served = bytearray()
    for span in xorb.spans(0, xorb.position(len(xorb))):
        for chunk in range(xorb.chunk_at(span.start), xorb.chunk_at(span.stop - 1) + 1):
            at = span.offset + xorb.before(chunk) - span.data
            served += xorb.head(chunk) + CONTENT[at : at + xorb.ends[chunk] - xorb.before(chunk)]
    assert (tmp_path / to_text(xorb.digest)).read_bytes() == served
    plan = layout.reconstruct(1_400_000, 2_100_000)
    fetched = put_together(plan, lambda _, a, b: bytes(served[xorb.position(a) : xorb.position(b)]), 700_000)
    assert fetched == CONTENT[1_400_000:2_100_000]


@pytest.mark.parametrize("content", [b"x", b"tiny", bytes(200_000)])
def test_small_files(tmp_path: Path, content: bytes) -> None:
    layout = lay_out(content, tmp_path / "scratch")
    assert layout.size == len(content)
    (tmp_path / "content").write_bytes(content)
    assert to_text(layout.file) == hf_xet.hash_files([str(tmp_path / "content")])[0].hash


def test_a_blob_that_ends_early_has_no_layout(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="ended 1 bytes early"):
        cut("a" * 64, 5, [memoryview(b"four")], tmp_path, lambda: None)


def test_it_can_be_given_up(tmp_path: Path) -> None:
    calls = 0

    def alive() -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise RuntimeError("enough")

    endless = iter(lambda: memoryview(bytes(1 << 16)), None)
    with pytest.raises(RuntimeError, match="enough"):
        cut("a" * 64, 1 << 40, endless, tmp_path, alive)
