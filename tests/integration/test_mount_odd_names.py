"""Names that are hard to bear: shown and readable, or refused when they are published, with the reason."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from helios.home import Home
from tests.conftest import error_lines
from tests.support.mounts import MODES, Mount, fails, mounted, push, run, write

pytestmark = pytest.mark.fuse

TWINS = (unicodedata.normalize("NFC", "ü-twin"), unicodedata.normalize("NFD", "ü-twin"))
ODD = [
    "x" * 255,
    "ü" * 127 + "x",  # 255 bytes
    "d" * 255 + "/" + "e" * 255 + "/" + "f" * 255,
    *TWINS,
    " ",
    " lead and trail ",
    "-rf",
    "'\"$(touch x)`;&|",
    "%2F",
    "@main",
    "…",
    "a\u2028b",  # LINE SEPARATOR, which is no control character
    "\u202etxt.exe",
    "\ufeffbom",
    "\U0001f40b" * 63,
    "C:",
    "CON",
    "con",
    "~",
    "*?[x]",
    "..x",
    "...",
    ".hidden",
    "0" * 40,
]
FILES = {name: f"{number} {len(name)}".encode() for number, name in enumerate(ODD)}
REF = "a/" * 100 + "b"


@pytest.fixture(scope="module", params=MODES)
def mount(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Mount]:
    base = tmp_path_factory.mktemp("odd")
    home = Home(base / "home")
    push(home, write(base / "good", {"a": b"good"}), "org/good")
    push(home, write(base / "model", FILES), "org/odd")
    with mounted(home, base / "mnt", HELIOS_MOUNT__MODE=request.param) as mount:
        yield mount
    assert [line for path in home.logs.glob("*.log") for line in error_lines(path)] == []


def test_odd_names_are_listed_and_read_as_they_were_published(mount: Mount) -> None:
    files = mount.path / "org/odd/@main"
    found = {os.path.relpath(Path(top, name), files) for top, _, names in os.walk(files) for name in names}
    assert found == set(FILES)
    for name, data in FILES.items():
        assert (files / name).read_bytes() == data
    hub = mount.path / ".hub/models--org--odd"
    for name, data in FILES.items():
        assert (hub / "snapshots" / (hub / "refs/main").read_text() / name).read_bytes() == data


def test_names_that_differ_in_their_normal_form_alone_are_two(mount: Mount) -> None:
    one, two = (mount.path / "org/odd/@main" / name for name in TWINS)
    assert one.read_bytes() != two.read_bytes()
    assert not one.samefile(two)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (b"a\nb", "control character"),
        (b"a\tb", "control character"),
        (b"a\x7fb", "control character"),
        (b"a\\b", "backslash"),
        (b"\xff", "not valid UTF-8"),
        (b"caf\xe9", "not valid UTF-8"),
        (b"\xed\xa0\x80", "not valid UTF-8"),  # a surrogate, as WTF-8 writes it
        (b"\xc0\xaf", "not valid UTF-8"),  # a slash in too many bytes
    ],
)
def test_names_that_cannot_be_kept_are_refused_when_they_are_published(
    mount: Mount, tmp_path: Path, name: bytes, why: str
) -> None:
    directory = write(tmp_path / "model", {"fine": b"x"})
    with open(os.path.join(os.fsencode(directory), name), "wb"):
        pass
    said = run(mount.home, "push", directory, "org/refused", code=1).stderr
    assert why in said
    assert "Traceback" not in said
    with fails(errno.ENOENT):
        os.stat(mount.path / "org/refused")


def test_a_name_of_256_bytes_is_not_there(mount: Mount) -> None:
    with fails(errno.ENOENT, errno.ENAMETOOLONG):
        os.stat(mount.path / "org/odd/@main" / ("x" * 256))
    with fails(errno.ENOENT, errno.ENAMETOOLONG):
        os.stat(mount.path / "org/odd/@main" / ("x" * 2000))


def test_a_ref_whose_name_is_too_long_for_a_file(mount: Mount, tmp_path: Path) -> None:
    commit = push(mount.home, write(tmp_path / "model", {"a": b"ref"}), f"org/good@{REF}")
    assert "@main" in os.listdir(mount.path / "org/good")
    assert (mount.path / ".hub/models--org--good/refs" / REF).read_text() == commit
    assert (mount.path / "org/good" / commit / "a").read_bytes() == b"ref"
