"""The local tier: one owner, nothing believed that was not flushed, whatever instant it is killed at."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.errors import Conflict, Unavailable
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.directory import TierDirectory
from heliosfs.tiers.doubt import settle
from heliosfs.tiers.local import LocalBlob

CHUNKS = 9


def content(seed: int = 0, count: int = CHUNKS) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.randrange(1, 9000)) for _ in range(count)]


def recipe_of(chunks: list[bytes]) -> Recipe:
    blob = hashlib.sha256(b"".join(chunks)).hexdigest()
    return Recipe.build(blob, ((blake3(c).digest(), len(c)) for c in chunks))


def store(blob: LocalBlob, recipe: Recipe, chunks: list[bytes], which: list[int]) -> None:
    for index in which:
        blob.write(recipe, index, memoryview(chunks[index]))


def fill(l1: TierDirectory, chunks: list[bytes]) -> LocalBlob:
    recipe = recipe_of(chunks)
    blob = l1.blob(recipe.blob, recipe.size)
    blob.load(recipe.digest)
    store(blob, recipe, chunks, list(range(len(chunks))))
    blob.sync()
    blob.record(range(len(chunks)))
    blob.finish()
    return blob


def read(blob: LocalBlob, start: int, end: int) -> bytes:
    out = bytearray(end - start)
    blob.read_into(memoryview(out), start)
    return bytes(out)


class Crashes(RuleBasedStateMachine):
    """One blob is written, flushed, finished, and the machine goes down at any moment.

    Two ways down: the process is killed (the kernel keeps what was written) or the power fails (the disk has what was
    synced, and of everything later any part). After either, every chunk said to be there must have the right bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chunks = content()
        self.recipe = recipe_of(self.chunks)
        self.whole = b"".join(self.chunks)
        self.root = Path(tempfile.mkdtemp(prefix="helios-l1-"))
        self.l1: TierDirectory | None = None

    @initialize()
    def start(self) -> None:
        self.boot()

    def boot(self) -> None:
        self.l1 = TierDirectory("l1", self.root)
        self.blob = self.l1.blob(self.recipe.blob, self.recipe.size)
        found = self.blob.load(self.recipe.digest)
        have = found.have or bytearray(CHUNKS)
        self.here = set(range(CHUNKS)) if found.whole else {i for i, flag in enumerate(have) if flag}
        self.recorded = set(self.here)
        self.synced: set[int] = set(self.here)

    @precondition(lambda self: not self.blob.whole)
    @rule(index=st.integers(0, CHUNKS - 1))
    def write(self, index: int) -> None:
        self.blob.write(self.recipe, index, memoryview(self.chunks[index]))
        self.here.add(index)

    @precondition(lambda self: not self.blob.whole and self.blob.fd >= 0)
    @rule()
    def flush(self) -> None:
        batch = self.here - self.recorded
        self.blob.sync()
        self.synced = set(self.here)
        self.blob.record(batch)
        self.recorded |= batch

    @precondition(lambda self: not self.blob.whole and len(self.here) == CHUNKS)
    @rule()
    def finish(self) -> None:
        self.blob.finish()

    @rule()
    def kill(self) -> None:
        recorded, whole = set(self.recorded), self.blob.whole
        self.down()
        self.boot()
        assert self.here == (set(range(CHUNKS)) if whole else recorded), "a kill loses what was not recorded, no more"

    @rule(seed=st.integers(0, 1 << 30))
    def power_fails(self, seed: int) -> None:
        whole, synced = self.blob.whole, set(self.synced)
        self.down()
        rng = random.Random(seed)
        data, journal = (
            self.root / "partial" / f"{self.recipe.blob}.data",
            self.root / "partial" / f"{self.recipe.blob}.map",
        )
        if not whole and data.exists():
            with data.open("r+b") as file:
                for index in set(range(CHUNKS)) - synced:
                    start, end = self.recipe.span(index)
                    file.seek(start)
                    if rng.random() < 0.7:
                        file.write(rng.choice([b"\0" * (end - start), rng.randbytes(end - start)]))
            if rng.random() < 0.5:
                os.truncate(journal, rng.randrange(journal.stat().st_size + 1))
            elif rng.random() < 0.5:
                with journal.open("ab") as file:
                    file.write(b"\0" * rng.randrange(1, 64))
        self.boot()

    @invariant()
    def what_is_here_is_right(self) -> None:
        for index in self.here:
            start, end = self.recipe.span(index)
            assert read(self.blob, start, end) == self.chunks[index]

    @invariant()
    def only_whole_files_have_their_name(self) -> None:
        for path in self.root.glob("blobs/*/*"):
            assert path.read_bytes() == self.whole
            assert path.stat().st_mode & 0o777 == 0o444

    def down(self) -> None:
        assert self.l1 is not None
        self.blob.close()
        self.l1.close()

    def teardown(self) -> None:
        if self.l1 is not None:
            self.down()
        shutil.rmtree(self.root)


