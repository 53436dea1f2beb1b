"""How each file of an upload is sent."""

from base64 import b64encode

import pytest

from helios.errors import InvalidInput
from heliosfs.store.manifest import FileEntry
from registry.hub.upload.preupload import File, Preupload, answer


def ask(path: str, size: int, sample: bytes = b"text", **kwargs) -> dict:
    file = File(path, size, b64encode(sample).decode())
    return answer(Preupload([file], kwargs.get("ignore")), kwargs.get("held", {}), kwargs.get("hosted", ""))["files"][0]


@pytest.mark.parametrize(
    ("path", "size", "sample", "mode"),
    [
        ("a.txt", 5, b"text", "regular"),
        ("a.txt", 11 << 20, b"text", "lfs"),
        ("a.safetensors", 5, b"text", "lfs"),
        ("A.BIN", 5, b"text", "lfs"),
        ("a", 5, b"\0\1", "lfs"),
        ("a.bin", 0, b"", "regular"),
    ],
)
def test_modes(path, size, sample, mode):
    assert ask(path, size, sample)["uploadMode"] == mode


def test_what_the_branch_has_is_told():
    held = {
        "large": FileEntry("a" * 64, 1, "b" * 40, "c" * 64, True),
        "small": FileEntry("a" * 64, 1, "b" * 40, "c" * 64, False),
    }
    assert ask("large", 1, held=held)["oid"] == "a" * 64
    assert ask("small", 1, held=held)["oid"] == "b" * 40
    assert "oid" not in ask("new", 1, held=held)


def test_gitignore():
    rules = "*.log\n!keep.log\n/build/\n"
    assert [ask(p, 1, ignore=rules)["shouldIgnore"] for p in ("a/x.log", "keep.log", "build/a", "x/build")] == [
        True, False, True, False,
    ]  # fmt: skip
    assert ask("x.log", 1, hosted=rules)["shouldIgnore"]
    assert not ask("x.log", 1, ignore="", hosted=rules)["shouldIgnore"], "what comes with the upload counts"


@pytest.mark.parametrize(
    "file",
    [File("../x", 1, ""), File("x", -1, ""), File("x", 1 << 63, ""), File("x", 1, "?"), File("", 1, "")],
)
def test_what_is_wrong(file):
    with pytest.raises(InvalidInput):
        answer(Preupload([file]), {}, "")


def test_bounds():
    with pytest.raises(InvalidInput, match="at a time"):
        answer(Preupload([File("x", 1)] * 1001), {}, "")
    with pytest.raises(InvalidInput, match="gitignore"):
        answer(Preupload([], "x" * 100_000), {}, "")
