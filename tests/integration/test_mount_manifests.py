"""Manifests of a registry that means harm: their digests and commits are right, and they should not exist."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from helios.home import Home
from helios.mounts import state_of
from helios.process import ProcessId
from heliosfs.store.bulk import MAX_MANIFEST
from heliosfs.store.manifest import MANIFEST_MAGIC, FileEntry, canonical
from tests.fakes.metadata_registry import MetadataRegistry
from tests.support.mounts import MODES, Mount, fails, mounted
from tests.support.reading import within

pytestmark = pytest.mark.fuse

EMPTY = FileEntry("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 0, "0" * 40, "1" * 64)
ENTRY = canonical(msgspec.to_builtins(EMPTY))
GOOD = {f"file-{number}" for number in range(100)}

BAD_PATHS = [
    "a\nb",
    "\n",
    "models\n/a",
    "a/\n/b",
    "a\rb",
    "a\x1b[2Jb",
    "a\0b",
    "",
    "/etc/passwd",
    "../up",
    "a/../b",
    "a/./b",
    "a//b",
    "a/",
    "x" * 256,
    "ü" * 128,
    "a/" * 2048 + "a",
]


@pytest.fixture
def fake() -> Iterator[MetadataRegistry]:
    with MetadataRegistry() as registry:
        registry.publish("org/good", dict.fromkeys(GOOD, b""))
        yield registry


def record(names: Iterator[str] | list[str]) -> bytes:
    """The record of a manifest of empty files, as a registry encodes it; ``names`` are sorted."""
    return b"".join((MANIFEST_MAGIC, b'{"files":{', b",".join(canonical(n) + b":" + ENTRY for n in names), b"}}"))


def good(mount: Mount) -> None:
    """The other model can be listed, and has answers for what was never asked."""
    path = mount.path / "org/good/@main"
    assert set(os.listdir(path)) == GOOD
    assert {(path / name).stat().st_size for name in GOOD} == {0}
    with fails(errno.ENOENT):
        os.stat(path / "nothing")


def server(mount: Mount) -> ProcessId:
    """The process that serves the mount now."""
    state = state_of(mount.home, mount.path)
    assert state is not None
    return state.worker or state.process


def memory_mib(mount: Mount) -> int:
    """The most memory that the process which serves the mount ever took."""
    status = Path(f"/proc/{server(mount).pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) >> 10


@pytest.mark.parametrize("mode", MODES)
def test_a_manifest_with_a_path_that_cannot_be_is_eio_with_the_reason(
    helios_home: Home, fake: MetadataRegistry, tmp_path: Path, mode: str
) -> None:
    """Also where the rest of it is fine: nothing of it is shown."""
    commits = {
        f"org/bad-{number}": fake.publish_record(f"org/bad-{number}", record(sorted([bad, "fine"])))
        for number, bad in enumerate(BAD_PATHS)
    }
    environ = {"HELIOS_REGISTRY__URLS": fake.url, "HELIOS_MOUNT__MODE": mode}
    with mounted(helios_home, tmp_path / "mnt", **environ) as mount:
        before = server(mount)
        for name, commit in commits.items():
            for path in (mount.path / name / commit, mount.path / f".hub/models--{name.replace('/', '--')}/blobs"):
                with fails(errno.EIO):
                    os.listdir(path)
            with fails(errno.EIO):
                os.stat(mount.path / name / commit / "fine")
            assert re.search(rf"{name}\b.*a manifest holds a bad path", mount.log()), name
        good(mount)
        assert server(mount) == before
        assert len(os.listdir(mount.path / "org")) == len(commits) + 1, "their names can be listed"
        assert all(line.startswith("{") for line in mount.log().splitlines()), "a name breaks no line of the log"


def test_a_manifest_of_a_million_files_is_eio_and_takes_no_memory(
    helios_home: Home, fake: MetadataRegistry, tmp_path: Path
) -> None:
    """A real one, of a quarter of a GB: it is refused when it turns out to be too long, while others are served."""
    manifest = record(f"file-{number:07}" for number in range(1_000_000))
    assert len(manifest) > 200 << 20
    commit = fake.publish_record("org/million", manifest)
    with mounted(helios_home, tmp_path / "mnt", HELIOS_REGISTRY__URLS=fake.url) as mount:
        good(mount)
        before = memory_mib(mount)
        for _ in range(3):
            with fails(errno.EIO):
                os.listdir(mount.path / "org/million" / commit)
        assert "the manifest of models/org/million" in mount.log()
        assert memory_mib(mount) < before + 2 * (MAX_MANIFEST >> 20)
        good(mount)


@pytest.mark.parametrize("mode", MODES)
def test_a_manifest_of_as_many_files_as_there_may_be_is_listed_while_others_are_served(
    helios_home: Home, fake: MetadataRegistry, tmp_path: Path, mode: str
) -> None:
    names = [f"file-{number:07}" for number in range(100_000)]
    manifest = record(names)
    assert MAX_MANIFEST * 3 // 4 < len(manifest) < MAX_MANIFEST
    commit = fake.publish_record("org/many", manifest)
    environ = {"HELIOS_REGISTRY__URLS": fake.url, "HELIOS_MOUNT__MODE": mode}
    with mounted(helios_home, tmp_path / "mnt", **environ) as mount:
        before = server(mount)
        listed: list[list[str]] = []
        thread = threading.Thread(target=lambda: listed.append(os.listdir(mount.path / "org/many" / commit)))
        thread.start()
        within(60, lambda: good(mount))
        thread.join(120)
        assert [sorted(names_) for names_ in listed] == [names]
        assert (mount.path / "org/many" / commit / names[-1]).read_bytes() == b""
        good(mount)
        assert server(mount) == before, "it was not taken for one that hangs"
