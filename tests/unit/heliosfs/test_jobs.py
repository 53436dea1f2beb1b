"""Jobs of a mount: the same again is the same job, few run at a time, and all of them end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from helios.errors import Conflict, HeliosError, NotFound, Unavailable
from heliosfs.control import jobs as jobs_module
from heliosfs.control.jobs import Job, Jobs, Wish, Work
from heliosfs.control.rates import RATE_S, SPAN_S, Rates
from heliosfs.control.remembered import MAGIC, RESUMES, Kept, Remembered
from heliosfs.tiers.keeping import read_record


class Doing:
    """Work that goes on until it is told to end, or fails."""

    def __init__(self, what: str, kind: str = "warm", error: Exception | None = None, failed: bool = False) -> None:
        self.kind, self.what, self.error, self.failed = kind, what, error, failed
        self.go = trio.Event()
        self.running = self.left = False

    @property
    def wish(self) -> Wish:
        return Wish(self.kind, commit=self.what)

    @property
    def about(self) -> Mapping[str, Any]:
        return {"commit": self.what}

    def shown(self) -> Mapping[str, Any]:
        return {"far": self.running}

    async def run(self) -> None:
        self.running = True
        try:
            await self.go.wait()
            if self.error is not None:
                raise self.error
        finally:
            self.left = True


@asynccontextmanager
async def working() -> AsyncIterator[Jobs]:
    jobs = Jobs()
    async with trio.open_nursery() as nursery:
        await nursery.start(jobs.run)
        yield jobs
        nursery.cancel_scope.cancel()


async def ended(job: Job) -> str:
    with trio.fail_after(5):
        await job.over.wait()
    return job.state


@pytest.mark.trio
async def test_the_same_again_is_the_same_job_until_it_is_over(autojump_clock: trio.testing.MockClock) -> None:
    async with working() as jobs:
        work = Doing("a")
        job = jobs.start(work)
        assert jobs.start(Doing("a")) is job
        assert jobs.start(Doing("b")) is not job
        await trio.sleep(3)
        assert jobs.get("warm", job.id) is jobs.get("warm", "a") is job
        assert job.document(jobs.now())["state"] == "running"
        assert job.document(jobs.now())["seconds"] == 3.0
        work.go.set()
        assert await ended(job) == "done"
        assert jobs.get("warm", "a") is job, "it is remembered"
        again = jobs.start(Doing("a"))
        assert again is not job
        assert again.id == job.id
        with pytest.raises(NotFound):
            jobs.get("verify", "a")


@pytest.mark.trio
async def test_few_run_at_a_time_and_not_too_many_wait() -> None:
    async with working() as jobs:
        works = [Doing(str(number)) for number in range(jobs_module.MAX_WAITING)]
        started = [jobs.start(work) for work in works]
        await trio.testing.wait_all_tasks_blocked()
        assert [work.running for work in works[:3]] == [True, True, False], "first come, first served"
        assert sum(work.running for work in works) == jobs_module.AT_ONCE
        with pytest.raises(Unavailable, match="no more are taken"):
            jobs.start(Doing("one more"))
        for work in works:
            work.go.set()
        for job in started:
            assert await ended(job) == "done"
        for number in range(jobs_module.MAX_ENDED + 5):
            work = Doing(f"later {number}")
            work.go.set()
            await ended(jobs.start(work))
        assert len(jobs.all()) == jobs_module.MAX_ENDED


@pytest.mark.trio
async def test_how_a_job_ends(expected_log_errors: Any) -> None:
    expected_log_errors("a job failed in an unforeseen way")
    group = ExceptionGroup("", [ExceptionGroup("", [Unavailable("gone")])])
    cases = [
        (Doing("a", error=NotFound("no such")), "failed", "NotFound"),
        (Doing("b", error=group), "failed", "Unavailable"),
        (Doing("c", error=ValueError("x")), "failed", HeliosError.code),
        (Doing("d", failed=True), "failed", None),
        (Doing("e"), "done", None),
    ]
    async with working() as jobs:
        for work, state, code in cases:
            work.go.set()
            job = jobs.start(work)
            assert await ended(job) == state
            error = job.document(jobs.now())["error"]
            assert (error and error["code"]) == code


@pytest.mark.trio
async def test_cancelled_jobs_have_let_go_and_closed_ones_take_no_more() -> None:
    async with working() as jobs:
        first, waiting = Doing("a"), [Doing(str(number)) for number in range(4)]
        job = jobs.start(first)
        others = [jobs.start(work) for work in waiting]
        await trio.testing.wait_all_tasks_blocked()
        await jobs.cancel(job)
        assert (job.state, first.left) == ("cancelled", True)
        await jobs.cancel(job)
        await jobs.close()
        assert {other.state for other in others} == {"cancelled"}
        assert jobs.active == 0
        with pytest.raises(Conflict, match="being drained"):
            jobs.start(Doing("b"))
        jobs.reopen()
        assert jobs.start(Doing("b")).state == "running"


def test_rates_of_numbers_that_come_and_go() -> None:
    now = 0.0
    rates = Rates(lambda: now)
    assert rates.rate("a") == rates.grown("a") == 0.0
    for second in range(0, 200, 2):
        now = float(second)
        values = {"a": 100.0 * second}
        if second >= 190:
            values["late"] = 1000.0 + 7 * second
        rates.feed(values)
    assert rates.rate("a") == 100.0
    assert rates.rate("late") == 7.0
    assert rates.grown("a") == 100 * SPAN_S
    assert rates.grown("gone") == 0.0
    now += RATE_S
    rates.feed({"a": 0.0})
    assert rates.rate("a") == rates.grown("a") == 0.0, "a number that fell is no rate"
    assert len(rates._samples) <= SPAN_S / 2 + 2


class NoDrain:
    """Draining as the jobs see it."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.draining = jobs, False

    async def begin(self) -> None:
        self.draining = True
        await self.jobs.close()


