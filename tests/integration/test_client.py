"""heliosfs.client against a real registry with real pushes: files, tensors, buffers, many threads, what goes wrong."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import heliosfs.client
from helios.embedded import running as running_embedded
from helios.errors import (
    Conflict,
    DeadlineExceeded,
    EntryNotFound,
    IntegrityError,
    InvalidInput,
    NoSpace,
    RepoNotFound,
    RevisionNotFound,
    Unavailable,
    UsageError,
)
from helios.home import Home
from heliosfs.client import aio
from tests.support.command import Command
from tests.support.damage import flip
from tests.support.mounts import mounted, push
from tests.support.registry import Running, running_registry
from tests.support.slow_link import SlowLink

MIB = 1 << 20
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@dataclass
class Site:
    """A registry with org/m (three shards and an index), and the directory it was pushed from."""

    registry: Running
    home: Home
    directory: Path
    commit: str

    def data(self, path: str) -> bytes:
        return (self.directory / path).read_bytes()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """The registry takes connections and says nothing."""
        os.kill(self.registry.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.registry.pid, signal.SIGCONT)

    def link(self, rate: float | None) -> SlowLink:
        at = urlsplit(self.registry.url)
        return SlowLink(at.hostname or "", at.port or 0, rate)


def make_model(directory: Path) -> Path:
    """Three shards with tensors of several types and shapes, an empty one and a scalar among them."""
    directory.mkdir(parents=True)
    random_ = torch.Generator().manual_seed(7)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        tensors = {
            f"layers.{number}.{n}": torch.randn((700 + n, 1024), generator=random_).to(kinds[n % 4]) for n in range(6)
        }
        tensors[f"norm.{number}"] = torch.randn(33, generator=random_)
        tensors[f"none.{number}"] = torch.empty((0, 5))
        tensors[f"scale.{number}"] = torch.tensor(number, dtype=torch.int64)
        save_file(tensors, directory / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "empty.txt").write_bytes(b"")
    (directory / "sub").mkdir()
    (directory / "sub" / "notes.md").write_text("notes")
    return directory


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("client")
    helios = Command(root / "home")
    directory = make_model(root / "m")
    with running_registry(helios) as registry:
        commit = helios("push", str(directory), "org/m")
        yield Site(registry, Home(root / "home"), directory, commit)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure shows soon."""
    monkeypatch.setenv("HELIOS_MOUNT__REQUEST_DEADLINE_S", "1.5")


@pytest.fixture
def store(site: Site, tmp_path: Path) -> Iterator[heliosfs.client.Store]:
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path / "own") as store:
        yield store


# --- files ---


def test_files_are_what_was_pushed(site: Site, store: heliosfs.client.Store) -> None:
    model = store.resolve("org/m@main")
    assert model.commit == site.commit == store.resolve(f"org/m@{site.commit}").commit
    on_disk = {str(p.relative_to(site.directory)): p for p in site.directory.rglob("*") if p.is_file()}
    assert set(model.files) == set(on_disk)
    assert list(model.files)[-3:] == SHARDS, "weights come last, in loading order"
    assert model.size == sum(path.stat().st_size for path in on_disk.values())
    for path in model.files:
        with model.open(path) as file:
            assert file.size == model.files[path].size == on_disk[path].stat().st_size
            assert file.read() == on_disk[path].read_bytes()
            assert file.read(file.size) == b""
            assert file.read(file.size + 5, 10) == b""


def test_a_model_stays_at_its_commit(site: Site, store: heliosfs.client.Store, tmp_path: Path) -> None:
    helios = Command(site.home.root)
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "a.txt").write_text("one")
    first = helios("push", str(tmp_path / "v1"), "org/moves")
    model = store.resolve("org/moves")
    (tmp_path / "v1" / "a.txt").write_text("two")
    second = helios("push", str(tmp_path / "v1"), "org/moves")
    with model.open("a.txt") as file:
        assert file.read() == b"one"
    assert (model.commit, store.resolve("org/moves").commit) == (first, second), "and a name is asked for anew"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_read_gives_the_files_bytes(cold: heliosfs.client.File, site: Site, data: st.DataObject) -> None:
    """While the file is fetched, and after."""
    expected = site.data(cold.path)
    offset = data.draw(st.integers(0, len(expected) + 10))
    size = data.draw(st.sampled_from([0, 1, 7, 4096, 300_000, MIB + 1]) | st.integers(0, 2 * len(expected)))
    buffer = bytearray(b"\xaa" * size)
    count = cold.read_into(memoryview(buffer), offset)
    assert buffer[:count] == expected[offset : offset + size]
    assert buffer[count:] == b"\xaa" * (size - count), "what the file does not reach is left alone"


