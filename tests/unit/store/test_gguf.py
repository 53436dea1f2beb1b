"""GGUF files are cut at their tensors, as ggml's own writer laid them out, whatever their head says."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.errors import InvalidInput
from heliosfs.store.gguf import MAX_HEAD, Short, spans

MIB = 1 << 20


def written(path: Path, tensors: dict[str, int], words: int = 100, alignment: int | None = None) -> bytes:
    """A file by ggml's own writer: tensors of so many bytes, and a vocabulary of so many words."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_context_length(4096)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("general.quantized", True)
    writer.add_token_list([f"word{n}" for n in range(words)])
    writer.add_token_scores([float(n) for n in range(words)])
    for number, (name, size) in enumerate(tensors.items()):
        writer.add_tensor(name, np.full(size, number + 1, dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_tensors_start_where_ggml_says(tmp_path: Path, alignment: int | None) -> None:
    content = written(tmp_path / "a.gguf", {"embed": 3 * MIB, "norm": 1001, "w": 7 * MIB + 5}, alignment=alignment)
    told = sorted(int(tensor.data_offset) for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors)
    base, found = spans(content, len(content))
    assert [start for start, _ in found] == told
    assert base == told[0]
    assert [end for _, end in found] == [*told[1:], len(content)]


def test_a_head_that_is_not_all_there_is_told_from_one_that_is_wrong(tmp_path: Path) -> None:
    content = written(tmp_path / "a.gguf", {"w": 64}, words=20_000)
    base = spans(content, len(content))[0]
    for length in (0, 3, 8, 24, 1000, base // 2, base - 40):
        with pytest.raises(Short):
            spans(content[:length], len(content))
    assert spans(content[:base], len(content)) == spans(content, len(content))


def test_a_file_without_tensors_is_all_head(tmp_path: Path) -> None:
    content = written(tmp_path / "vocabulary.gguf", {})
    assert spans(content, len(content)) == (len(content), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"GGML" + b[4:], "version"),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "version"),  # big-endian
        (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], "items"),
        (lambda b: b[:16] + struct.pack("<Q", 1 << 60) + b[24:], "items"),
        (lambda b: b[:24] + struct.pack("<Q", 1 << 40) + b[32:], "longer"),
        (lambda b: b[:-40], "outside"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    content = change(written(tmp_path / "a.gguf", {"a": 32, "w": 32}, words=1))
    with pytest.raises(InvalidInput, match=message):
        spans(content, len(content) - 64 if message == "outside" else len(content))


@settings(max_examples=300)
@given(st.data())
def test_any_bytes_are_an_answer_or_a_refusal(data: st.DataObject) -> None:
    """Nothing else is raised, and no count in the head makes it read on for long."""
    good = struct.pack("<4sIQQ", b"GGUF", 3, 2, 2)
    good += struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2) + struct.pack("<Q2sQ2s", 2, b"ab", 2, b"cd")
    good += struct.pack("<Q1sII", 1, b"z", 4, 7)
    for offset in (0, 32):
        good += struct.pack("<Q1sIQIQ", 1, b"t", 1, 8, 0, offset)
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    size = data.draw(st.sampled_from([len(good), 1000, MAX_HEAD * 4]))
    try:
        base, found = spans(bytes(changed), size)
    except (Short, InvalidInput):
        return
    assert 0 <= base <= size
    ends = [base, *(end for _, end in found)]
    assert [start for start, _ in found] == ends[:-1]
    assert ends[-1] == size