@asynccontextmanager
async def process(
    path: Path, mount: int = 1, made: list[Doing] | None = None
) -> AsyncIterator[tuple[Jobs, Remembered]]:
    """What serves a mount, until it is killed."""

    async def make(wish: Wish) -> Work:
        if wish.commit == "unknown":
            raise NotFound("no such commit")
        work = Doing(wish.commit or "")
        if made is not None:
            made.append(work)
        return work

    jobs = Jobs()
    remembered = Remembered(path, mount, jobs, NoDrain(jobs), make)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(jobs.run)
        await nursery.start(remembered.run)
        yield jobs, remembered
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_the_next_process_goes_on_with_what_is_not_done(tmp_path: Path) -> None:
    path = tmp_path / "work"
    async with process(path) as (jobs, remembered):
        done, job = Doing("a"), jobs.start(Doing("b"))
        jobs.start(done)
        jobs.start(Doing("unknown"))
        await remembered.save()
        done.go.set()
        await trio.sleep(0.2)
    made: list[Doing] = []
    async with process(path, made=made) as (jobs, _):
        await trio.sleep(0.2)
        assert [each.id for each in jobs.all()] == [job.id], "what was done, or is gone, is not begun again"
    async with process(path, mount=2, made=made) as (jobs, _):
        await trio.sleep(0.2)
        assert len(made) == 1, "a mount that was made anew begins with nothing"
    path.write_bytes(b"torn")
    async with process(path) as (jobs, remembered):
        assert not jobs.all()
        jobs.start(Doing("c"))
        await remembered.save()
    assert b'"c"' in path.read_bytes()


@pytest.mark.trio
async def test_a_job_that_takes_its_process_along_is_given_up(
    tmp_path: Path, expected_log_errors: Callable[[str], None]
) -> None:
    expected_log_errors("interrupted too often")
    path, made = tmp_path / "work", list[Doing]()
    async with process(path) as (jobs, remembered):
        jobs.start(Doing("a"))
        await remembered.save()
    for _ in range(RESUMES + 2):
        async with process(path, made=made):
            await trio.sleep(0.1)
    assert len(made) == RESUMES
    assert read_record(path, MAGIC, Kept()).jobs == []


@pytest.mark.trio
async def test_draining_is_remembered_and_so_is_its_end(tmp_path: Path) -> None:
    path = tmp_path / "work"
    async with process(path) as (jobs, remembered):
        await remembered._drain.begin()
        await remembered.save()
    async with process(path) as (jobs, remembered):
        assert remembered._drain.draining
        with pytest.raises(Conflict):
            jobs.start(Doing("a"))
        remembered._drain.draining = False
        await remembered.save()
    async with process(path) as (jobs, remembered):
        assert not remembered._drain.draining