@pytest.fixture(scope="module")
def cold(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[heliosfs.client.File]:
    """A file behind a slow link, not local when the test begins."""
    with (
        site.link(12e6) as link,
        heliosfs.client.connect(registry=link.url, home=tmp_path_factory.mktemp("cold")) as store,
        store.resolve("org/m").open(SHARDS[0]) as file,
    ):
        assert not file.status().complete
        yield file


def test_buffers_of_every_kind(site: Site, store: heliosfs.client.Store) -> None:
    expected = site.data(SHARDS[1])
    with store.resolve("org/m").open(SHARDS[1]) as file, mmap.mmap(-1, 5000) as mapped:
        for local in (False, True):
            array = np.zeros((25, 50), np.float32)
            assert file.read_into(array, 100) == 5000
            assert array.tobytes() == expected[100:5100]
            odd = np.zeros(500, np.dtype([("a", "<u2"), ("b", "<f8")]))
            assert file.read_into(odd, 7) == 5000
            assert odd.tobytes() == expected[7:5007]
            assert file.read_into(mapped, 1) == 5000
            assert mapped[:] == expected[1:5001]
            tensor = torch.zeros(1250, dtype=torch.bfloat16)
            assert file.read_into(tensor.view(torch.uint8).numpy(), 3) == 2500
            assert tensor.view(torch.uint8).numpy().tobytes() == expected[3:2503]
            assert file.read_into(bytearray(), 5) == 0
            assert file.read_into(np.zeros((0, 4)), 5) == 0
            for buffer, why in [
                (bytes(10), "read-only"),
                (np.zeros((10, 10))[:, ::2], "not contiguous"),
                (np.zeros((10, 10), order="F"), "not contiguous"),
                (tensor, "no buffer"),
                (5, "no buffer"),
            ]:
                with pytest.raises(TypeError, match=why):
                    file.read_into(buffer)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="negative"):
                file.read_into(bytearray(5), -1)
            with pytest.raises(ValueError, match="negative"):
                file.read(0, -1)
            assert file.status().complete == local or not local
            file.fetch()


def test_a_whole_file_is_a_file_on_the_disk(site: Site, store: heliosfs.client.Store) -> None:
    with store.resolve("org/m").open("config.json") as file, store.resolve("org/m").open("empty.txt") as empty:
        assert file.local_path is None
        with pytest.raises(Unavailable, match="not all local yet"):
            file.fileno()
        file.fetch()
        assert file.local_path is not None
        assert file.local_path.read_bytes() == site.data("config.json")
        assert os.pread(file.fileno(), 100, 0) == site.data("config.json")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(file.fileno(), b"x")
        empty.fetch()
        assert empty.read() == b""
        assert empty.status().complete


# --- tensors ---


