"""What a mount does in the background, on real mounts: warming, verifying, scrubbing, draining, and telling of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.home import Home
from helios.http.client import HttpClient
from helios.mounts import state_of
from heliosfs.store.recipe import MAX_CHUNK
from tests.support.damage import flip
from tests.support.mounts import MODES, Mount, mounted, next_worker, push, worker, write
from tests.support.registry import running_registry
from tests.support.slow_link import SlowLink
from tests.support.terminal import on_a_terminal

pytestmark = pytest.mark.fuse
native = pytest.mark.skipif("native" not in MODES, reason="native mounts need root and Linux 6.9")

MIB = 1 << 20
FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.bin": random.Random(1).randbytes(9 * MIB),
    "model-00002-of-00002.bin": random.Random(2).randbytes(5 * MIB),
    "tokenizer.txt": random.Random(3).randbytes(100_000),
}
WEIGHTS = "model-00001-of-00002.bin"
LAST = "model-00002-of-00002.bin"
TOTAL = sum(map(len, FILES.values()))


@contextlib.contextmanager
def far_away(helios: Any, home: Home, path: Path, tmp_path: Path, **environ: str) -> Iterator[tuple[Mount, SlowLink]]:
    """A mount whose registry is reached over a link: everything is fetched, nothing is linked."""
    with running_registry(helios) as registry:
        commit = push(home, write(tmp_path / "model", FILES), "org/name")
        host, _, port = registry.url.removeprefix("http://").rpartition(":")
        with SlowLink(host, int(port), None) as link:
            with mounted(home, path, "--registry", link.url, **environ) as mount:
                mount.files = mount.path / "org/name" / commit  # type: ignore[attr-defined]
                yield mount, link


def call(mount: Mount, method: str, path: str, body: Any = None) -> Any:
    client = HttpClient(f"unix:{mount.state['socket']}", timeout_s=30)
    try:
        return client.json(method, f"/api/v1/{path}", body=body)
    finally:
        client.close()


def blob(mount: Mount, name: str) -> Path:
    """Where the whole file lies in the cache."""
    digest = hashlib.sha256(FILES[name]).hexdigest()
    return mount.home.cache / "blobs" / digest[:2] / digest


def read_all(files: Path) -> None:
    for name, data in FILES.items():
        assert (files / name).read_bytes() == data, name


@pytest.mark.parametrize("mode", MODES)
def test_warm_brings_everything_and_says_so(helios: Any, helios_home: Home, tmp_path: Path, mode: str) -> None:
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path, HELIOS_MOUNT__MODE=mode) as (mount, link):
        few = helios("warm", "org/name", "*.json", "tokenizer*", "--json").json()
        assert (few["state"], few["files"], few["files_done"]) == ("done", 2, 2)
        assert not blob(mount, WEIGHTS).exists()
        (held,) = call(mount, "GET", "models")["models"]
        assert (held["weights"], held["local_files"], held["files"]) == ("none", 2, 4)
        before = link.passed
        done = helios("warm", "org/name", "--json").json()
        assert (done["files"], done["files_done"], done["bytes_done"]) == (4, 4, TOTAL)
        assert done["found_bytes"] == len(FILES["config.json"]) + len(FILES["tokenizer.txt"])
        assert done["no_room"] == done["errors"] == {}
        assert all(blob(mount, name).exists() for name in FILES), "whole, and so verified, when it returns"
        came = link.passed
        assert TOTAL - done["found_bytes"] <= came - before
        (held,) = call(mount, "GET", "models")["models"]
        assert (held["weights"], held["local"], held["bytes"]) == ("whole", TOTAL, TOTAL)
        read_all(mount.files)
        assert link.passed - came < 100_000, "nothing was fetched again"
        assert "has no file 'nothing*'" in helios("warm", "org/name", "nothing*", code=1).err
        assert "the registry has no models/org/none" in helios("warm", "org/none", code=1).err
        found = call(mount, "GET", "activity")
        (model,) = found["models"]
        assert (model["repo"], model["local_files"], model["files"]) == ("models/org/name", 4, 4)
        assert model["refs"] == ["main"]
        assert found["tiers"][0]["used"] >= TOTAL
        assert found["sources"][0]["fetched"] >= TOTAL
        assert found["opens"]["total"]["hit_ratio"] == 1.0
        (shown,) = helios("status", "--json").json()["mounts"]
        assert shown["activity"]["models"][0]["local"] == TOTAL
        process = helios.start("status", "--watch")
        frames = [process.stdout.readline() for _ in range(80)]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert sum("org/name@main" in line for line in frames) >= 2, "it is shown again"
        assert sum(str(mount.path) in line for line in frames) >= 2


@pytest.mark.parametrize("mode", MODES)
def test_warm_goes_on_without_its_client_and_can_be_ended(
    helios: Any, helios_home: Home, tmp_path: Path, mode: str, wait_for: Any
) -> None:
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path, HELIOS_MOUNT__MODE=mode) as (mount, link):
        link.throttle.rate = 3e6
        job = helios("warm", "org/name", "--detach", "--json").json()
        assert job["state"] in ("waiting", "running")
        asked = {"repo": "models/org/name", "revision": "main"}
        assert call(mount, "POST", "warm", asked)["id"] == job["id"], "the same again is the same job"
        wait_for(lambda: call(mount, "GET", f"warm/{job['commit']}")["bytes_done"] > MIB, 30, "it to get on")
        found = call(mount, "GET", "activity")
        assert [fill["path"] for fill in found["fills"]][:1] == [WEIGHTS], "weights in loading order"
        client = helios.start("warm", "org/name")
        time.sleep(0.5)
        client.send_signal(signal.SIGINT)
        assert client.wait(20) == 130
        assert call(mount, "GET", f"warm/{job['id']}")["state"] == "running"
        ended = call(mount, "DELETE", f"warm/{job['id']}")
        assert ended["state"] == "cancelled"
        wait_for(lambda: mount.metric("helios_mount_fills") == 0, what="the fills to end")
        assert call(mount, "GET", "activity")["queued"] == 0
        link.throttle.rate = None
        assert helios("warm", "org/name", "--json").json()["state"] == "done"


@pytest.mark.parametrize("mode", MODES)
def test_warm_says_what_there_is_no_room_for(helios: Any, helios_home: Home, tmp_path: Path, mode: str) -> None:
    environ = {"HELIOS_MOUNT__CACHE_LIMIT_GIB": str(7 / 1024), "HELIOS_MOUNT__MODE": mode}
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path, **environ) as (mount, _):
        result = helios("warm", "org/name", "--json", code=1)
        job = json.loads(result.out)
        assert job["state"] == "failed"
        assert list(job["no_room"]) == [WEIGHTS]
        assert job["files_done"] == 3
        assert f"the cache has no room for {WEIGHTS}" in result.err
        read_all(mount.files)


def test_warm_draws_a_bar_on_a_terminal(helios: Any, helios_home: Home, tmp_path: Path) -> None:
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path):
        done = on_a_terminal(helios, "warm", "org/name")
        assert done.code == 0, done.err
        assert done.out.endswith(" 4 of 4 files, 14.8 MB\n")
        assert "warming org/name" in done.err
        assert "━" in done.err
        assert "14.8/14.8 MB" in done.err, "it is full in the end"


@pytest.mark.parametrize("mode", MODES)
def test_verify_finds_a_flipped_bit_and_the_file_is_right_again(
    helios: Any, helios_home: Home, tmp_path: Path, mode: str, expected_log_errors: Any
) -> None:
    expected_log_errors("a cached blob is damaged")
    environ = {"HELIOS_MOUNT__MODE": mode}
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path, **environ) as (mount, _):
        helios("warm", "org/name")
        assert "4 of 4 files are here, 14.8 MB verified" in helios("verify", "org/name").out
        (mount.files / WEIGHTS).read_bytes()  # pages that the kernel keeps
        at = 5 * MIB
        flip(blob(mount, WEIGHTS), at)
        with (mount.files / WEIGHTS).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 1, at) != FILES[WEIGHTS][at : at + 1], "nobody has looked yet"
            result = helios("verify", "org/name", "--json", code=1)
            if mode == "portable":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(file.fileno(), 1, at) == FILES[WEIGHTS][at : at + 1]
        (bad,) = json.loads(result.out)["bad"]
        assert (bad["path"], bad["sha256"]) == (WEIGHTS, blob(mount, WEIGHTS).name)
        (kept,) = (mount.home.cache / "quarantine").iterdir()
        assert str(kept) in bad["outcome"]
        read_all(mount.files)
        assert mount.metric("helios_mount_verify_failures_total", source="l1") == 1
        assert mount.metric("helios_mount_damaged_blobs_total") == 1
        assert mount.metric("helios_mount_quarantine_files") == 1
        assert call(mount, "GET", "activity")["tiers"][0]["quarantined"] == 1
        helios("warm", "org/name")
        assert helios("verify", "--json").json()["local"] == 4


@pytest.mark.parametrize("mode", MODES)
def test_the_scrubber_finds_a_flipped_bit_and_a_pinned_file_comes_back_by_itself(
    helios: Any, helios_home: Home, tmp_path: Path, mode: str, wait_for: Any, expected_log_errors: Any
) -> None:
    expected_log_errors("a cached blob is damaged")
    environ = {"HELIOS_MOUNT__SCRUB_MB_S": "20000", "HELIOS_MOUNT__MODE": mode}
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path, **environ) as (mount, _):
        helios("warm", "org/name")
        wait_for(lambda: mount.metric("helios_mount_scrubbed_bytes_total") >= TOTAL, 30, "a whole pass")
        helios("pin", "org/name")
        inode = blob(mount, WEIGHTS).stat().st_ino
        flip(blob(mount, WEIGHTS), len(FILES[WEIGHTS]) - 1)
        flip(blob(mount, "tokenizer.txt"), 0)
        wait_for(lambda: mount.metric("helios_mount_damaged_blobs_total") == 2, 30, "the scrubber to find them")

        def back() -> bool:
            return blob(mount, WEIGHTS).exists() and blob(mount, WEIGHTS).stat().st_ino != inode

        wait_for(back, 30, "the pinned file to be fetched again")
        read_all(mount.files)
        told = call(mount, "GET", "activity")["scrubber"]
        assert told["bad"] == 2
        assert told["tiers"]["l1"]["passes"] > 0
    with far_away_again(helios, helios_home, tmp_path, **environ) as mount:
        wait_for(lambda: call(mount, "GET", "activity")["scrubber"]["tiers"], 30, "the scrubber to start")
        found = call(mount, "GET", "activity")
        assert found["scrubber"]["tiers"]["l1"]["passes"] >= told["tiers"]["l1"]["passes"]
        assert [(model["local"], model["class"]) for model in found["models"]] == [(TOTAL, "pinned")]


@contextlib.contextmanager
def far_away_again(helios: Any, home: Home, tmp_path: Path, **environ: str) -> Iterator[Mount]:
    with (
        running_registry(helios) as registry,
        mounted(home, tmp_path / "mnt", "--registry", registry.url, **environ) as m,
    ):
        yield m


@pytest.mark.parametrize("mode", MODES)
def test_a_bit_that_rots_in_the_stores_file_is_found_through_the_link(
    helios: Any, helios_home: Home, tmp_path: Path, mode: str, expected_log_errors: Any
) -> None:
    expected_log_errors("a cached blob is damaged")
    push(helios_home, write(tmp_path / "model", FILES), "org/name")
    with mounted(helios_home, tmp_path / "mnt", HELIOS_MOUNT__MODE=mode) as mount:
        helios("warm", "org/name")
        assert blob(mount, WEIGHTS).stat().st_nlink == 2
        flip(blob(mount, WEIGHTS), 99)
        (bad,) = json.loads(helios("verify", "--json", code=1).out)["bad"]
        key = f"public/blobs/{bad['sha256'][:2]}/{bad['sha256']}"
        assert str(helios_home.store / key) in bad["outcome"]
        assert not blob(mount, WEIGHTS).exists()
        assert (helios_home.store / key).stat().st_nlink == 1
        assert str(helios_home.store / key) in mount.log()


@pytest.mark.parametrize("mode", MODES)
def test_a_drained_mount_begins_nothing_and_is_read_as_ever(
    helios: Any, helios_home: Home, tmp_path: Path, mode: str, wait_for: Any
) -> None:
    one = {"HELIOS_MOUNT__CONNECTIONS": "1", "HELIOS_MOUNT__MAX_CONNECTIONS": "1"}  # or all of it is under way at once
    environ = {**one, "HELIOS_MOUNT__MODE": mode}
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path, **environ) as (mount, link):
        link.throttle.rate = 8e6
        job = helios("warm", "org/name", "--no-wait", "--json").json()
        wait_for(lambda: call(mount, "GET", f"warm/{job['id']}")["bytes_done"] > 5 * MIB, 30, "it to get on")
        link.throttle.rate = 2e5  # however long the command takes to start, the job is not done before it
        helios("drain", "--timeout", "0", code=None)
        link.throttle.rate = 8e6
        assert helios("drain", "--timeout", "60").out == "drained\n"
        assert call(mount, "GET", f"warm/{job['id']}")["state"] == "cancelled"
        state = helios("drain", "--json").json()
        assert state["drained"]
        assert not any(state["pending"].values())
        assert "being drained" in helios("warm", "org/name", code=1).err
        link.throttle.rate = None
        with (mount.files / LAST).open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 10, 5 * MIB - 10) == FILES[LAST][-10:], "reads fetch what they need"
            time.sleep(0.5)
            assert mount.metric("helios_mount_fills") == 0
            assert json.loads(mount.page("/api/v1/status"))["draining"]
            if mode == "native":  # what it had is safe: nothing is lost by a kill now
                came = link.passed
                state = state_of(mount.home, mount.path)
                assert state is not None
                assert state.worker is not None
                state.worker.send(signal.SIGKILL)
                assert helios("drain", "--undo").out == "not draining\n"
                helios("warm", "org/name")
                assert link.passed - came < TOTAL - 5 * MIB + 2 * MIB
        assert helios("drain", "--undo", "--json").json()["draining"] is False
        helios("warm", "org/name")
        read_all(mount.files)


def test_a_warm_that_loses_its_worker_is_taken_up_by_the_next(
    helios: Any, helios_home: Home, tmp_path: Path, wait_for: Any
) -> None:
    if "native" not in MODES:
        pytest.skip("native mounts need root and Linux 6.9")
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path) as (mount, link):
        link.throttle.rate = 4e6
        client = helios.start("warm", "org/name", "--json")
        wait_for(lambda: call(mount, "GET", "activity")["fills"], 30, "it to begin")
        state = state_of(mount.home, mount.path)
        assert state is not None
        assert state.worker is not None
        state.worker.send(signal.SIGKILL)
        time.sleep(0.5)
        link.throttle.rate = None
        out, err = client.communicate(timeout=60)
        assert client.returncode == 0, err
        assert json.loads(out)["files_done"] == 4


@native
def test_draining_outlives_the_worker(helios: Any, helios_home: Home, tmp_path: Path, wait_for: Any) -> None:
    """Killed in the middle or replaced, it begins nothing until somebody takes it back; a mount made anew is as new."""
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path) as (mount, link):
        assert helios("drain").out == "drained\n"
        serving = worker(mount)
        serving.send(signal.SIGKILL)
        serving = next_worker(mount, serving)
        assert call(mount, "GET", "drain")["draining"]
        with (mount.files / WEIGHTS).open("rb", buffering=0) as file:
            came = link.passed
            time.sleep(1)
            assert link.passed - came < MIB, "nothing is filled"
            assert mount.metric("helios_mount_fills") == 0
            assert "being drained" in helios("warm", "org/name", code=1).err
            assert file.read(10) == FILES[WEIGHTS][:10]
        assert helios("drain", "--undo").out == "not draining\n"
        serving.send(signal.SIGKILL)
        next_worker(mount, serving)
        assert not call(mount, "GET", "drain")["draining"]
        assert helios("drain").out == "drained\n"
        helios("umount", str(mount.path))
        assert not list(helios_home.run.glob("work-*"))


@native
def test_a_warm_that_nobody_waits_for_is_taken_up_by_the_next_worker(
    helios: Any, helios_home: Home, tmp_path: Path, wait_for: Any
) -> None:
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path) as (mount, link):
        link.throttle.rate = 4e6
        job = helios("warm", "org/name", "--no-wait", "--json").json()
        wait_for(lambda: call(mount, "GET", "activity")["fills"], 30, "it to begin")
        for _ in range(2):
            serving = worker(mount)
            serving.send(signal.SIGKILL)
            next_worker(mount, serving)
            wait_for(lambda: call(mount, "GET", "warm")["jobs"], 30, "it to be taken up again")
        link.throttle.rate = None
        wait_for(lambda: call(mount, "GET", f"warm/{job['id']}")["state"] == "done", 60, "it to be done")
        assert call(mount, "GET", f"warm/{job['id']}")["files_done"] == 4
        (work,) = helios_home.run.glob("work-*")
        wait_for(lambda: b"org/name" not in work.read_bytes(), 30, "it to be noted")
        serving = worker(mount)
        serving.send(signal.SIGKILL)
        next_worker(mount, serving)
        time.sleep(0.5)
        assert not call(mount, "GET", "warm")["jobs"], "what is done is not done again"


@pytest.mark.parametrize("mode", MODES)
def test_the_metrics_say_what_was_done(
    helios: Any, helios_home: Home, tmp_path: Path, mode: str, wait_for: Any
) -> None:
    """In both modes: latency of every operation, bytes by tier and source, opens, the oldest request, memory."""
    with far_away(helios, helios_home, tmp_path / "mnt", tmp_path, HELIOS_MOUNT__MODE=mode) as (mount, link):
        before = mount.metric("helios_mount_request_seconds_count", operation="read")
        with (mount.files / "tokenizer.txt").open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            assert file.read(4096) == FILES["tokenizer.txt"][:4096]
            assert mount.metric("helios_mount_opens_total", tier="remote") == 1
            for offset in range(4096, 65536, 4096):
                assert os.pread(file.fileno(), 4096, offset) == FILES["tokenizer.txt"][offset : offset + 4096]
        reads = mount.metric("helios_mount_request_seconds_count", operation="read") - before
        assert reads >= 1
        assert mount.metric("helios_mount_request_seconds_count", operation="open") >= 1
        assert mount.metric("helios_mount_request_seconds_count", operation="lookup") >= 3
        link.throttle.rate = 100_000
        reader = threading.Thread(target=(mount.files / WEIGHTS).read_bytes)
        reader.start()
        wait_for(lambda: mount.metric("helios_mount_oldest_request_seconds") > 0.2, 20, "a READ to wait")
        link.throttle.rate = None
        reader.join(30)
        helios("warm", "org/name")
        with (mount.files / "tokenizer.txt").open("rb", buffering=0) as file:
            file.read()
        assert mount.metric("helios_mount_opens_total", tier="l1") >= 1
        fetched = mount.metric("helios_mount_fetched_bytes_total", source=link.url.removeprefix("http://"))
        assert TOTAL <= fetched <= TOTAL + 2 * MAX_CHUNK, "what the slow link kept may have been asked for again"
        assert mount.metric("helios_mount_read_bytes_total", tier="remote") >= 4096
        assert (mount.metric("helios_mount_passthrough_opens_total") > 0) == (mode == "native")
        assert mount.metric("helios_rss_anon_shmem_bytes") > 10 * MIB
        assert mount.metric("helios_mount_oldest_request_seconds") == 0
