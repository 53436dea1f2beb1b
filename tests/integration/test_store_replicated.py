"""A store in several directories: disks that go read-only, fill up, are pulled out and come back; bytes that rot."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from helios.config import RegistrySettings
from helios.errors import IntegrityError, NoSpace, NotFound, Unavailable, UsageError
from helios.home import Home
from heliosfs.store import mending, pack
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import blob_key, pack_key
from heliosfs.store.opening import open_objects
from heliosfs.store.replicated import ReplicatedStore
from tests.support.disks import LoopDisk, fail, fill_up, loop_disk, small_disk
from tests.support.engines import read, staged
from tests.support.mounts import mounted, write
from tests.support.registry import Running, running_registry


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mending, "LOOK_S", 0.1)
    monkeypatch.setattr(mending, "LONGEST_S", 0.3)


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    return [tmp_path / "one", tmp_path / "two", tmp_path / "three"]


def blob(seed: int, size: int = 100_000) -> tuple[str, bytes]:
    data = random.Random(seed).randbytes(size)
    return blob_key("public", hashlib.sha256(data).hexdigest()), data


def put(store: ReplicatedStore, seed: int, size: int = 100_000) -> tuple[str, bytes]:
    key, data = blob(seed, size)
    store.put_file(key, staged(store, data))
    return key, data


def whole(store: ReplicatedStore) -> bool:
    return not store.problems()


def tampered(path: Path, at: int = 5) -> None:
    """Change a bit and nothing else."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o444)