def expected_tensors(site: Site) -> dict[str, torch.Tensor]:
    out = {}
    for shard in SHARDS:
        with safe_open(site.directory / shard, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_equal_those_of_safe_open(site: Site, store: heliosfs.client.Store) -> None:
    expected = expected_tensors(site)
    with store.resolve("org/m").tensors() as tensors:
        assert set(tensors) == set(expected)
        assert len(tensors) == len(expected)
        spans = [(tensors[name].file, tensors[name].offset) for name in tensors]
        assert spans == sorted(spans), "iteration is in file order"
        for name, want in expected.items():
            info = tensors[name]
            assert info.nbytes == want.nbytes
            assert info.shape == tuple(want.shape)
            assert same(tensors.torch(name), want)
            assert bytes(tensors.read(name)) == raw(want)
            buffer = bytearray(b"\xaa" * (info.nbytes + 3))
            assert tensors.read_into(name, buffer) == info.nbytes
            assert buffer == raw(want) + b"\xaa" * 3
            with safe_open(site.directory / info.file, "np") as file:
                if info.dtype in ("F32", "F16", "I64"):
                    np.testing.assert_array_equal(tensors.numpy(name), file.get_tensor(name))
        with pytest.raises(ValueError, match="has 132 bytes, the buffer 10"):
            tensors.read_into("norm.0", bytearray(10))
        with pytest.raises(EntryNotFound, match="no tensor 'nope'"):
            tensors.read("nope")


@pytest.mark.parametrize("ahead", [0, 3 * MIB, 1 << 40])
def test_a_stream_gives_every_tensor_in_order(site: Site, store: heliosfs.client.Store, ahead: int) -> None:
    expected = expected_tensors(site)
    held = most = 0

    def allocate(info: heliosfs.client.TensorInfo) -> bytearray:
        nonlocal held, most
        held += info.nbytes
        most = max(most, held)
        return bytearray(info.nbytes)

    with store.resolve("org/m").tensors() as tensors:
        seen = []
        for info, data in tensors.stream(ahead_bytes=ahead, allocate=allocate):
            assert bytes(data) == raw(expected[info.name])
            seen.append(info.name)
            held -= info.nbytes
        assert seen == list(tensors)
        largest = max(info.nbytes for info in tensors.values())
        assert most <= ahead + 2 * largest
        some = [info.name for info, _ in tensors.stream(["norm.2", "norm.0"])]
        assert some == ["norm.2", "norm.0"]
        with pytest.raises(EntryNotFound):
            next(tensors.stream(["nope"]))
        started = tensors.stream()
        next(started)
        started.close()


def test_which_files_hold_tensors(site: Site, store: heliosfs.client.Store, tmp_path: Path) -> None:
    model = store.resolve("org/m")
    with model.tensors(SHARDS[:1]) as tensors:
        assert {info.file for info in tensors.values()} == set(SHARDS[:1])
    with model.tensors(["*-00002-of-*"]) as tensors:
        assert {info.file for info in tensors.values()} == set(SHARDS[1:2])
    with pytest.raises(EntryNotFound, match="no safetensors file in sub/"):
        model.tensors(folder="sub")
    helios = Command(site.home.root)
    odd = tmp_path / "odd"
    (odd / "unet").mkdir(parents=True)
    save_file({"a": torch.zeros(3)}, odd / "unet" / "x.safetensors")
    save_file({"a": torch.zeros(3)}, odd / "a.safetensors")
    save_file({"a": torch.ones(3)}, odd / "b.safetensors")
    (odd / "unet" / INDEX).write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    helios("push", str(odd), "org/odd")
    odds = store.resolve("org/odd")
    with pytest.raises(InvalidInput, match=r"the tensor 'a' is in a.safetensors and in b.safetensors"):
        odds.tensors()
    with pytest.raises(InvalidInput, match=r"says that the tensor 'b' is in unet/x.safetensors, but it is not there"):
        odds.tensors(folder="unet")
    with odds.tensors(["b.safetensors"]) as tensors:
        assert same(tensors.torch("a"), torch.ones(3))
    assert store.status().open_files == 0, "what failed left nothing open"


# --- warm ---


def test_a_warm_model_needs_no_registry(site: Site, tmp_path: Path) -> None:
    told: list[heliosfs.client.WarmProgress] = []
    threads = set()

    def progress(now: heliosfs.client.WarmProgress) -> None:
        told.append(now)
        threads.add(threading.current_thread())

    with site.link(60e6) as link:
        with heliosfs.client.connect(registry=link.url, home=tmp_path) as store:
            model = store.resolve("org/m")
            done = model.warm(progress=progress)
            assert (done.files, done.bytes, done.found_bytes) == (len(model.files), model.size, 0)
            assert all(status.complete for status in model.status())
            assert model.warm().found_bytes == model.size
            assert store.status().blob_bytes == model.size
        assert threads == {threading.main_thread()}
        assert len(told) > 2
        counts = [(now.bytes_done, now.files_done) for now in told]
        assert counts == sorted(counts)
        assert (told[-1].bytes_done, told[-1].files_done) == (model.size, len(model.files))
        passed = link.passed
        assert passed < 1.05 * model.size + 100_000
    with heliosfs.client.connect(registry="http://127.0.0.1:1", home=tmp_path) as store:
        model = store.resolve("org/m")
        assert not store.status().registry_answers
        for path in model.files:
            with model.open(path) as file:
                assert file.read() == site.data(path)


def test_some_files_can_be_warmed(store: heliosfs.client.Store) -> None:
    model = store.resolve("org/m")
    assert model.warm(["*.json", "sub/notes.md"]).files == 3
    whole = {status.path for status in model.status() if status.complete}
    assert whole == {"config.json", INDEX, "sub/notes.md", "empty.txt"}
    with pytest.raises(EntryNotFound, match=r"has no file 'conifg.json'\nDid you mean config.json"):
        model.warm(["conifg.json"])
    with pytest.raises(TypeError, match="not one text"):
        model.warm("config.json")


def test_what_progress_raises_ends_the_warming(site: Site, tmp_path: Path) -> None:
    def progress(_: heliosfs.client.WarmProgress) -> None:
        raise RuntimeError("enough")

    with site.link(5e6) as link, heliosfs.client.connect(registry=link.url, home=tmp_path) as store:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="enough"):
            store.resolve("org/m").warm(progress=progress)
        assert time.monotonic() - start < 5


