"""Who read what: nothing counts twice, nothing is lost in order, and it stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import Unavailable
from helios.metrics import RegistryMetrics
from registry.metadata.database import Database
from registry.metadata.usage import DAY, HOUR, OTHERS, Reads
from registry.threads import Threads
from registry.usage import recorder as module
from registry.usage.recorder import HOURS_S, Recorder
from registry.usage.telling import node_of
from tests.unit.registry.conftest import Registry

START = 20_000 * DAY
COMMIT = "c" * 40
ALL = ("time", "repo", "commit", "node")


class Clock:
    """Seconds since 1970."""

    def __init__(self) -> None:
        self.at = float(START)

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


def recorder(registry: Registry, clock: Clock, **options: int) -> Recorder:
    return Recorder(registry.database, RegistryMetrics(), keep_s=30 * DAY, now=clock, **options)


def rows(found: Recorder, *by: str, repo: str | None = None, since: int = 0) -> list[tuple[object, ...]]:
    names = by or ALL
    asked = found.ask(names, since=since, until=1 << 40, repo=repo, limit=1000)
    return [(*(row[name] for name in names), row["reads"], row["bytes"]) for row in asked]


def test_reads_are_summed_up_by_model_revision_node_and_hour(registry: Registry, clock: Clock) -> None:
    found = recorder(registry, clock)
    for _ in range(3):
        found.read("models/org/m", COMMIT, "n1", reads=1, count=100)
    found.read("models/org/m", COMMIT, "n2", reads=1, count=1)
    found.flush()
    clock.at += HOUR - 1
    found.read("models/org/m", COMMIT, "n1", reads=0, count=5)
    clock.at += 1
    found.read("models/org/m", COMMIT, "n1", reads=1, count=7)
    found.read("datasets/org/d", "", "n1", reads=1, count=9)
    assert rows(found) == [
        (START, "models/org/m", COMMIT, "n1", 3, 305),
        (START, "models/org/m", COMMIT, "n2", 1, 1),
        (START + HOUR, "datasets/org/d", "", "n1", 1, 9),
        (START + HOUR, "models/org/m", COMMIT, "n1", 1, 7),
    ]
    assert rows(found, "time", repo="models/org/m") == [(START, 4, 306), (START + HOUR, 1, 7)]
    assert rows(found, "repo", since=START + HOUR) == [("datasets/org/d", 1, 9), ("models/org/m", 1, 7)]


def test_a_report_that_is_sent_again_counts_once(registry: Registry, clock: Clock) -> None:
    found = recorder(registry, clock)
    report = [("models/org/m", COMMIT, Reads(2, 200)), ("models/org/m", COMMIT, Reads(1, 1))]
    assert found.report("ab" * 16, 1, "n1", 0.0, report)
    assert not found.report("ab" * 16, 1, "n1", 70.0, report)
    assert found.report("cd" * 16, 1, "n1", 0.0, report), "another mount's"
    assert found.report("ab" * 16, 2, "n1", HOUR, report), "what was counted an hour ago"
    assert rows(found, "time") == [(START - HOUR, 3, 201), (START, 6, 402)]


def test_what_cannot_be_written_is_written_later(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recorder(registry, clock)
    found.read("models/org/m", COMMIT, "n1", reads=1, count=100)
    with monkeypatch.context() as patched:
        patched.setattr(Database, "write", _away)
        with pytest.raises(Unavailable):
            found.flush()
        found.read("models/org/m", COMMIT, "n1", reads=1, count=1)
    assert rows(found, "repo") == [("models/org/m", 2, 101)]


def test_who_asks_while_counts_are_being_written_hears_of_them(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recorder(registry, clock)
    found.read("models/org/m", COMMIT, "n1", reads=1, count=100)
    taken, goes, write = threading.Event(), threading.Event(), Database.write

    @contextlib.contextmanager
    def slowly(self: Database, **options: Any) -> Iterator[Any]:
        taken.set()
        assert goes.wait(10)
        with write(self, **options) as connection:
            yield connection

    monkeypatch.setattr(Database, "write", slowly)
    with ThreadPoolExecutor() as threads:
        flushed = threads.submit(found.flush)
        assert taken.wait(10)
        asked = threads.submit(rows, found, "repo")
        with pytest.raises(TimeoutError):
            asked.result(0.2)
        goes.set()
        flushed.result(10)
        assert asked.result(10) == [("models/org/m", 1, 100)]


@contextlib.contextmanager
def _away(_self: Database, **_options: object):  # type: ignore[no-untyped-def]
    raise Unavailable("the database is away")
    yield


def test_a_registry_that_stops_in_order_has_written_all(registry: Registry, clock: Clock, upkeep: Threads) -> None:
    found = recorder(registry, clock)

    async def main() -> None:
        task = asyncio.create_task(found.run(upkeep))
        await asyncio.sleep(0.05)
        found.read("models/org/m", COMMIT, "n1", reads=1, count=100)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert rows(recorder(registry, clock), "repo") == [("models/org/m", 1, 100)]


def test_memory_is_bounded(registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING", 10)
    found = recorder(registry, clock)
    for number in range(100):
        found.read("models/org/m", COMMIT, f"n{number}", reads=1, count=2)
    assert len(found._counts) <= 11
    assert rows(found, "time") == [(START, 100, 200)]


def test_what_could_not_be_written_counts_all_the_same_where_there_is_no_room_for_it(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PENDING", 10)
    found = recorder(registry, clock)
    for number in range(10):
        found.read("models/org/m", COMMIT, f"n{number}", reads=1, count=2)

    @contextlib.contextmanager
    def away(self: Database, **_options: object) -> Iterator[Any]:
        for number in range(10):  # meanwhile others read
            found.read("models/org/m", COMMIT, f"later{number}", reads=1, count=3)
        raise Unavailable("the database is away")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(Database, "write", away)
        with pytest.raises(Unavailable):
            found.flush()
    assert len(found._counts) <= 11
    assert rows(found, "time") == [(START, 20, 50)]


def test_an_hour_has_a_bound_on_its_rows_and_loses_no_bytes(registry: Registry, clock: Clock) -> None:
    found = recorder(registry, clock, hour_rows=10)
    for number in range(40):
        found.read(f"models/org/m{number % 20:02}", COMMIT, f"n{number}", reads=1, count=3)
        if number % 7 == 0:
            found.flush()
    found.flush()
    found.read("models/org/m00", COMMIT, "n0", reads=1, count=3)  # it has a row of its own
    seen = rows(found)
    assert sum(int(str(row[-1])) for row in seen) == 41 * 3
    assert len(seen) <= 16
    assert (START, "models/org/m00", COMMIT, "n0", 2, 6) in seen
    assert any(row[3] == OTHERS and row[1] != OTHERS for row in seen)
    assert any(row[1] == OTHERS for row in seen)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3), st.integers(0, 100))))
def test_sums_are_right_whatever_is_merged(reads: list[tuple[int, int, int, int]]) -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as root:
        database = Database.sqlite(Path(root) / "m.db")
        try:
            found = Recorder(database, RegistryMetrics(), keep_s=DAY, now=clock, hour_rows=4)
            for repo, node, hour, count in reads:
                clock.at = START + hour * HOUR
                found.read(f"models/org/{repo}", COMMIT, str(node), reads=1, count=count)
                if count % 3 == 0:
                    found.flush()
            by_hour: dict[int, list[int]] = {}
            for _, _, hour, count in reads:
                total = by_hour.setdefault(START + hour * HOUR, [0, 0])
                total[0] += 1
                total[1] += count
            assert rows(found, "time") == [(time, *total) for time, total in sorted(by_hour.items())]
        finally:
            database.close()


def test_old_hours_become_days_and_what_is_older_goes(registry: Registry, clock: Clock) -> None:
    found = recorder(registry, clock)
    for hour in range(30):
        clock.at = START + hour * HOUR
        found.read("models/org/m", COMMIT, "n1", reads=1, count=10)
        found.flush()
    clock.at = START + DAY + HOURS_S
    found.tidy()
    asked = found.ask(("time",), since=0, until=1 << 40, repo=None, limit=100)
    assert [(row["time"], row["span"], row["reads"]) for row in asked] == [
        (START, DAY, 24),
        *((START + DAY + hour * HOUR, HOUR, 1) for hour in range(6)),
    ]
    found.tidy()
    assert rows(found, "repo") == [("models/org/m", 30, 300)], "and again, nothing changes"
    clock.at = START + DAY + 30 * DAY
    found.tidy()
    assert rows(found, "repo") == [("models/org/m", 6, 60)]
    clock.at += 2 * DAY
    found.tidy()
    assert rows(found) == []


def test_of_too_many_rows_the_oldest_go(registry: Registry, clock: Clock) -> None:
    found = recorder(registry, clock, rows=5)
    for hour in range(8):
        clock.at = START + hour * HOUR
        found.read("models/org/m", COMMIT, "n1", reads=1, count=10)
        found.flush()
    found.tidy()
    assert [row[0] for row in rows(found, "time")] == [START + hour * HOUR for hour in range(3, 8)]


def test_nothing_is_recorded_where_nothing_is_kept(registry: Registry, clock: Clock) -> None:
    found = Recorder(registry.database, RegistryMetrics(), keep_s=0, now=clock)
    found.read("models/org/m", COMMIT, "n1", reads=1, count=10)
    assert found.report("ab" * 16, 1, "n1", 0.0, [("models/org/m", COMMIT, Reads(1, 1))])
    assert rows(found) == []


@pytest.mark.parametrize(
    ("header", "client", "node"),
    [
        (b"gpu-7", ("10.0.0.9", 1), "gpu-7"),
        (b"", ("10.0.0.9", 1), "10.0.0.9"),
        (b"with space", ("10.0.0.9", 1), "10.0.0.9"),
        (b"x" * 200, ("10.0.0.9", 1), "10.0.0.9"),
        (b"", None, "local"),
        (b"", ("", 0), "local"),
    ],
)
def test_a_node_is_called_as_it_says_else_by_its_address(header: bytes, client: object, node: str) -> None:
    assert node_of({"headers": [(b"x-helios-node", header)], "client": client}) == node