def open_below(directory: Path) -> list[str]:
    """Files below the directory that this process has open."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except FileNotFoundError:
            continue
    return [link for link in links if link.startswith(f"{directory}/")]


def test_every_directory_has_everything(roots, wait_for) -> None:
    with ReplicatedStore(roots) as store:
        wait_for(lambda: whole(store))
        key, data = put(store, 1)
        store.put_bytes("public/a/1", b"one")
        store.put_bytes("public/a/2", b"two")
        store.delete("public/a/2")
        inodes = {(root / key).stat().st_ino for root in roots}
        assert len(inodes) == 3, "copies, not names of one"
        for root in roots:
            assert (root / key).read_bytes() == data
            assert (root / "public/a/1").read_bytes() == b"one"
            assert not (root / "public/a/2").exists()
    with DirectoryStore(roots[1]) as alone:
        assert read(alone, key) == data, "each is a store that can be used alone"


def test_a_store_gets_copies_later(roots, wait_for) -> None:
    with DirectoryStore(roots[0]) as store:
        store.put_bytes("public/a/1", b"one")
    with ReplicatedStore(roots) as store:
        store.put_bytes("public/a/2", b"two")
        wait_for(lambda: whole(store))
    for root in roots:
        assert [(root / f"public/a/{n}").read_bytes() for n in (1, 2)] == [b"one", b"two"]


@pytest.mark.parametrize("which", [0, 1])
def test_damage_is_healed_from_a_good_copy(roots, which, wait_for, expected_log_errors) -> None:
    expected_log_errors("a copy is damaged")
    with ReplicatedStore(roots[:2]) as store:
        wait_for(lambda: whole(store))
        key, data = put(store, 1)
        tampered(roots[which] / key)
        good = {"calls": 0}

        def check(found: memoryview) -> bool:
            good["calls"] += 1
            return found == data[:100]

        assert store.heal(key, 0, 100, check)
        assert read(store, key) == data, "at once"
        wait_for(lambda: whole(store))
        assert (roots[which] / key).read_bytes() == data
        assert (roots[which] / key).stat().st_mode & 0o777 == 0o444
        for root in roots[:2]:
            tampered(root / key)
        assert not store.heal(key, 0, 100, check), "none is good"
        assert whole(store), "so none is thrown away"


def test_a_damaged_copy_is_no_source_of_repair(roots, wait_for, expected_log_errors) -> None:
    """Packs know their chunks, other objects their name: what is copied over is checked first."""
    expected_log_errors("a copy is damaged")
    with ReplicatedStore(roots) as store:
        wait_for(lambda: whole(store))
        key, data = put(store, 1)
        chunk = os.urandom(1000)
        from blake3 import blake3

        entry = pack.PackEntry(blake3(chunk).digest(), pack.HEAD_SIZE, len(chunk), len(chunk))
        packed, pack_at = pack.head() + chunk + pack.tail([entry]), pack_key("public", "0" * 32)
        store.put_file(pack_at, staged(store, packed))
        for each, there in ((key, data), (pack_at, packed)):
            tampered(roots[0] / each, 40)
            (roots[1] / each).unlink()
            store.tidy()
            wait_for(lambda: whole(store))
            assert [(root / each).read_bytes() == there for root in roots] == [True, True, True]


def test_a_missing_copy_is_found_by_reading_and_by_looking(roots, wait_for) -> None:
    with ReplicatedStore(roots[:2]) as store:
        wait_for(lambda: whole(store))
        first, data = put(store, 1)
        second, _ = put(store, 2)
        (roots[0] / first).unlink()
        assert read(store, first) == data
        wait_for(lambda: (roots[0] / first).exists())
        (roots[1] / second).unlink()
        assert store.tidy() == 1
        wait_for(lambda: (roots[1] / second).exists())
        assert store.tidy() == 0


@pytest.fixture
def disk(tmp_path: Path):
    (tmp_path / "loop").mkdir()
    with loop_disk(tmp_path / "loop", 32) as found:
        found.unmount()
        found.mount("-o", "errors=remount-ro")
        yield found


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("how", ["read-only", "full"])
def test_a_disk_that_takes_nothing_stops_no_writes(tmp_path: Path, disk: LoopDisk, first, how, wait_for) -> None:
    sick, well = disk.path / "store", tmp_path / "well"
    with ReplicatedStore([sick, well] if first else [well, sick]) as store:
        wait_for(lambda: whole(store))
        before, data = put(store, 1)
        gone, _ = put(store, 2)
        if how == "read-only":
            fail(disk.path)
            trash = None
        else:
            trash = fill_up(disk.path)
        key, later = blob(3)
        for attempt in range(2):  # where it was staged on the sick disk the first one fails, and says so
            try:
                store.put_file(key, staged(store, later))
                break
            except (OSError, Unavailable, NoSpace):
                assert attempt == 0
        store.put_bytes("public/a/1", b"one")
        store.delete(gone)
        assert any(str(sick) in problem for problem in store.problems())
        assert (read(store, key), read(store, before), read(store, "public/a/1")) == (later, data, b"one")
        with pytest.raises(NotFound):
            store.info(gone)
        assert str(sick) in json.loads((well / ".replicas").read_bytes())["behind"]
        if trash is None:
            wait_for(lambda: not open_below(disk.path), what="letting the disk go")
            disk.unmount()
            disk.mount()
        else:
            trash.unlink()
        wait_for(lambda: whole(store), timeout_s=20)
        assert (sick / key).read_bytes() == later
        assert not (sick / gone).exists(), "what was removed meanwhile does not come back"
        assert json.loads((well / ".replicas").read_bytes())["behind"] == []


def test_a_disk_that_is_pulled_out_and_comes_back(tmp_path: Path, disk: LoopDisk, wait_for) -> None:
    sick, well = disk.path / "store", tmp_path / "well"
    with ReplicatedStore([sick, well]) as store:
        wait_for(lambda: whole(store))
        before, data = put(store, 1, 3_000_000)
        disk.pull_out()
        buffer = bytearray(len(data))
        store.read_into(before, 0, memoryview(buffer))
        assert buffer == data
        with ExitStack() as stack:
            key, later = blob(2)
            path = tmp_path / "elsewhere"
            path.write_bytes(later)
            store.put_file(key, path)
            assert read(store, key) == later
            wait_for(lambda: not open_below(disk.path), what="letting the disk go")
            stack.callback(disk.mount)
            disk.unmount()
        wait_for(lambda: whole(store), timeout_s=20)
        assert (sick / key).read_bytes() == later


def test_a_mount_point_without_its_disk_is_not_filled(tmp_path: Path, disk: LoopDisk, wait_for) -> None:
    sick, well = disk.path, tmp_path / "well"
    with ReplicatedStore([well, sick]) as store:
        wait_for(lambda: whole(store))
        put(store, 1)
    disk.unmount()
    with ReplicatedStore([well, sick]) as store:
        key, data = put(store, 2)
        assert any("is its disk mounted" in problem for problem in store.problems())
        assert list(sick.iterdir()) == []
    disk.mount()
    with ReplicatedStore([well, sick]) as store:
        wait_for(lambda: whole(store))
        assert (sick / key).read_bytes() == data


def test_who_is_behind_is_remembered(roots, wait_for) -> None:
    with ReplicatedStore(roots[:2]) as store:
        wait_for(lambda: whole(store))
        gone, _ = put(store, 1)
    away = roots[1].with_name("away")
    roots[1].rename(away)
    with ReplicatedStore(roots[:2]) as store:
        store.delete(gone)
        key, data = put(store, 2)
        assert store.problems()
    away.rename(roots[1])
    with ReplicatedStore([roots[1], roots[0]]) as store:
        assert read(store, key) == data
        wait_for(lambda: whole(store))
        assert not (roots[1] / gone).exists()
        assert (roots[1] / key).read_bytes() == data


def test_two_that_were_each_alone_for_a_while(roots, wait_for) -> None:
    """Nothing that was acknowledged is lost; what was removed may come back."""
    away = roots[0].with_name("away")
    with ReplicatedStore(roots[:2]) as store:
        wait_for(lambda: whole(store))
    stored = []
    for number, root in enumerate(roots[:2]):
        root.rename(away)
        with ReplicatedStore(roots[:2]) as store:
            stored.append(put(store, number))
        away.rename(root)
    with ReplicatedStore(roots[:2]) as store:
        wait_for(lambda: whole(store))
        for key, data in stored:
            assert [(root / key).read_bytes() for root in roots[:2]] == [data, data]


def test_different_stores_are_not_mixed(roots, tmp_path: Path) -> None:
    for root in roots[:2]:
        with DirectoryStore(root) as store:
            store.put_bytes("public/a/1", root.name.encode())
    with pytest.raises(IntegrityError, match="different stores"):
        ReplicatedStore(roots[:2])
    with pytest.raises(IntegrityError, match="twice"):
        ReplicatedStore([roots[2], roots[2]])
    assert [(root / "public/a/1").read_bytes() for root in roots[:2]] == [b"one", b"two"]


def test_several_processes_have_no_replicas(roots) -> None:
    settings = RegistrySettings(replicas=[str(roots[1])], database="postgresql://db/helios")
    with pytest.raises(UsageError, match="a registry of one process"):
        open_objects(settings, roots[0], roots[2])
    with pytest.raises(UsageError, match="keeps copies of its own"):
        open_objects(RegistrySettings(store="s3://bucket", replicas=[str(roots[1])]), roots[0], roots[2])
    assert not roots[0].exists()


def test_all_full_is_no_space(tmp_path: Path, wait_for) -> None:
    with small_disk(tmp_path / "a", 4) as a, small_disk(tmp_path / "b", 4) as b:
        with ReplicatedStore([a / "s", b / "s"]) as store:
            wait_for(lambda: whole(store))
            put(store, 1)
            trash = [fill_up(a), fill_up(b)]
            path = tmp_path / "file"
            key, data = blob(2)
            path.write_bytes(data)
            with pytest.raises(NoSpace):
                store.put_file(key, path)
            assert path.exists()
            for each in trash:
                each.unlink()
            store.put_file(key, path)
            wait_for(lambda: whole(store))
            assert (a / "s" / key).read_bytes() == (b / "s" / key).read_bytes() == data


@pytest.mark.fuse
def test_a_registry_heals_what_nodes_and_clients_find(helios, helios_home, tmp_path, expected_log_errors) -> None:
    """Damage in one directory is noticed by who reads, read past at once, and repaired."""
    expected_log_errors("a copy is damaged")
    data = random.Random(7).randbytes(9_000_000)
    other = random.Random(8).randbytes(5_000_000)
    environ = {"HELIOS_REGISTRY__REPLICAS": json.dumps([str(tmp_path / "copy")])}
    helios.environ = {**helios.environ, **environ}
    with running_registry(helios, errors="a copy is damaged") as registry:
        urls = {"HELIOS_REGISTRY__URLS": registry.url, "HELIOS_HOME": str(tmp_path / "node")}
        model = write(tmp_path / "model", {"data.bin": data, "other.bin": other})
        commit = helios("push", model, "org/m").out.strip()
        stores = [helios_home.store, tmp_path / "copy"]
        keys = [blob_key("public", hashlib.sha256(each).hexdigest()) for each in (data, other)]
        assert all((store / key).exists() for store in stores for key in keys)
        for key in keys:
            tampered(stores[0] / key, 4_500_000)
        with mounted(Home(tmp_path / "node"), tmp_path / "mnt", **urls):
            assert (tmp_path / "mnt/org/m" / commit / "data.bin").read_bytes() == data
        with urllib.request.urlopen(f"{registry.url}/org/m/resolve/main/other.bin", timeout=30) as answer:
            assert answer.read() == other
        end = time.monotonic() + 20
        while any((stores[0] / key).read_bytes() not in (data, other) for key in keys):
            assert time.monotonic() < end
            time.sleep(0.05)
        # A directory that goes away is told of in the metrics, until it is whole again.
        (tmp_path / "copy").rename(tmp_path / "away")
        helios("push", write(tmp_path / "more", {"more.txt": b"more"}), "org/more")
        assert problems(registry) == 1
        (tmp_path / "away").rename(tmp_path / "copy")
        while problems(registry):
            assert time.monotonic() < end + 30
            time.sleep(0.2)
        assert (tmp_path / "copy" / blob_key("public", hashlib.sha256(b"more").hexdigest())).read_bytes() == b"more"


def problems(registry: Running) -> int:
    with urllib.request.urlopen(f"{registry.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return int(float(next(line for line in lines if line.startswith("helios_registry_store_problems ")).split()[1]))


def test_what_is_removed_while_a_directory_is_away_stays_removed(roots, wait_for) -> None:
    """Nothing to remove and nowhere to remove it from are two things."""
    with ReplicatedStore(roots[:2]) as store:
        wait_for(lambda: whole(store))
        gone, _ = put(store, 1)
        kept, data = put(store, 2)
        away = roots[1].with_name("away")
        roots[1].rename(away)
        store.delete(gone)
        assert store.problems()
        away.rename(roots[1])
        wait_for(lambda: whole(store))
        assert not (roots[1] / gone).exists()
        roots[0].rename(away)
        assert read(store, kept) == data
        roots[1].rename(away.with_name("both"))
        with pytest.raises(Unavailable):
            store.info(kept)
        away.rename(roots[0])
        away.with_name("both").rename(roots[1])
        assert read(store, kept) == data


def test_a_verification_repairs_from_the_other_directory(
    helios, helios_home, tmp_path, wait_for, expected_log_errors
) -> None:
    """Each directory has damage of its own, and lacks an object: together they have everything."""
    expected_log_errors("damaged|wrong bytes|healed|missing")
    one, two = tmp_path / "one", tmp_path / "two"
    data = {name: random.Random(name).randbytes(9 << 20) for name in ("a.bin", "b.bin", "c.bin")}
    keys = {name: blob_key("public", hashlib.sha256(content).hexdigest()) for name, content in data.items()}
    env = {"HELIOS_REGISTRY__STORE": str(one), "HELIOS_REGISTRY__REPLICAS": json.dumps([str(two)])}
    helios.environ |= env
    with running_registry(helios, errors="a copy is damaged") as registry:
        urls = {"HELIOS_REGISTRY__URLS": registry.url}
        helios("push", write(tmp_path / "model", data), "org/m", env=urls)
        tampered(one / keys["a.bin"], 5)
        tampered(two / keys["a.bin"], 8 << 20)  # another chunk of the same object
        tampered(one / keys["b.bin"], 3 << 20)
        (one / keys["c.bin"]).unlink()
        done = helios("store", "verify", "--repair", "--json", env=urls).json()
        assert done["repaired"]["failed"] == 0
        assert done["repaired"]["replicas"] >= 2
        assert done["repaired"]["peers"] == done["repaired"]["upstream"] == 0
        again = helios("store", "verify", "--json", env=urls).json()
        assert (again["damaged"], again["stray_objects"]) == (0, 0)
        for name, content in data.items():
            with urllib.request.urlopen(f"{registry.url}/org/m/resolve/main/{name}", timeout=30) as answer:
                assert answer.read() == content
        # No copy of a.bin was right as a whole; what is right in each made one.
        whole = [(root / keys[name], content) for name, content in data.items() for root in (one, two)]
        wait_for(lambda: all(p.exists() and p.read_bytes() == content for p, content in whole), 30, "both being right")