# --- many at once ---


def test_many_threads_share_a_store_and_one_fetch(site: Site, tmp_path: Path) -> None:
    problems: list[object] = []
    with site.link(None) as link, heliosfs.client.connect(registry=link.url, home=tmp_path) as store:
        model = store.resolve("org/m")
        shared = {path: model.open(path) for path in SHARDS}
        content = {path: site.data(path) for path in SHARDS}

        def work(seed: int) -> None:
            own = random.Random(seed)
            try:
                for _ in range(30):
                    path = own.choice(SHARDS)
                    offset = own.randrange(len(content[path]))
                    size = own.choice([10, 5000, 200_000, 3 * MIB])
                    if own.random() < 0.2:
                        with store.resolve("org/m").open(path) as file:
                            got = file.read(offset, size)
                    else:
                        got = shared[path].read(offset, size)
                    if got != content[path][offset : offset + size]:
                        problems.append((path, offset, size))
            except Exception as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert problems == []
        assert link.passed < 1.1 * sum(map(len, content.values())) + 200_000, "every chunk came once"


# --- what goes wrong ---


def test_unknown_names_say_what_is_known(store: heliosfs.client.Store) -> None:
    with pytest.raises(RepoNotFound, match="no models/org/nope"):
        store.resolve("org/nope")
    with pytest.raises(RevisionNotFound, match=r"no ref 'v9'; it has main"):
        store.resolve("org/m@v9")
    with pytest.raises(RevisionNotFound, match="no commit 0000"):
        store.resolve("org/m@" + "0" * 40)
    for bad in ("", "a/b/c", "org/m@", "org/../m"):
        with pytest.raises(InvalidInput):
            store.resolve(bad)
    with pytest.raises(EntryNotFound, match=r"no file 'config.jso'\nDid you mean config.json"):
        store.resolve("org/m").open("config.jso")


def test_a_wrong_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOS_MOUNT__CASHE", "/x")
    with pytest.raises(UsageError, match=r"mount\.cashe"):
        heliosfs.client.connect(home=tmp_path)


def test_a_registry_that_is_away(tmp_path: Path) -> None:
    with heliosfs.client.connect(registry="http://127.0.0.1:1", home=tmp_path) as store:
        start = time.monotonic()
        with pytest.raises(Unavailable, match=r"org/m can't be resolved: .*127\.0\.0\.1:1") as caught:
            store.resolve("org/m")
        assert "HELIOS_REGISTRY__URLS" in str(caught.value)
        assert time.monotonic() - start < 15


def test_a_corrupt_chunk_is_never_delivered(
    site: Site, tmp_path: Path, expected_log_errors: Callable[[str], None]
) -> None:
    expected_log_errors("a chunk is corrupt")
    directory = tmp_path / "m"
    directory.mkdir()
    data = random.Random(3).randbytes(13 * MIB)
    (directory / "w.bin").write_bytes(data)
    Command(site.home.root)("push", str(directory), "org/damaged")
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path / "own") as store:
        model = store.resolve("org/damaged")
        stored = next(p for p in site.home.store.rglob(model.files["w.bin"].sha256) if p.is_file())
        site.registry.expect_errors(f"a chunk in the store is damaged.*{model.files['w.bin'].sha256}")
        flip(stored, 5 * MIB)
        with model.open("w.bin") as file:
            for call in (lambda: file.read(5 * MIB, 10), lambda: file.read(), lambda: model.warm()):
                with pytest.raises(IntegrityError, match=r"w\.bin at byte \d+: .*corrupt"):
                    call()
            assert file.read(0, 1000) == data[:1000], "the rest can be read"
            assert file.read(13 * MIB - 9) == data[-9:]
            flip(stored, 5 * MIB)
            assert file.read() == data


