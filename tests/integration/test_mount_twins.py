"""One content in two repositories: what becomes of one of them is nothing to the other."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helios.home import Home
from tests.support.mounts import MODES, fails, mounted, run, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.fuse

DATA = random.Random(5).randbytes(9 << 20)


@pytest.mark.parametrize("mode", MODES)
def test_a_twin_of_what_was_removed_can_be_read(
    helios: Callable[..., object], helios_home: Home, tmp_path: Path, mode: str
) -> None:
    """The inode is one; whoever looked at it last may be in the repository that goes."""
    with running_registry(helios) as registry:
        environ = {"HELIOS_REGISTRY__URLS": registry.url, "HELIOS_MOUNT__MODE": mode}
        model = write(tmp_path / "model", {"data.txt": DATA, "other.txt": DATA[: 1 << 20]})
        first, second = (
            run(helios_home, "push", model, name, **environ).stdout.strip() for name in ("org/first", "org/second")
        )
        with mounted(helios_home, tmp_path / "mnt", **environ):
            stays, goes = tmp_path / "mnt/org/first" / first, tmp_path / "mnt/org/second" / second
            for directory in (stays, goes):  # in this order
                for name in os.listdir(directory):
                    assert os.stat(directory / name).st_size
            with (
                (stays / "data.txt").open("rb", buffering=0) as held,
                (goes / "data.txt").open("rb", buffering=0) as lost,
            ):
                assert lost.read(10) == DATA[:10]
                run(helios_home, "rm", "org/second", "--yes", **environ)
                time.sleep(1.1)
                assert os.pread(held.fileno(), 100, 8 << 20) == DATA[8 << 20 : (8 << 20) + 100]
            assert (stays / "other.txt").read_bytes() == DATA[: 1 << 20]
            assert (stays / "data.txt").read_bytes() == DATA
            with fails(2):
                os.stat(goes)