Crashes.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestCrashes = Crashes.TestCase

WRITER = """
import sys
from pathlib import Path
from tests.unit.heliosfs.test_tier_directory import content, recipe_of
from heliosfs.tiers.directory import TierDirectory
chunks = content(seed=1, count=400)
recipe = recipe_of(chunks)
l1 = TierDirectory("l1", Path(sys.argv[1]))
blob = l1.blob(recipe.blob, recipe.size)
found = blob.load(recipe.digest)
have = found.have or bytearray(400)
print("ready", flush=True)
if found.whole:
    sys.exit(0)
todo = [i for i in range(400) if not have[i]]
for at in range(0, len(todo), 5):
    for index in todo[at : at + 5]:
        blob.write(recipe, index, memoryview(chunks[index]))
    blob.sync()
    blob.record(todo[at : at + 5])
blob.finish()
"""


def test_sigkill_while_writing(tmp_path: Path) -> None:
    """A process that writes is killed over and over: what it left is right, and it gets there in the end."""
    chunks = content(seed=1, count=400)
    recipe = recipe_of(chunks)
    rng = random.Random(5)
    before = 0
    for patience in (0.02, 0.04, 0.08, 0.2, 60.0):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            process.wait(rng.uniform(patience / 2, patience))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        process.stdout.close()
        with TierDirectory("l1", tmp_path) as l1:
            blob = l1.blob(recipe.blob, recipe.size)
            found = blob.load(recipe.digest)
            have = found.have if found.have is not None else bytearray(b"\1" * 400 if found.whole else b"\0" * 400)
            for index, flag in enumerate(have):
                if flag:
                    assert read(blob, *recipe.span(index)) == chunks[index]
            blob.close()
            assert sum(have) >= before, "what was recorded stays"
            before = sum(have)
    assert code == 0
    assert found.whole


def test_one_owner(tmp_path: Path) -> None:
    with TierDirectory("l1", tmp_path / "cache"):
        with pytest.raises(Conflict, match=rf"in use by process {os.getpid()} \("):
            TierDirectory("l1", tmp_path / "cache")
    with TierDirectory("l1", tmp_path / "cache"):
        pass


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="can't be used: Not a directory"):
        TierDirectory("l1", tmp_path / "file" / "cache")


def test_a_whole_blob_is_found_again_and_counted(tmp_path: Path) -> None:
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        blob = fill(l1, chunks)
        assert read(blob, 0, recipe.size) == b"".join(chunks)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(blob.fd, b"x", 0)  # the readers' descriptor is a read-only one now
        blob.close()
        usage = l1.usage()
        assert (usage.blobs, usage.blob_bytes, usage.partials) == (1, recipe.size, 0)
        assert l1.held(recipe.blob) == (recipe.size, recipe.size, True)
    with TierDirectory("l1", tmp_path) as l1:
        assert (l1.usage().blobs, l1.usage().blob_bytes) == (1, recipe.size)
        again = l1.blob(recipe.blob, recipe.size)
        assert again.load(recipe.digest).whole
        again.close()


def test_a_partial_blob_is_counted_without_being_opened(tmp_path: Path) -> None:
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        blob = l1.blob(recipe.blob, recipe.size)
        blob.load(recipe.digest)
        store(blob, recipe, chunks, [0, 3])
        blob.sync()
        blob.record([0, 3])
        blob.close()
        assert l1.held(recipe.blob) == (len(chunks[0]) + len(chunks[3]), recipe.size, False)
        assert l1.held("f" * 64) == (0, None, False)
        assert l1.usage().partials == 1


def test_a_whole_file_of_another_size_is_fetched_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        fill(l1, chunks).close()
        path = Path(l1.whole_path(recipe.blob))
        path.chmod(0o644)
        os.truncate(path, recipe.size - 1)
        blob = l1.blob(recipe.blob, recipe.size)
        doubted = blob.load(recipe.digest).doubted
        assert doubted is l1
        assert not settle(doubted, recipe.blob)
        assert "does not have the sha256" in caplog.text
        assert not path.exists()
        found = blob.load(recipe.digest)
        assert (found.whole, found.doubted) == (False, None)
        blob.close()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_a_whole_file_stays_whatever_size_somebody_gives_it(tmp_path: Path, known: bool, right: bool) -> None:
    """Only its own bytes speak against it, by their hash."""
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        fill(l1, chunks).close()
        path, sums = Path(l1.whole_path(recipe.blob)), Path(l1.sums_path(recipe.blob))
        if not known:
            sums.unlink()
        if not right:
            path.chmod(0o644)
            os.truncate(path, recipe.size + 1)
        liar = l1.blob(recipe.blob, recipe.size + 2)
        found = liar.load("e" * 64)
        assert (found.whole, found.doubted, found.size) == (False, l1, path.stat().st_size)
        assert settle(l1, recipe.blob) is right
        assert path.exists() is right
        assert sums.exists() is right, "what was found out need not be found out again"
        liar.close()