@pytest.mark.usefixtures("quick")
def test_a_deadline_ends_a_read_and_leaves_the_buffer_alone(site: Site, tmp_path: Path) -> None:
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path) as store:
        model = store.resolve("org/m")
        file, other = model.open("config.json"), model.open("sub/notes.md")
        buffer = bytearray(b"\xaa" * 1000)
        with site.hanging():
            start = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=r"a read at byte 0 was not done within 0\.3 s"):
                file.read_into(buffer, deadline_s=0.3)
            assert time.monotonic() - start < 1.3
            with pytest.raises(DeadlineExceeded):
                model.warm(deadline_s=0.2)
            with pytest.raises(Unavailable):  # without one it is the sources'
                other.read()
            assert time.monotonic() - start < 12
        assert file.read() == site.data("config.json")
        assert buffer == b"\xaa" * 1000, "nothing came late"


@pytest.mark.usefixtures("quick")
def test_the_registry_is_killed_in_the_middle(tmp_path: Path) -> None:
    helios = Command(tmp_path / "home")
    directory = make_model(tmp_path / "m")
    with running_registry(helios) as registry:
        helios("push", str(directory), "org/m")
        site = Site(registry, Home(helios.home), directory, "")
        with site.link(4e6) as link, heliosfs.client.connect(registry=link.url, home=tmp_path / "own") as store:
            model = store.resolve("org/m")
            with model.open(SHARDS[2]) as file:
                assert file.read(0, 100) == site.data(SHARDS[2])[:100]
                threading.Timer(0.3, registry.kill).start()
                start = time.monotonic()
                with pytest.raises(Unavailable, match=SHARDS[2]):
                    file.read()
                assert time.monotonic() - start < 15
                assert file.read(0, 100) == site.data(SHARDS[2])[:100], "what is here stays readable"
                link.throttle.rate = None
                with running_registry(helios) as again:
                    at = urlsplit(again.url)
                    link.retarget(at.hostname or "", at.port or 0)
                    assert file.read() == site.data(SHARDS[2])
                    model.warm()


