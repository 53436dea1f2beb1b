"""What a mount tells of its reads: all of it once, whatever the registry does meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from helios.errors import InvalidInput, Unavailable
from helios.names import RepoId
from heliosfs.usage import ReadCounts, ReadReports, Row

REPO, COMMIT = RepoId.parse("org/m"), "c" * 40


class Registry:
    """Counts each report once; ``lost`` answers got lost, after the report was counted or before."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], Sequence[Row]] = {}
        self.ages: list[float] = []
        self.fails: list[Exception] = []
        self.counts_first = False

    def report_reads(
        self, node: str, reporter: str, sequence: int, rows: Sequence[Row], age_s: float, timeout_s: float
    ) -> None:
        assert node == "n1"
        self.ages.append(age_s)
        failure = self.fails.pop(0) if self.fails else None
        if failure is None or self.counts_first:
            assert self.seen.setdefault((reporter, sequence), rows) == rows, "a number stands for one report"
        if failure is not None:
            raise failure

    def total(self) -> tuple[int, int]:
        rows = [row for rows in self.seen.values() for row in rows]
        return sum(row.reads for row in rows), sum(row.bytes for row in rows)


@pytest.mark.parametrize("counts_first", [True, False])
def test_a_report_whose_answer_was_lost_is_sent_again_as_it_was(counts_first: bool) -> None:
    registry, counts = Registry(), ReadCounts()
    registry.counts_first = counts_first
    reports = ReadReports(counts, registry, "n1")

    async def main() -> None:
        counts.opened(REPO, COMMIT)
        counts.read(REPO, COMMIT, 10)
        registry.fails = [Unavailable("away")]
        await reports.report(1.0)
        counts.read(REPO, COMMIT, 5)
        await reports.report(1.0)
        counts.opened(REPO, COMMIT)
        await reports.report(1.0)
        await reports.report(1.0)

    trio.run(main)
    assert registry.total() == (2, 15)
    assert len(registry.seen) == 3


def test_what_a_registry_refuses_is_not_sent_for_ever() -> None:
    registry, counts = Registry(), ReadCounts()
    reports = ReadReports(counts, registry, "n1")

    async def main() -> None:
        counts.opened(REPO, COMMIT)
        registry.fails = [InvalidInput("no")]
        await reports.report(1.0)
        await reports.report(1.0)

    trio.run(main)
    assert len(registry.ages) == 1


def test_the_last_report_is_sent_when_the_mount_ends() -> None:
    registry, counts = Registry(), ReadCounts()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(ReadReports(counts, registry, "n1").run)
            counts.opened(REPO, COMMIT)
            counts.read(REPO, COMMIT, 7)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert registry.total() == (1, 7)


def test_counts_are_bounded() -> None:
    counts = ReadCounts(most=2)
    for number in range(5):
        counts.opened(RepoId.parse(f"org/m{number}"), COMMIT)
    counts.read(RepoId.parse("org/m0"), COMMIT, 3)
    assert counts.take() == [Row("models/org/m0", COMMIT, 1, 3), Row("models/org/m1", COMMIT, 1, 0)]
    assert counts.take() == []
