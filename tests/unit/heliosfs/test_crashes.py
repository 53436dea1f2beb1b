"""A worker is killed, loses power, or is refused by its disk at every single step that it makes there.

Here a few steps stand for all; ``scripts/soak.py --crashes`` takes every one.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.local import LocalBlob
from heliosfs.tiers.moving import copy
from tests.support import life
from tests.support.durable import Shim, Step, crashes, put
from tests.support.life import Job, Promises
from tests.support.origin import Origin
from tests.support.stores import look

EVERY = bool(os.environ.get("HELIOS_EVERY_CRASH"))
pytestmark = pytest.mark.timeout(7200 if EVERY else 300)


class Scene:
    """A server with the blobs of a life, and places to live in."""

    def __init__(self, base: Path, origin: Origin) -> None:
        self._base, self.origin = base, origin
        self.wants = life.serve(origin)
        self.recipes = {name: origin.recipe(want) for name, want in self.wants.items()}
        self._roots = 0

    def root(self) -> Path:
        """An empty node: no cache yet, beside a store."""
        self._roots += 1
        root = self._base / f"node-{self._roots}"
        root.mkdir()
        return root

    def live(self, root: Path, shim: Shim, refusing: Refusing | None = None) -> None:
        """One life under a shim."""
        life.store_near(root, self.wants)
        with shim, life.told(shim.mark):
            life.lived(root, self.origin.url, self.wants, shim.mark, refusing)

    def check(self, root: Path, promises: Promises) -> None:
        life.check(root, self.wants, promises, self.recipes)

    def start_again(self, root: Path) -> None:
        life.start_again(root, self.origin.url, self.wants)


@pytest.fixture
def scene(tmp_path: Path, origin: Origin) -> Scene:
    return Scene(tmp_path, origin)


def some(count: int, of: int) -> list[int]:
    """That many numbers below ``of``, all of them when every one is wanted."""
    return (
        list(range(of)) if EVERY else sorted({of * at // count + (7 * at) % max(1, of // count) for at in range(count)})
    )


# --- power cuts ---


def test_a_power_cut_at_any_step(scene: Scene) -> None:
    """What was flushed is there, what is there is right, pins and volumes are old or new, and work goes on."""
    shim = Shim(root := scene.root())
    scene.live(root, shim)
    rng, promises, at, states = random.Random(5), Promises(), 0, 0
    for done, state in crashes(shim.log, rng, 5 if EVERY else 1):
        for step in shim.log[at:done]:
            if step.call.startswith("#"):
                promises.take(step.call[1:], step.name, step.other)
        at = done
        states += 1
        if not EVERY and rng.random() > 0.1:
            continue
        again = scene.root()
        put(state, again)
        try:
            scene.check(again, promises)
            if states % (10 if EVERY else 200) == 0:
                scene.start_again(again)
        except BaseException as error:
            error.add_note(f"the power failed after {shim.log[done - 1]}")
            raise
        shutil.rmtree(again)
    assert states > 500


def test_an_old_journal_never_comes_back(scene: Scene) -> None:
    """A blob was whole, went, and is fetched again: no part of the power cut brings its first journal back."""
    want, shim = scene.wants["fill"], Shim(root := scene.root())
    with shim, life.told(shim.mark), TierDirectory("l1", root / "cache") as l1:
        blob = stored(scene, l1, [0, 1, 2, 3])
        blob.finish()
        blob.close()
        l1.remove(want.sha256)
        stored(scene, l1, [2]).close()
    promises, at = Promises(), 0
    for done, state in crashes(shim.log, random.Random(2), 100 if EVERY else 4):
        for step in shim.log[at:done]:
            if step.call.startswith("#"):
                promises.take(step.call[1:], step.name, step.other)
        at = done
        put(state, again := scene.root())
        scene.check(again, promises)
        shutil.rmtree(again)


def test_what_was_found_wrong_is_not_believed_again(scene: Scene) -> None:
    """A chunk that was taken out of the journal does not come back into it; the others stay."""
    want, shim = scene.wants["fill"], Shim(root := scene.root())
    with shim, TierDirectory("l1", root / "cache") as l1:
        blob = stored(scene, l1, [0, 1, 2])
        shim.mark("recorded", "")
        blob.forget([1])
        shim.mark("forgotten", "")
        blob.sync()
        blob.close()
    marks = [step.number for step in shim.log if step.call.startswith("#")]
    for done, state in crashes(shim.log, random.Random(2), 100 if EVERY else 4):
        put(state, again := scene.root())
        with TierDirectory("l1", again / "cache") as l1:
            blob = l1.blob(want.sha256, want.size)
            have = blob.load(want.recipe_digest).have
            blob.close()
            assert {path.suffix for path in (again / "cache" / "partial").iterdir()} <= {".data", ".map"}
        if done > marks[1]:
            assert have == b"\1\0\1\0", shim.log[done - 1]
        elif done > marks[0]:
            assert have in (b"\1\1\1\0", b"\1\0\1\0"), shim.log[done - 1]
        shutil.rmtree(again)


def test_a_move_to_another_tier_is_whole_at_any_step(scene: Scene) -> None:
    """The blob is in one tier or in both, whole and right; of a copy that was not done nothing is left."""
    want, data, shim = scene.wants["fill"], life.DATA["fill"], Shim(root := scene.root())
    with shim, TierDirectory("l1", root / "cache") as l1, TierDirectory("l2", root / "l2") as l2:
        blob = stored(scene, l1, [0, 1, 2, 3])
        blob.finish()
        blob.close()
        shim.mark("whole", "")
        copy(l1.whole_path(want.sha256), l2, want.sha256, want.size, lambda taken: True)
        l2.place(want.sha256, want.size)
        l1.remove(want.sha256)
    whole = next(step.number for step in shim.log if step.call == "#whole")
    for done, state in crashes(shim.log, random.Random(3), 100 if EVERY else 3):
        put(state, again := scene.root())
        found = 0
        with TierDirectory("l1", again / "cache") as l1, TierDirectory("l2", again / "l2") as l2:
            for tier in (l1, l2):
                blob = tier.blob(want.sha256, want.size)
                if look(blob, want.recipe_digest).whole:
                    found += 1
                    view = memoryview(bytearray(want.size))
                    blob.read_into(view, 0)
                    assert view == data, f"{tier.root.name} has other bytes after {shim.log[done - 1]}"
                blob.close()
                assert not list(tier.root.glob("partial/*.moving"))
        assert found or done <= whole, f"it is gone after {shim.log[done - 1]}"
        shutil.rmtree(again)


def stored(scene: Scene, l1: TierDirectory, chunks: list[int]) -> LocalBlob:
    """A blob with these chunks written, flushed and recorded."""
    want, recipe = scene.wants["fill"], scene.recipes["fill"]
    blob = l1.blob(want.sha256, want.size)
    blob.load(want.recipe_digest)
    for index in chunks:
        start, end = recipe.span(index)
        blob.write(recipe, index, memoryview(life.DATA["fill"][start:end]))
    blob.sync()
    blob.record(chunks)
    return blob


# --- kills ---


@pytest.fixture
def lives(scene: Scene) -> Iterator[subprocess.Popen[str]]:
    """A process that lives and dies in children as it is told."""
    wants = {
        name: [str(w.repo.id), w.commit, w.path, w.sha256, w.size, w.recipe_digest] for name, w in scene.wants.items()
    }
    command = [sys.executable, "-m", "tests.support.life", json.dumps(wants)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


def _lived(lives: subprocess.Popen[str], scene: Scene, at: int, after: bool) -> tuple[Path, Promises, int]:
    """A life that ends at a step; returns its disk, what it promised, and its wait status."""
    assert lives.stdin is not None
    assert lives.stdout is not None
    root = scene.root()
    life.store_near(root, scene.wants)
    lives.stdin.write(msgspec.json.encode(Job(str(root), scene.origin.url, at, after)).decode() + "\n")
    lives.stdin.flush()
    status = json.loads(lives.stdout.readline())
    promises = Promises()
    for line in Path(f"{root}.promises").read_text().splitlines():
        promises.take(*json.loads(line))
    return root, promises, status


def test_a_kill_at_any_step(scene: Scene, lives: subprocess.Popen[str]) -> None:
    root, promises, status = _lived(lives, scene, -1, False)
    assert not status
    assert promises.steps > 100
    scene.check(root, promises)
    for number, at in enumerate(some(8, promises.steps)):
        for after in (False, True) if EVERY else (bool(number % 2),):
            root, promises, status = _lived(lives, scene, at, after)
            assert status in (0, signal.SIGKILL), f"step {at}: it ended with {status}"  # 0: fewer steps this time
            scene.check(root, promises)
            if number % 4 == 0:
                scene.start_again(root)
            shutil.rmtree(root)


# --- refusals ---


class Refusing:
    """A disk that refuses what is asked of it: step ``at`` alone, or everything from there on until it is ``well``."""

    def __init__(self, at: int = -1, code: int = 0, *, once: bool = True) -> None:
        self.at, self.code, self.once = at, code, once
        self.seen, self.well, self.refused = 0, False, False

    @property
    def now(self) -> bool:
        """Whether it refuses everything now."""
        return self.refused and not self.well and not self.once

    def __call__(self, step: Step) -> int | None:
        number, self.seen = self.seen, self.seen + 1
        if self.well or self.at < 0 or number < self.at or (self.once and number > self.at):
            return None
        if number == self.at and self.code == errno.ENOSPC and step.call.endswith("write") and len(step.other) > 1:
            return len(step.other) // 2  # a full disk takes what still fits
        self.refused = True
        if self.code == errno.ENOSPC and step.call in ("unlink", "sync", "open"):
            return None  # needs no room
        if self.code == errno.EROFS and step.call == "sync":
            return None  # nothing is left to sync
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=lambda code: errno.errorcode[code])
def test_a_disk_that_refuses_any_step(scene: Scene, code: int, once: bool, expected_log_errors: object) -> None:
    """Reads go on and are right, and when the disk works again everything gets whole."""
    expected_log_errors("the cache could not be flushed")  # type: ignore[operator]
    steps = 170
    for number, at in enumerate(some(2, steps)):
        root, refusing = scene.root(), Refusing(at, code, once=once)
        try:
            scene.live(root, Shim(root, refusing), refusing)
            refusing.well = True
            if not EVERY or number % 5 == 0:
                scene.start_again(root)
        except BaseException as error:
            error.add_note(f"{errno.errorcode[code]} at step {at}{'' if once else ' and from there on'}")
            raise
        shutil.rmtree(root)