def test_an_embedded_registry_that_was_killed_comes_back(helios: Any, helios_home: Home, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    helios("push", directory, "org/m")
    with heliosfs.client.connect() as store:
        model = store.resolve("org/m")
        record = running_embedded(helios_home)
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        assert model.warm().bytes == model.size
        assert store.resolve("org/m").commit == model.commit


def test_a_full_disk_is_said_to_be_full(site: Site, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("mounting a small disk needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], check=True)
    try:
        with heliosfs.client.connect(registry=site.registry.url, home=tmp_path / "own", cache=small) as store:
            model = store.resolve("org/m")
            with model.open(SHARDS[0]) as file:
                assert file.read() == site.data(SHARDS[0]), "it can be read nevertheless"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_ctrl_c_ends_the_call_it_interrupts(site: Site, tmp_path: Path) -> None:
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path) as store:
        model = store.resolve("org/m")
        with model.open("config.json") as file:
            with site.hanging():
                for call in (file.read, model.warm, lambda: model.warm(progress=lambda _: None)):
                    threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
                    start = time.monotonic()
                    with pytest.raises(KeyboardInterrupt):
                        call()
                    assert time.monotonic() - start < 20, "not before its deadline"
            assert file.read() == site.data("config.json"), "the store lives on"


def loops() -> set[threading.Thread]:
    """The clients' own threads."""
    return {thread for thread in threading.enumerate() if thread.name == "helios-client"}


def test_close_ends_everything(site: Site, tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path / "first") as store:
        store.resolve("org/m").warm()  # what Python and trio keep for good is open now
    before, threads = descriptors(), loops()
    with site.link(300_000) as link:
        store = heliosfs.client.connect(registry=link.url, home=tmp_path / "own")
        model = store.resolve("org/m")
        file, small = model.open(SHARDS[0]), model.open("config.json")
        small.fetch()
        caught: list[BaseException] = []

        def read() -> None:
            try:
                file.read()
            except BaseException as error:
                caught.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.2)
        start = time.monotonic()
        store.close()
        store.close()
        reader.join(10)
        assert time.monotonic() - start < 10
    assert isinstance(caught[0], heliosfs.client.Closed)
    assert loops() == threads
    for call in (
        store.status,
        lambda: store.resolve("org/m"),
        file.read,
        lambda: model.open("config.json"),
        small.read,
    ):
        with pytest.raises(heliosfs.client.Closed):
            call()
    file.close()
    small.close()
    end = time.monotonic() + 10
    while descriptors() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert descriptors() <= before


def script(home: Path, text: str, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
    """Run a program with HELIOS_HOME set."""
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", textwrap.dedent(text)],
        env={**os.environ, "HELIOS_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_a_program_that_forgets_to_close_ends(site: Site, tmp_path: Path) -> None:
    done = script(
        tmp_path,
        f"""
        import sys
        sys.modules["pyfuse3"] = sys.modules["torch"] = sys.modules["numpy"] = None  # as if not installed
        import heliosfs.client
        store = heliosfs.client.connect(registry={site.registry.url!r})
        model = store.resolve("org/m")
        file = model.open({SHARDS[0]!r})
        print(len(file.read(0, 100)))
        """,
    )
    assert (done.returncode, done.stdout) == (0, "100\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_is_dropped_says_so(site: Site, tmp_path: Path) -> None:
    before = loops()
    store = heliosfs.client.connect(registry=site.registry.url, home=tmp_path)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del store
    end = time.monotonic() + 10
    while loops() != before and time.monotonic() < end:
        time.sleep(0.02)
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path) as store:
        assert store.status().own_cache, "it gave the cache up"


def test_a_fork_must_connect_again(site: Site, tmp_path: Path) -> None:
    done = script(
        tmp_path,
        f"""
        import os, heliosfs.client
        with heliosfs.client.connect(registry={site.registry.url!r}) as store:
            pid = os.fork()
            if not pid:
                try:
                    store.status()
                except heliosfs.client.Closed as error:
                    os.write(1, str(error).encode())
                os._exit(0)
            os.waitpid(pid, 0)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "opened in another process" in done.stdout
    assert "connect() again" in done.stdout


# --- beside others ---


def test_a_second_client_shares_both_tiers(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOS_MOUNT__CACHE_LIMIT_GIB", "0.000001")  # L1 has room for nothing
    monkeypatch.setenv("HELIOS_MOUNT__L2", str(tmp_path / "l2"))
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path) as first:
        first.resolve("org/m").warm(["*.safetensors"])
        assert first.status().blobs == len(SHARDS)
        with site.link(None) as link, heliosfs.client.connect(registry=link.url, home=tmp_path) as second:
            model = second.resolve("org/m")
            for path in SHARDS:
                with model.open(path) as file:
                    assert file.read() == site.data(path)
                    assert file.local_path is not None
                    assert file.local_path.is_relative_to(tmp_path / "l2" / "blobs")
            assert link.passed < 100_000, "only names were asked for"


def test_a_second_client_shares_what_the_first_has(site: Site, tmp_path: Path) -> None:
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path) as first:
        first.resolve("org/m").warm(["*.safetensors"])
        with site.link(None) as link, heliosfs.client.connect(registry=link.url, home=tmp_path) as second:
            status = second.status()
            assert not status.own_cache
            assert status.shared == first.status().cache
            assert status.cache == tmp_path / "cache" / "clients" / "0"
            model = second.resolve("org/m")
            for path in SHARDS:
                with model.open(path) as file:
                    assert file.read() == site.data(path)
                    assert file.local_path is not None
                    assert file.local_path.is_relative_to(first.status().cache / "blobs")
            assert {s.path for s in model.status() if s.complete} == {*SHARDS, "empty.txt"}
            assert link.passed < 100_000, "only names were asked for"
            late = model.open("config.json")
            with pytest.raises(Unavailable):
                late.fileno()
            first.resolve("org/m").warm()
            time.sleep(0.2)  # it is looked for now and then
            assert late.read() == site.data("config.json")
            assert late.local_path is not None
            assert late.local_path.is_relative_to(tmp_path / "cache" / "blobs"), "the other made it whole meanwhile"
            assert model.warm().found_bytes == model.size
            assert second.status().blobs == 0
        with pytest.raises(Conflict, match="in use by process"):
            heliosfs.client.connect(registry=site.registry.url, home=tmp_path / "x", cache=tmp_path / "cache")
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path) as store:
        assert store.status().own_cache


@pytest.mark.fuse
def test_a_client_reads_through_the_mount_that_has_the_cache(helios_home: Home, tmp_path: Path, helios: Any) -> None:
    directory = make_model(tmp_path / "m")
    push(helios_home, directory, "org/m")
    push(helios_home, directory, "solo")
    with mounted(helios_home, tmp_path / "mnt") as mount, heliosfs.client.connect() as store:
        assert store.status().mountpoint == mount.path
        for spec in ("org/m", "solo"):
            model = store.resolve(spec)
            for path in model.files:
                with model.open(path) as file:
                    assert file.read() == (directory / path).read_bytes()
        model.warm()
        assert store.status().blobs == 0, "the mount keeps them, for both"
        assert all(status.complete for status in model.status())
        with model.open(SHARDS[0]) as file:
            assert file.local_path is not None
            assert file.local_path.is_relative_to(helios_home.cache / "blobs")


@pytest.mark.fuse
def test_a_mount_that_goes_leaves_its_clients_reading(helios_home: Home, tmp_path: Path, helios: Any) -> None:
    directory = make_model(tmp_path / "m")
    push(helios_home, directory, "org/m")
    with mounted(helios_home, tmp_path / "mnt") as mount, heliosfs.client.connect() as store:
        model = store.resolve("org/m")
        with model.open("config.json") as file:
            assert store.status().blobs == 0
            helios("umount", mount.path)
            assert file.read() == (directory / "config.json").read_bytes()
            file.fetch()
            assert store.status().blobs == 1, "it was fetched into the client's own cache"
        model.warm()


# --- trio ---


@pytest.mark.trio
async def test_the_same_on_trio(site: Site, tmp_path: Path) -> None:
    expected = expected_tensors(site)
    async with aio.connect(registry=site.registry.url, home=tmp_path) as store:
        model = await store.resolve("org/m")
        told: list[heliosfs.client.WarmProgress] = []
        assert (await model.warm(progress=told.append)).bytes == model.size
        assert told[-1].bytes_done == model.size
        async with model.tensors() as tensors:
            async with tensors.stream(ahead_bytes=3 * MIB) as stream:
                seen = [(info.name, bytes(data)) async for info, data in stream]
            assert seen == [(name, raw(expected[name])) for name in tensors]
            assert same(await tensors.torch("layers.1.1"), expected["layers.1.1"])
            np.testing.assert_array_equal(await tensors.numpy("norm.1"), expected["norm.1"].numpy())
        async with await model.open(SHARDS[0]) as file:
            buffer = bytearray(file.size)
            assert await file.read_into(buffer) == file.size
            assert buffer == site.data(SHARDS[0])
        with pytest.raises(heliosfs.client.Closed):
            await file.read()
        assert (await store.status()).open_files == 0


@pytest.mark.trio
async def test_errors_leave_blocks_as_they_are(site: Site, tmp_path: Path) -> None:
    """Not in a group, though tasks run behind the block."""
    with pytest.raises(EntryNotFound):
        async with aio.connect(registry=site.registry.url, home=tmp_path) as store:
            await (await store.resolve("org/m")).open("nope")
    async with aio.connect(registry=site.registry.url, home=tmp_path) as store:
        async with (await store.resolve("org/m")).tensors() as tensors:

            async def fail() -> None:
                async with tensors.stream() as stream:
                    async for _ in stream:
                        raise KeyError("mine")

            with pytest.raises(KeyError, match="mine"):
                await fail()


@pytest.mark.trio
async def test_a_cancelled_read_ends_at_once(site: Site, tmp_path: Path) -> None:
    async with aio.connect(registry=site.registry.url, home=tmp_path) as store:
        async with await (await store.resolve("org/m")).open("config.json") as file:
            with site.hanging():
                start = trio.current_time()
                with trio.move_on_after(0.2) as scope:
                    await file.read()
                assert scope.cancelled_caught
                assert trio.current_time() - start < 2
            assert await file.read() == site.data("config.json")


def test_nothing_is_kept_on_a_disk_without_room(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid():
        pytest.skip("mounting a small disk needs root")
    monkeypatch.setattr("heliosfs.client.file.SETTLE_S", 1.0)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], check=True)
    try:
        with heliosfs.client.connect(registry=site.registry.url, home=tmp_path / "own", cache=small) as store:
            with pytest.raises(NoSpace, match=r"is full or can't be written\nFree some space there"):
                store.resolve("org/m").warm()
    finally:
        subprocess.run(["umount", str(small)], check=True)