def test_a_partial_blob_stays_until_a_recipe_speaks_against_it(tmp_path: Path) -> None:
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        honest = l1.blob(recipe.blob, recipe.size)
        honest.load(recipe.digest)
        store(honest, recipe, chunks, [0, 1])
        honest.sync()
        honest.record([0, 1])
        for size, digest in ((recipe.size, "e" * 64), (recipe.size + 1, recipe.digest)):
            liar = l1.blob(recipe.blob, size)
            assert liar.load(digest).have is None
            assert liar.disputed
            liar.close()
        honest.close()
        again = l1.blob(recipe.blob, recipe.size)
        have = again.load(recipe.digest).have
        assert have is not None
        assert sum(have) == 2
        again.close()


@pytest.mark.parametrize("damage", ["no map", "no data", "data shorter", "map garbage"])
def test_what_contradicts_itself_is_started_anew(tmp_path: Path, damage: str) -> None:
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        blob = l1.blob(recipe.blob, recipe.size)
        blob.load(recipe.digest)
        store(blob, recipe, chunks, [0, 1])
        blob.sync()
        blob.record([0, 1])
        blob.close()
    data, journal = Path(l1.data_path(recipe.blob)), Path(l1.map_path(recipe.blob))
    if damage == "no map":
        journal.unlink()
    elif damage == "no data":
        data.unlink()
    elif damage == "data shorter":
        os.truncate(data, 5)
    else:
        journal.write_bytes(b"\0" * 300)
    with TierDirectory("l1", tmp_path) as l1:
        blob = l1.blob(recipe.blob, recipe.size)
        found = blob.load(recipe.digest)
        assert found.have is None
        assert not found.whole
        assert not data.exists()
        assert not journal.exists()
        store(blob, recipe, chunks, list(range(CHUNKS)))
        assert read(blob, 0, recipe.size) == b"".join(chunks)
        blob.close()


def test_a_read_only_file_without_its_journal_is_written_anew(tmp_path: Path) -> None:
    """A kill between the last two steps of ``finish``, then a power cut that spoiled the journal."""
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        blob = l1.blob(recipe.blob, recipe.size)
        blob.load(recipe.digest)
        store(blob, recipe, chunks, list(range(CHUNKS)))
        blob.close()
        Path(l1.data_path(recipe.blob)).chmod(0o444)
        Path(l1.map_path(recipe.blob)).write_bytes(b"\0" * 100)
    with TierDirectory("l1", tmp_path) as l1:
        blob = l1.blob(recipe.blob, recipe.size)
        assert blob.load(recipe.digest).have is None
        assert not blob.sealed
        store(blob, recipe, chunks, [1])
        assert read(blob, *recipe.span(1)) == chunks[1]
        blob.close()


def test_a_late_write_after_close_harms_nobody(tmp_path: Path) -> None:
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        blob = fill(l1, chunks)
        blob.write(recipe, 0, memoryview(b"z" * len(chunks[0])))  # a given-up thread: the blob is whole already
        assert read(blob, 0, recipe.size) == b"".join(chunks)
        blob.close()
        with pytest.raises(OSError, match="was closed"):
            blob.write(recipe, 0, memoryview(chunks[0]))


def test_finish_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = content()
    recipe = recipe_of(chunks)
    with TierDirectory("l1", tmp_path) as l1:
        blob = l1.blob(recipe.blob, recipe.size)
        blob.load(recipe.digest)
        store(blob, recipe, chunks, list(range(CHUNKS)))
        with monkeypatch.context() as patch:
            patch.setattr(TierDirectory, "sync_whole", lambda self, sha256: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(OSError, match="full"):
                blob.finish()
        blob.finish()
        assert l1.usage().blobs == 1
        assert not Path(l1.map_path(recipe.blob)).exists()
        blob.close()


def test_a_whole_file_that_the_kernel_knows_is_opened_at_once_and_nothing_else_is(tmp_path: Path) -> None:
    chunks = content()
    recipe = recipe_of(chunks)
    l1 = TierDirectory("l1", tmp_path)
    assert not l1.blob(recipe.blob, recipe.size).load_at_once(recipe.digest), "there is none"
    fill(l1, chunks).close()
    blob = l1.blob(recipe.blob, recipe.size)
    assert blob.load_at_once(recipe.digest)
    assert blob.whole
    assert read(blob, 0, recipe.size) == b"".join(chunks)
    blob.close()
    other = l1.blob(recipe.blob, recipe.size + 1)
    assert not other.load_at_once(recipe.digest), "it is not the blob's size: load says so and removes it"
    path = Path(l1.whole_path(recipe.blob))
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert not l1.blob(recipe.blob, recipe.size).load_at_once(recipe.digest)
    l1.close()
