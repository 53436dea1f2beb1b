"""What the scan of a pickled file reports: real torch files are plain, known tricks are not."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from registry.admission.formats import named
from registry.admission.pickles import Findings, scan


def scanned(content: bytes) -> Findings | None:
    return scan(io.BytesIO(content))


def saved(value: object, **options: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)  # type: ignore[arg-type]
    return out.getvalue()


WEIGHTS = {"w": torch.zeros(8, 4, dtype=torch.bfloat16), "b": torch.nn.Parameter(torch.ones(4))}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_weights_are_plain(legacy: bool) -> None:
    found = scanned(saved(WEIGHTS, _use_new_zipfile_serialization=not legacy))
    assert found is not None
    assert found.plain, found.text()
    assert "only what weights need" in found.text()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_hidden_among_weights_is_named(legacy: bool) -> None:
    found = scanned(saved({**WEIGHTS, "x": Evil()}, _use_new_zipfile_serialization=not legacy))
    assert found is not None
    assert found.names == ["posix system"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(protocol: int) -> None:
    found = scanned(pickle.dumps([1, "text", Evil()], protocol))
    assert found is not None
    assert found.names == ["posix system"]
    plain = scanned(pickle.dumps(collections.OrderedDict(a=np.zeros(3)), protocol))
    assert plain is not None
    assert plain.plain, plain.text()


def test_a_name_that_is_computed_is_not_taken_for_a_harmless_one() -> None:
    """The strings of a harmless name on top of the stack, thrown away again before the import."""
    code = b"\x80\x04\x8c\x02os\x8c\x06system" + b"\x8c\x05torch\x8c\x0cFloatStorage00\x93\x8c\x04true\x85R."
    assert pickle.loads(code) == 0  # it does run os.system
    found = scanned(code)
    assert found is not None
    assert found.names == ["a computed name"]


def test_names_from_the_memo_are_followed() -> None:
    code = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940\x30h\x00h\x01\x93."
    found = scanned(code)
    assert found is not None
    assert found.names == ["posix system"]


def test_what_breaks_off_after_an_import_is_a_pickle() -> None:
    """pickle.load runs everything up to the byte that makes no sense."""
    found = scanned(b"cos\nsystem\n(S'true'\ntR\xff\xff\xff")
    assert found is not None
    assert found.names == ["os system"]
    assert found.problems


def test_an_archive_behind_a_pickle_and_a_pickle_before_an_archive() -> None:
    archive = saved(WEIGHTS)
    found = scanned(pickle.dumps(Evil()) + archive)
    assert found is not None
    assert "posix system" in found.names


def test_an_archive_that_lies_is_reported() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    content = bytearray(out.getvalue())
    at = content.index(b"PK\x01\x02")
    struct.pack_into("<H", content, at + 10, 99)  # a compression that there isn't
    found = scanned(bytes(content))
    assert found is not None
    assert not found.plain


def test_an_archive_of_other_things_is_no_pickle() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("config.json", "{}")
    assert scanned(out.getvalue()) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_answered(content: bytes) -> None:
    """And what unpickles to something by calling a function is never passed over."""
    found = scanned(content)
    if found is None:
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
        max_leaves=20,
    ),
    st.integers(2, pickle.HIGHEST_PROTOCOL),
)
def test_plain_values_are_plain(value: object, protocol: int) -> None:
    found = scanned(pickle.dumps(value, protocol))
    assert found is not None
    assert found.plain, found.text()


def test_formats_go_by_the_name() -> None:
    assert [named(p) for p in ("a/model.safetensors", "x.GGUF", "README", ".gitattributes", "pytorch_model.bin")] == [
        "safetensors",
        "gguf",
        "text",
        "text",
        "pickle",
    ]
    assert named("weights.h5") == "other"
