"""Stores whose answers go wrong, under load: right bytes or EIO, never a wrong byte, never late; and then all is well.
With two of which one is right at any place, no EIO either.

HELIOS_STORM_S lengthens the storm (seconds); HELIOS_STORM_SEED chooses another one.
"""

from __future__ import annotations

import itertools
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.config import Config
from helios.embedded import attach
from helios.home import Home
from heliosfs.store.recipe import MAX_CHUNK
from tests.support.caches import verify
from tests.support.front import FAULTS, Asked, Front, Kind, Plan, Strike, nothing, seeded
from tests.support.mounts import MODES, mounted, push, write
from tests.support.storm import FILES, READERS, SEED, STORM_S, Load, commit_directory, right_in_the_end

pytestmark = pytest.mark.fuse

DEADLINE_S = 1.0
PATIENCE_S = 2 * DEADLINE_S * (1 + 1)
"""heliosfs/fetch/read.py: the longest that one READ of a mount with one registry may take."""

HALVED = ("/api/v1/recipe", "/api/v1/content", "/api/v1/objects/")

FAIR_S = 4.0
"""The deadline where a right source must not miss it, on a busy machine."""

FAIR_READ_S = 2 * FAIR_S
"""One deadline of the source that is wrong, one of the other: less than the mount's patience with both."""


@pytest.fixture
def front(helios_home: Home) -> Iterator[Front]:
    with attach(Config(), helios_home) as registry, Front(registry.urls[0]) as front:
        yield front


@pytest.fixture
def fronts(helios_home: Home) -> Iterator[tuple[Front, Front]]:
    """Two registries: each with faults of its own."""
    with attach(Config(), helios_home) as registry, Front(registry.urls[0]) as one, Front(registry.urls[0]) as other:
        yield one, other


def partly(side: int, faults: tuple[Kind, ...]) -> Plan:
    """A plan under which one half goes wrong, always, each time in the next of these ways; under the plan of the other
    ``side`` (0 or 1) it is the other half.

    Halved are each file's places of 4 MiB, packs, and what sources are asked about whole files; not where chunks lie,
    which each source must know to be right anywhere.
    """
    kinds = itertools.cycle(faults)
    later = itertools.cycle([kind for kind in faults if kind not in ("status", "silent", "late")])

    def plan(asked: Asked) -> Strike | None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("range", ""))
        if span is None or "/blobs/" not in asked.path:
            struck = asked.path.startswith(HALVED) and half(asked.path) == side
            return Strike(next(kinds)) if struck else None
        first, last = int(span[1]), int(span[2])
        bad = [
            place for place in range(first // MAX_CHUNK, last // MAX_CHUNK + 1) if half(f"{asked.path}{place}") == side
        ]
        if not bad:
            return None
        before = bad[0] * MAX_CHUNK - first  # so many bytes are right
        return Strike(next(later), before) if before > 0 else Strike(next(kinds), asked.number % 2 * 4096)

    return plan


def half(place: str) -> int:
    return zlib.crc32(f"{SEED}:{place}".encode()) >> 16 & 1


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_faults_gives_right_bytes_or_eio_in_time(
    helios_home: Home, front: Front, tmp_path: Path, expected_log_errors: Any, mode: str
) -> None:
    expected_log_errors("a chunk is corrupt")
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    environ = {"HELIOS_MOUNT__MODE": mode, "HELIOS_MOUNT__REQUEST_DEADLINE_S": f"{DEADLINE_S:g}"}
    with mounted(helios_home, tmp_path / "mnt", "--registry", front.url, **environ) as mount:
        files = mount.path / "org/name" / commit
        with commit_directory(mount, commit) as directory:
            front.plan = seeded(SEED, 0.5)
            load = Load(mount, commit, directory, time.monotonic() + STORM_S, PATIENCE_S)
            load.run()
            assert load.wrong == []
            assert load.seen["right"] > READERS
            assert set(front.struck) == set(FAULTS)
            print(f"{mode}: {dict(load.seen)}, {load.slowest()}, faults: {dict(front.struck)}")
            front.plan = nothing
        for name in sorted(FILES.keys() - {"left.txt"}):
            right_in_the_end(files / name, FILES[name])
    whole, chunks = verify(helios_home.cache)
    assert whole + chunks > 0  # small files may be in memory alone
    with mounted(helios_home, tmp_path / "mnt", "--registry", front.url, **environ) as mount:
        for name, data in FILES.items():
            assert (mount.path / "org/name" / commit / name).read_bytes() == data


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_in_which_one_source_is_right_gives_right_bytes_alone(
    helios_home: Home, fronts: tuple[Front, Front], tmp_path: Path, expected_log_errors: Any, mode: str
) -> None:
    """Every chunk, recipe and placement is right at one of two registries; the other one's is anything but."""
    expected_log_errors("a chunk is corrupt")
    commit = push(helios_home, write(tmp_path / "model", FILES), "org/name")
    environ = {
        "HELIOS_MOUNT__MODE": mode,
        "HELIOS_MOUNT__REQUEST_DEADLINE_S": f"{FAIR_S:g}",
        "HELIOS_MOUNT__BUFFER_MIB": "8",
    }
    sources = [arg for front in fronts for arg in ("--registry", front.url)]
    with (
        mounted(helios_home, tmp_path / "mnt", *sources, **environ) as mount,
        commit_directory(mount, commit) as directory,
    ):
        for turn, faults in enumerate(
            (FAULTS, ("corrupt",))
        ):  # mostly silence; then as many wrong bytes as there can be
            for side, front in enumerate(fronts):
                front.plan = partly(side ^ turn, faults)
            load = Load(mount, commit, directory, time.monotonic() + STORM_S, FAIR_READ_S)
            load.run()
            assert load.wrong == []
            print(f"{mode}: {dict(load.seen)}, {load.slowest()}, {[dict(f.struck) for f in fronts]}")
            assert load.seen["EIO"] == 0
            assert load.seen["right"] > READERS
        assert all(front.struck for front in fronts)
        assert set(fronts[0].struck | fronts[1].struck) == set(FAULTS)
    whole, chunks = verify(helios_home.cache)
    assert whole + chunks > 0
