"""What the registry says of models: asked in the background, remembered, told when it is something new.

``Memory`` is the part without I/O and clock: what is asked for, when it is due, what an answer means. ``Answers`` asks
(``GET`` and ``POST /api/v1/where``, ``GET /api/v1/signature``; docs/native-api.md) in threads, a few at a time. All of
it belongs to the event loop's thread; the blocking calls share nothing with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from helios.errors import DeadlineExceeded, HeliosError, Unavailable
from helios.names import RepoId
from helios.registry_answers import Place
from helios.registry_client import RegistryClient
from orchestrator.reconcile.observed import Answer, Facts

log = logging.getLogger("helios.operator")

TICK_S: Final = 0.5
"""How often is looked for what has become due, in seconds."""
FETCHING_S: Final = 3.0
"""How often is asked how far a fetch is, in seconds."""
RETRY_S: Final = (2.0, 60.0)
"""First and longest wait after a failure, in seconds; each is twice the one before."""
FACTS_S: Final = 60.0
"""How often is asked whether a commit has been signed meanwhile, in seconds."""
FORGET_S: Final = 3600.0
"""What nobody asked for in so long is forgotten, in seconds."""
MOST: Final = 10_000
"""Questions that are remembered."""
AT_ONCE: Final = 8
"""Calls under way at a time."""
UNREACHABLE: Final = "RegistryUnreachable"


class Question(msgspec.Struct, frozen=True, order=True):
    """``rev`` of ``repo``, or with ``facts`` what there is to know of a commit. ``pull``: it may be fetched."""

    repo: str
    rev: str
    pull: bool = False
    facts: bool = False


class Heard(msgspec.Struct, frozen=True):
    """What the registry answered: ``place``, and for facts ``signer``; or ``error``."""

    place: Place | None = None
    signer: str | None = None
    error: HeliosError | None = None


class _Known:
    """What is known of one question."""

    def __init__(self, now: float) -> None:
        self.used, self.due, self.every_s = now, now, FACTS_S
        self.asked = False
        self.failures = 0
        self.since = 0.0
        self.answer: Answer | None = None
        self.facts: Facts | None = None


class Memory:
    """Questions and their answers. Times are Unix seconds."""

    def __init__(self) -> None:
        self._known: dict[Question, _Known] = {}

    def look(self, question: Question, now: float, every_s: float) -> _Known:
        """What is known; it is asked for from now on, as often as ``every_s`` says."""
        known = self._known.get(question)
        if known is None:
            if len(self._known) >= MOST:
                oldest = min(self._known, key=lambda one: self._known[one].used)
                del self._known[oldest]
            known = self._known[question] = _Known(now)
        known.used = now
        if every_s < known.every_s and not known.failures:
            known.due = min(known.due, now + every_s)
        known.every_s = every_s
        return known

    def due(self, now: float, most: int) -> list[Question]:
        """What is to be asked now, the longest due first; each is ``heard`` of before it is due again."""
        for question in [one for one, known in self._known.items() if now - known.used > FORGET_S]:
            del self._known[question]
        for known in self._known.values():  # the clock may have been set back
            known.due = min(known.due, now + max(known.every_s, RETRY_S[1]))
        ready = [one for one, known in self._known.items() if not known.asked and known.due <= now]
        chosen = sorted(ready, key=lambda one: (self._known[one].due, one))[:most]
        for question in chosen:
            self._known[question].asked = True
        return chosen

    def heard(self, question: Question, heard: Heard, now: float) -> bool:
        """Whether what is known is another thing now."""
        known = self._known.get(question)
        if known is None:
            return False
        before = known.answer, known.facts
        known.asked = False
        if heard.error is not None:
            known.failures += 1
            known.due = now + min(RETRY_S[1], max(RETRY_S[0], 1.0) * 2 ** min(known.failures - 1, 10))
            known.since = known.since or now
            if question.facts:
                if known.facts is None or known.facts.problem:
                    known.facts = Facts(0, None, _reason(heard.error), heard.error.message)
            else:
                known.answer = Answer(None, now, _reason(heard.error), heard.error.message, known.since)
        else:
            known.failures = 0
            known.due = now + known.every_s
            self._told(question, known, heard, now)
        return _different(before, (known.answer, known.facts))

    def _told(self, question: Question, known: _Known, heard: Heard, now: float) -> None:
        place = heard.place
        assert place is not None
        if question.facts and place.state == "nowhere":
            known.facts = Facts(0, None, *_missing(question, place))
            return
        if question.facts:
            known.facts = Facts(place.bytes or 0, heard.signer)
            return
        if place.state == "here" and place.commit is not None:
            known.since, known.answer = 0.0, Answer(place.commit, now)
            return
        known.since = known.since or now
        known.answer = Answer(None, now, *_missing(question, place), known.since)
        if known.answer.problem == "Fetching":
            known.due = now + FETCHING_S


def _different(before: tuple[Answer | None, Facts | None], after: tuple[Answer | None, Facts | None]) -> bool:
    """Whether a reconciler would see something new: when it was heard is nothing of that kind."""

    def plain(answer: Answer | None) -> Answer | None:
        return None if answer is None else msgspec.structs.replace(answer, checked_at=0.0)

    return (plain(before[0]), before[1]) != (plain(after[0]), after[1])


def _reason(error: HeliosError) -> str:
    return UNREACHABLE if isinstance(error, Unavailable | DeadlineExceeded) else error.code


def _missing(question: Question, place: Place) -> tuple[str, str]:
    """Reason and message for a revision that is not all at the registry."""
    if place.state == "nowhere":
        return "NotFound", place.reason or "neither the registry nor its upstream has it"
    if place.state == "unknown":
        return "UpstreamUnreachable", place.reason or "the registry can't say whether its upstream has it"
    if not question.pull:
        return "NotHere", "it is not all at the registry, and spec.source.pull is Never: helios pull brings it"
    tenths = place.held * 10 // place.bytes if place.bytes else 0
    return "Fetching", f"the registry fetches it{f': {tenths * 10}%' if place.bytes else ''}"


class Answers:
    """A ``Registry``. ``changed`` is told of a repository of which something new is known, on the event loop."""

    def __init__(
        self, clients: Sequence[RegistryClient], changed: Callable[[str], None], *,
        wall: Callable[[], float] = time.time, tick_s: float = TICK_S,
    ) -> None:  # fmt: skip
        """``clients``: of the same registry, one address each; the next is asked where one can't be reached."""
        self._clients, self._changed, self._wall, self._tick_s = tuple(clients), changed, wall, tick_s
        self._first = 0
        """Who answered last; threads may write it together, any of them is as good."""
        self._memory = Memory()
        self._free = AT_ONCE
        self._more = asyncio.Event()
        """There may be something to ask before the next tick."""

    def answer(self, repo: str, revision: str, pull: bool, every_s: float) -> Answer | None:
        return self._look(Question(repo, revision, pull), every_s).answer

    def facts(self, repo: str, commit: str) -> Facts | None:
        return self._look(Question(repo, commit, facts=True), FACTS_S).facts

    def _look(self, question: Question, every_s: float) -> _Known:
        now = self._wall()
        known = self._memory.look(question, now, every_s)
        if self._free and known.due <= now and not known.asked:
            self._more.set()
        return known

    async def run(self) -> None:
        """Ask, until it is cancelled. Calls under way end by their own deadlines, which the client has."""
        async with asyncio.TaskGroup() as group:
            while True:
                for question in self._memory.due(self._wall(), self._free):
                    self._free -= 1
                    group.create_task(self._ask(question))
                self._more.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._tick_s):
                        await self._more.wait()

    async def _ask(self, question: Question) -> None:
        try:
            heard = await asyncio.to_thread(self._call, question)
        finally:
            self._free += 1
            self._more.set()
        if self._memory.heard(question, heard, self._wall()):
            self._changed(question.repo)

    def _call(self, question: Question) -> Heard:
        first, count = self._first, len(self._clients)
        heard = Heard()
        for number in range(first, first + count):
            heard = self._asked(self._clients[number % count], question)
            if not isinstance(heard.error, Unavailable):
                self._first = number % count
                break
        return heard

    def _asked(self, client: RegistryClient, question: Question) -> Heard:
        try:
            repo = RepoId.parse(question.repo)
            place = client.where(repo, question.rev)
            if question.facts:
                return Heard(place, client.signer(repo, question.rev))
            if question.pull and place.state in ("partial", "upstream"):
                place = client.fetch(repo, question.rev)
            return Heard(place)
        except HeliosError as error:
            return Heard(error=error)
