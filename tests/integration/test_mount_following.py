"""What follows a weight file that is read: the files that loaders take with it, in a real mount."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from heliosfs.following import MAX_INDEX
from tests.support.mounts import MODES, Mount, mounted, push, write

pytestmark = pytest.mark.fuse

MIB = 1 << 20
Wait = Callable[..., Any]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that the test mounts in."""
    monkeypatch.setenv("HELIOS_MOUNT__MODE", request.param)


def weights(seed: int) -> bytes:
    """A safetensors file of a tensor of 1 MiB."""
    header = json.dumps({f"t{seed}": {"dtype": "U8", "shape": [MIB], "data_offsets": [0, MIB]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(MIB)


def index(*files: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"t{n}": name for n, name in enumerate(files)}}).encode()


def tiers(mount: Mount, *names: str) -> set[bytes]:
    return {os.getxattr(mount.path / "org/name/@main/" / name, "user.helios.tier") for name in names}


def touch(mount: Mount, name: str) -> None:
    with (mount.path / "org/name/@main/" / name).open("rb") as file:
        assert file.read(16)


@pytest.mark.usefixtures("mode")
def test_what_an_index_names_follows_the_file_that_is_read(helios_home: Home, tmp_path: Path, wait_for: Wait) -> None:
    """Also across a set and what has no number, and in a folder; what the index does not name stays where it is."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "mtp.safetensors"]
    parts = ["unet/left.safetensors", "unet/right.safetensors"]
    others = ["consolidated.safetensors", "unet/other.safetensors"]
    files = {name: weights(seed) for seed, name in enumerate([*names, *parts, *others])}
    files["model.safetensors.index.json"] = index(names[2], names[0], names[1], "gone.safetensors")
    files["unet/diffusion_pytorch_model.safetensors.index.json"] = index("right.safetensors", "left.safetensors")
    files |= {"config.json": b"{}", "unet/config.json": b"{}"}
    push(helios_home, write(tmp_path / "model", files), "org/name")
    with mounted(helios_home, tmp_path / "mnt") as mount:
        touch(mount, names[1])
        wait_for(lambda: tiers(mount, *names) == {b"l1"}, what="all that the index names to be local")
        assert tiers(mount, *parts, *others) == {b"remote"}
        touch(mount, parts[0])
        wait_for(lambda: tiers(mount, *parts) == {b"l1"}, what="the parts in the folder to be local")
        assert tiers(mount, *others) == {b"remote"}


@pytest.mark.usefixtures("mode")
def test_parts_without_numbers_follow_in_a_models_directory(helios_home: Home, tmp_path: Path, wait_for: Wait) -> None:
    parts, variants = ["model.safetensors", "mtp.safetensors"], ["model.fp16.safetensors", "mtp.fp16.safetensors"]
    files = {name: weights(seed) for seed, name in enumerate([*parts, *variants])}
    push(helios_home, write(tmp_path / "model", {**files, "config.json": b"{}"}), "org/name")
    with mounted(helios_home, tmp_path / "mnt") as mount:
        touch(mount, parts[0])
        wait_for(lambda: tiers(mount, *parts) == {b"l1"}, what="the other part to be local")
        assert tiers(mount, *variants) == {b"remote"}


@pytest.mark.parametrize("data", [b"\xff\0{", b'{"weight_map": {"t": 1}}', b" " * (MAX_INDEX + 1)])
def test_an_index_that_says_nothing_disturbs_nobody(
    helios_home: Home, tmp_path: Path, wait_for: Wait, data: bytes
) -> None:
    """Numbered files still follow; the others are read like any file."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {name: weights(seed) for seed, name in enumerate([*names, "a.safetensors", "b.safetensors"])}
    files |= {"model.safetensors.index.json": data, "config.json": b"{}"}
    push(helios_home, write(tmp_path / "model", files), "org/name")
    with mounted(helios_home, tmp_path / "mnt") as mount:
        touch(mount, "a.safetensors")
        assert (mount.path / "org/name/@main/a.safetensors").read_bytes() == files["a.safetensors"]
        touch(mount, names[0])
        wait_for(lambda: tiers(mount, *names) == {b"l1"}, what="the numbered set to be local")
        assert tiers(mount, "b.safetensors") == {b"remote"}
        assert "Traceback" not in mount.log()
