"""A blob moves from one disk to the other, and the power fails, the process dies or the disk refuses at any step."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helios.errors import IntegrityError
from heliosfs.tiers import moving
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.moving import Stopped, copy
from tests.support.durable import Shim, Step, crashes, put
from tests.support.stores import look
from tests.unit.heliosfs.test_tier_directory import content, fill, recipe_of

CHUNKS = content(seed=3)
DATA = b"".join(CHUNKS)
RECIPE = recipe_of(CHUNKS)
BLOB, SIZE = RECIPE.blob, RECIPE.size


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "BUFFER", 8192)
    monkeypatch.setattr(moving, "TELL", 8192)
    monkeypatch.setattr(
        "heliosfs.tiers.local.save_sums", lambda path, sums: 0
    )  # a cache of its own, written without us


def tiers(root: Path) -> tuple[TierDirectory, TierDirectory]:
    return TierDirectory("l1", root / "l1"), TierDirectory("l2", root / "l2")


def move(l1: TierDirectory, l2: TierDirectory) -> None:
    """What Tier.receive and the remover do to the disks."""
    copy(l2.whole_path(BLOB), l1, BLOB, SIZE, lambda cost: True)
    l1.place(BLOB, SIZE)
    assert l2.remove(BLOB) == -1


def check(root: Path) -> set[str]:
    """Start on what is there: the blob must be whole somewhere, and wherever it is whole, right; returns where."""
    l1, l2 = tiers(root)
    try:
        where = {tier.name for tier in (l1, l2) if tier.held(BLOB)[2]}
        for tier in (l1, l2):
            for path in (tier.root / "blobs").glob("*/*"):
                assert path.read_bytes() == DATA, path
            assert not list((tier.root / "partial").iterdir())
            assert set(tier.scan()) <= {BLOB}
        blob = l1.blob(BLOB, SIZE)
        assert look(blob, RECIPE.digest, l1, l2).whole
        blob.close()
        return where
    finally:
        l1.close()
        l2.close()


def test_a_power_cut_at_any_step_of_a_move(tmp_path: Path) -> None:
    root = tmp_path / "disks"
    root.mkdir()
    with Shim(root) as shim:
        l1, l2 = tiers(root)
        fill(l2, CHUNKS).close()
        begins = len(shim.log)
        move(l1, l2)
    l1.close()
    l2.close()
    found: set[frozenset[str]] = set()
    states = 0
    for done, state in crashes(shim.log, random.Random(1), 12):
        if done < begins or not {"l1", "l2"} <= state.keys():
            continue  # it is not whole yet; and a tier's directory is there, or it is no tier
        again = tmp_path / "again"
        again.mkdir()
        put(state, again)
        try:
            found.add(frozenset(check(again)))
        except BaseException as error:
            error.add_note(f"the power failed after {shim.log[done - 1]}")
            raise
        states += 1
        shutil.rmtree(again)
    assert states > 30
    assert found == {frozenset(where) for where in ({"l1"}, {"l2"}, {"l1", "l2"})}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_any_step_of_a_move(tmp_path: Path, code: int) -> None:
    """Whatever fails: the move ends with an error, the blob stays where it was, and can be moved the next time."""
    steps = _refused(tmp_path / "count", lambda step: None)
    for number in range(steps):
        root = tmp_path / str(number)
        steps_seen = 0

        def refuse(step: Step, number: int = number) -> None:
            nonlocal steps_seen
            steps_seen += 1
            if steps_seen - 1 == number:
                raise OSError(code, os.strerror(code))

        _refused(root, refuse)
        assert check(root) in ({"l1"}, {"l2"}, {"l1", "l2"})
        shutil.rmtree(root)


def _refused(root: Path, before: Callable[[Step], None]) -> int:
    """Move a blob on disks that may refuse; returns how many steps there were."""
    root.mkdir()
    l1, l2 = tiers(root)
    try:
        fill(l2, CHUNKS).close()
        count = 0

        def counted(step: Step) -> None:
            nonlocal count
            count += 1
            before(step)

        with Shim(root, counted):
            with contextlib.suppress(OSError):
                move(l1, l2)
        if not l1.held(BLOB)[2]:
            copy(l2.whole_path(BLOB), l1, BLOB, SIZE, lambda cost: True)
            l1.place(BLOB, SIZE)
        return count
    finally:
        l1.close()
        l2.close()


def test_a_copy_that_is_not_wanted_any_more_leaves_nothing(tmp_path: Path) -> None:
    l1, l2 = tiers(tmp_path)
    fill(l2, CHUNKS).close()
    told: list[int] = []

    def progress(cost: int) -> bool:
        told.append(cost)
        return len(told) < 2

    with pytest.raises(Stopped):
        copy(l2.whole_path(BLOB), l1, BLOB, SIZE, progress)
    assert told[0] > 0
    assert not list((tmp_path / "l1" / "partial").iterdir())
    l1.close()
    l2.close()


def test_what_rotted_is_not_copied(tmp_path: Path) -> None:
    l1, l2 = tiers(tmp_path)
    fill(l2, CHUNKS).close()
    path = Path(l2.whole_path(BLOB))
    path.chmod(0o644)
    path.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="other bytes"):
        copy(str(path), l1, BLOB, SIZE, lambda cost: True)
    path.write_bytes(DATA + b"x")
    with pytest.raises(IntegrityError, match="other bytes"):
        copy(str(path), l1, BLOB, SIZE, lambda cost: True)
    path.write_bytes(DATA[:-1])
    with pytest.raises(OSError, match="shorter"):
        copy(str(path), l1, BLOB, SIZE, lambda cost: True)
    assert not list((tmp_path / "l1" / "partial").iterdir())
    l1.close()
    l2.close()
