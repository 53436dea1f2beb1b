"""Work that somebody asked a mount for and that goes on when they are gone: warming, verifying.

All methods run on the trio loop. A job is known by what it is to do: asking for the same again while it runs is the
same job. A few run at a time, more wait; those that are over are remembered for a while.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
import trio

from helios.errors import Conflict, HeliosError, NotFound, Unavailable

log = logging.getLogger("heliosfs.control")

AT_ONCE: Final = 2
"""Jobs of one kind that run at a time."""

MAX_WAITING: Final = 64
"""Jobs that run or wait; one more is refused."""

MAX_ENDED: Final = 64
"""Jobs that are over and remembered."""

ACTIVE: Final = frozenset({"waiting", "running"})


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody asked for: a job of this kind, of a commit (of everything: None) that was named ``revision``."""

    kind: str
    repo: str | None = None
    commit: str | None = None
    revision: str = ""
    patterns: tuple[str, ...] = ()


class Work(Protocol):
    """What a job does."""

    @property
    def kind(self) -> str:
        """``warm`` or ``verify``."""

    @property
    def wish(self) -> Wish:
        """The same, for the process that serves the mount next."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What is to be done; it never changes, and the same is the same job."""

    def shown(self) -> Mapping[str, Any]:
        """How far it is, and what it found."""

    @property
    def failed(self) -> bool:
        """Whether what it found is a failure."""

    async def run(self) -> None:
        """Do it. A HeliosError that leaves it is how the job failed."""


@dataclass(slots=True, eq=False)
class Job:
    """``state``: waiting, running, done, failed or cancelled; times in seconds of the jobs' clock."""

    id: str
    work: Work
    asked: float
    state: str = "waiting"
    error: HeliosError | None = None
    began: float | None = None
    ended: float | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)

    @property
    def active(self) -> bool:
        """Whether it runs or waits."""
        return self.state in ACTIVE

    def document(self, now: float) -> dict[str, Any]:
        """What the control API says of it."""
        began = self.began if self.began is not None else now
        error = None if self.error is None else {"code": self.error.code, "message": self.error.message}
        about: dict[str, Any] = {"id": self.id, "kind": self.work.kind, "state": self.state, **self.work.about}
        seconds = round((self.ended if self.ended is not None else now) - began, 3)
        return about | {"seconds": seconds, "error": error} | dict(self.work.shown())


class Jobs:
    """The jobs of one mount. ``run`` owns their tasks."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self._waiting: dict[str, deque[Job]] = {}
        self._running: Counter[str] = Counter()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._closed = False
        self.changed = trio.Event()
        """Set when a job is over; whoever waits for it puts another one here."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do what is asked for, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start(self, work: Work) -> Job:
        """Have this done; returns the job that does it, which may be under way already.

        Raises Conflict while no jobs are taken, Unavailable when there are too many.
        """
        name = identity(work)
        job = self._jobs.get(name)
        if job is not None and job.active:
            return job
        if self._closed:
            raise Conflict("the mount is being drained and takes no new work", hint="`helios drain --undo` ends that.")
        if self._nursery is None:
            raise Unavailable("the mount is not ready yet, or ends")
        if self.active >= MAX_WAITING:
            raise Unavailable(f"{self.active} jobs run or wait, and no more are taken", hint="Cancel some.")
        job = self._jobs[name] = Job(name, work, self._clock())
        self._jobs.move_to_end(name)
        self._waiting.setdefault(work.kind, deque()).append(job)
        self._advance(work.kind)
        return job

    def get(self, kind: str, name: str) -> Job:
        """The job with this id, or the latest of this commit. Raises NotFound."""
        job = self._jobs.get(name)
        if job is not None and job.work.kind == kind:
            return job
        for other in reversed(self._jobs.values()):
            if other.work.kind == kind and other.work.about.get("commit") == name:
                return other
        raise NotFound(f"there is no {kind} job {name}")

    def all(self, kind: str | None = None) -> list[Job]:
        """Those that are known, the latest last."""
        return [job for job in self._jobs.values() if kind in (None, job.work.kind)]

    async def cancel(self, job: Job) -> None:
        """End a job; returns when it has let go of everything."""
        if job.state == "waiting":
            self._waiting[job.work.kind].remove(job)
            self._over(job, "cancelled")
        job.scope.cancel()
        await job.over.wait()

    @property
    def active(self) -> int:
        """Jobs that run or wait."""
        return sum(job.active for job in self._jobs.values())

    async def close(self) -> None:
        """End all jobs and take no new ones, until ``reopen``."""
        self._closed = True
        for job in self.all():
            await self.cancel(job)

    def reopen(self) -> None:
        """Take jobs again."""
        self._closed = False

    def now(self) -> float:
        """The time by the jobs' clock."""
        return self._clock()

    def _advance(self, kind: str) -> None:
        """Begin those that waited longest, as many as may run."""
        waiting = self._waiting.get(kind)
        while waiting and self._running[kind] < AT_ONCE and self._nursery is not None:
            job = waiting.popleft()
            job.state, job.began = "running", self._clock()
            self._running[kind] += 1
            self._nursery.start_soon(self._do, job)

    async def _do(self, job: Job) -> None:
        state = "cancelled"
        try:
            with job.scope:
                state = await self._result(job)
        finally:
            self._running[job.work.kind] -= 1
            self._over(job, state)
            self._advance(job.work.kind)

    def _over(self, job: Job, state: str) -> None:
        job.state, job.ended = state, self._clock()
        job.over.set()
        self.changed.set()
        over = [name for name, other in self._jobs.items() if not other.active]
        for name in over[: max(0, len(over) - MAX_ENDED)]:
            del self._jobs[name]
        about = {"kind": job.work.kind, "job": job.id, "state": state, **job.work.about}
        log.info("a job is over", extra=about)

    async def _result(self, job: Job) -> str:
        try:
            await job.work.run()
        except HeliosError as error:
            job.error = error
        except Exception as error:
            if isinstance(error, ExceptionGroup) and (known := _known(error)) is not None:
                job.error = known
            else:
                log.exception("a job failed in an unforeseen way", extra={"kind": job.work.kind, "job": job.id})
                job.error = HeliosError(f"it failed: {error!r}; the log says more")
        return "failed" if job.error is not None or job.work.failed else "done"


def identity(work: Work) -> str:
    """A short name of what is to be done: the same for the same."""
    text = repr((work.kind, sorted(work.about.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _known(group: ExceptionGroup[Exception]) -> HeliosError | None:
    """An error of ours in a group."""
    for error in group.exceptions:
        found = _known(error) if isinstance(error, ExceptionGroup) else error
        if isinstance(found, HeliosError):
            return found
    return None
