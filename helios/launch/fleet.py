"""The workers of one model: started together, started again when one ends (``restarts`` decides), ended together.

One thread owns it and calls ``step`` several times a second. A worker keeps its port, so the router needs not be told:
it sees by itself that one is down, and that it is back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol

from helios.errors import HeliosError
from helios.launch.plan import Placement
from helios.launch.restarts import Restarts
from helios.launch.vllm import POLL_S, Starting, Vllm

STUCK: Final = -1
"""The status of a worker that has not ended, and has to."""


class Starts(Protocol):
    """Starts workers and ends them."""

    def start(self, placement: Placement) -> Vllm:
        """Start a worker, at the same port each time, without waiting for it."""
        ...

    def stop(self, workers: Sequence[Vllm]) -> None:
        """End them at the same time and wait for that; for those that have ended it is no harm."""
        ...


class Follows(Protocol):
    """Follows the start of a worker, as ``vllm.Starting`` does."""

    @property
    def doing(self) -> str:
        """What it is doing now, for people."""
        ...

    def look(self, show: Callable[[str], None]) -> bool:
        """Whether it takes requests; ``show`` hears what it is doing if that has changed."""
        ...

    def ended(self, status: int) -> HeliosError:
        """The error of one that ended with an exit status before it was ready."""
        ...

    def late(self, timeout_s: float) -> HeliosError:
        """The error of one that was not ready in time."""
        ...

    def close(self) -> None:
        """Stop following."""
        ...


@dataclass(slots=True)
class _Member:
    placement: Placement
    worker: Vllm
    starting: Follows | None
    """None: it has been ready since, or has ended."""
    late_at: float
    restarts: Restarts = field(default_factory=Restarts)
    was_up: bool = False
    again_at: float | None = None
    """It has ended and is to be started then."""


class Fleet:
    """Owns the workers that it starts; leaving the context ends them."""

    def __init__(
        self, starts: Starts, placements: Sequence[Placement], start_timeout_s: float, note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic, follow: Callable[[Vllm], Follows] = Starting,
    ) -> None:  # fmt: skip
        """``start_timeout_s``: longest start of one; ``note`` tells people what happens later; ``follow`` says when a
        worker that was started takes requests."""
        self._follow = follow
        self._starts, self._placements = starts, placements
        self._start_timeout_s, self._note, self._clock = start_timeout_s, note, clock
        self._members: list[_Member] = []

    def __enter__(self) -> Fleet:
        try:
            for placement in self._placements:
                worker = self._starts.start(placement)
                late_at = self._clock() + self._start_timeout_s
                self._members.append(_Member(placement, worker, self._follow(worker), late_at))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        for member in self._members:
            if member.starting is not None:
                member.starting.close()
        self._starts.stop([member.worker for member in self._members])

    @property
    def workers(self) -> list[Vllm]:
        """As they were started last, in the order of the placements."""
        return [member.worker for member in self._members]

    @property
    def up(self) -> bool:
        """Whether all take requests now, as far as was seen at the last step."""
        return all(member.starting is None and member.again_at is None for member in self._members)

    @property
    def doing(self) -> str:
        """What those do that do not take requests now, for people."""
        return self._doing(lambda member: member.starting is not None or member.again_at is not None)

    def wait_ready(self, show: Callable[[str], None]) -> None:
        """Wait until each has been ready once, telling ``show`` what they are doing. Raises what ``step`` raises."""
        shown = ""
        while not all(member.was_up for member in self._members):
            self.step()
            doing = self._doing(lambda member: not member.was_up)
            if doing not in ("", shown):
                shown = doing
                show(doing)
            time.sleep(POLL_S)

    def step(self) -> None:
        """Do what is due. Raises Unavailable, with the end of its log, for a worker that can't be started, and
        DeadlineExceeded for one whose first start takes too long."""
        for member in self._members:
            if member.again_at is not None:
                if self._clock() >= member.again_at:
                    self._start_again(member)
            elif (status := member.worker.child.poll()) is not None:
                self._ended(member, status, f"ended with status {status}")
            elif member.starting is not None:
                self._look(member, member.starting)

    def _look(self, member: _Member, starting: Follows) -> None:
        if starting.look(lambda text: None):
            starting.close()
            member.starting = None
            member.restarts.up(self._clock())
            if member.was_up:
                self._note(f"{member.placement.name} answers again.")
            member.was_up = True
        elif self._clock() > member.late_at:
            if not member.was_up:
                raise starting.late(self._start_timeout_s)
            self._ended(member, STUCK, f"was not ready after {self._start_timeout_s:g} s")

    def _ended(self, member: _Member, status: int, how: str) -> None:
        child, now = member.worker.child, self._clock()
        again_at = member.restarts.ended(now, status)
        if again_at is None:
            assert member.starting is not None  # only who was never ready is given up
            error = member.starting.ended(status)
            error.message = (
                f"{member.placement.name} can't be started (tries: {member.restarts.tries}): {error.message}"
            )
            raise error
        if member.starting is not None:
            member.starting.close()
            member.starting = None
        self._starts.stop([member.worker])
        member.again_at = again_at
        self._note(
            f"{member.placement.name} {how}; it is started again in {again_at - now:.0f} s. "
            f"The end of {child.log}:\n{child.tail(5)}"
        )

    def _start_again(self, member: _Member) -> None:
        member.again_at = None
        member.worker = self._starts.start(member.placement)
        member.starting = self._follow(member.worker)
        member.late_at = self._clock() + self._start_timeout_s

    def _doing(self, these: Callable[[_Member], bool]) -> str:
        """What ``these`` do, which are not ready, for people."""
        found: dict[str, list[str]] = {}
        for member in self._members:
            if these(member):
                doing = "starting again" if member.starting is None else member.starting.doing
                found.setdefault(doing, []).append(member.placement.name.removeprefix("vllm-"))
        if len(self._members) == 1:
            return next(iter(found), "")
        return ", ".join(f"{' and '.join(names)}: {doing}" for doing, names in found.items())
