"""The queue as a process sees it that is one of several: the control process owns it (``line_owner``).

Whoever waits here is known here, too, in queues of this process alone, which say what becomes of him: he leaves, his
deadline comes, he is called. The owner is told of him, and says when it is his turn. While the owner is not heard of
though somebody waits (``SILENT_S``), these queues serve by themselves what gets free, each process its own part, so
nobody is stuck; a new owner is told of all of them again.

Requests that need not wait are told of in sums for each tenant, and at once before one that waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from router.admission.line import Here
from router.admission.line_words import (
    Anew,
    Back,
    Call,
    Freed,
    FromOwner,
    Left,
    Out,
    Passed,
    Queues,
    Stand,
    Standing,
    ToOwner,
)
from router.admission.queue import MAX_RETRY_S, Claim, FairQueue, Room, Ticket, Waiting, retry_after_s
from router.worker import Worker

SILENT_S: Final = 2.0
"""An owner that says nothing for so long while somebody waits is not waited for, in seconds."""
PASSED_S: Final = 0.5
"""How often it is told who did not have to wait, in seconds."""
AGAIN_S: Final = 5.0
"""Somebody whom the owner has not named for so long is said again, in seconds."""
MAX_PASSED: Final = 1024
"""So many sums are told at once, whenever that is."""


class Bounds:
    """What may wait: in all processes together, and in this one while it is on its own. ``most``: of a model."""

    def __init__(self, requests: int, size: int, processes: int, most: Callable[[str], float]) -> None:
        self.requests, self.bytes, self._most, self._processes = requests, size, most, processes
        # Rounded up: one that may wait at all has a place in each process.
        self.own_requests, self.own_bytes = -(-requests // processes), -(-size // processes)

    def own_most(self, model: str) -> float:
        most = self._most(model)
        return most if math.isinf(most) else -(-most // self._processes)


class _Place:
    """Somebody who waits here: what the queue of this process tells him, and what the owner has to know of it."""

    def __init__(self, line: There, number: int, model: str, owner: Waiting) -> None:
        self.line, self.number, self.model, self.owner = line, number, model, owner
        self.ticket: Ticket | None = None
        self.ahead = -1
        """How many are before him, as the owner said last; -1: it has not."""
        self.heard_at = 0.0
        """When the owner named him last, or was told of him."""

    def called(self) -> None:
        self.line.over(self)
        self.owner.called()

    def waits_for(self, waking: bool) -> None:
        self.owner.waits_for(waking)

    def pushed_out(self) -> None:
        self.line.over(self)
        self.owner.pushed_out()

    def refused(self) -> None:
        self.line.over(self)
        self.owner.refused()


class There:
    """A ``Line``. ``say`` sends words to the owner; ``clock`` is the machine's."""

    def __init__(
        self, bounds: Bounds, free: Callable[[str], bool], noted: Callable[[str, FairQueue], None],
        clock: Callable[[], float], say: Callable[[ToOwner], None],
    ) -> None:  # fmt: skip
        self._bounds, self._free, self._clock, self._say = bounds, free, clock, say
        self.room = Room(bounds.requests, bounds.bytes)
        self._here = Here(self.room, free, self._most, noted, clock)
        self._places: dict[int, _Place] = {}
        """By number, so those who came first come first."""
        self._number = 0
        self._busy: frozenset[str] = frozenset()
        """Models for which somebody waits, as the owner said last."""
        self._told: dict[str, tuple[int, float]] = {}
        """Of a model: how many wait, and how many go in a second."""
        self._passed: dict[tuple[str, str, int, float], list[float]] = {}
        """Tokens and requests that did not have to wait, by model, tenant, rank and weight."""
        self._passed_at = clock()
        self._owned = False
        self._unanswered: float | None = None
        """Since when the owner has said nothing though somebody waits; None: it has, or nobody does."""
        self.alone = False
        """Whether this process goes by its own queues."""

    # --- as a line ---

    def waits(self, model: str) -> bool:
        return (not self.alone and model in self._busy) or self._here.waits(model)

    def passed(self, model: str, claim: Claim) -> None:
        key = model, str(claim.tenant), claim.rank, claim.weight
        known = self._passed.get(key)
        if known is None:
            if len(self._passed) >= MAX_PASSED:
                self._say_passed()
            known = self._passed[key] = [0.0, 0.0]
        known[0] += claim.cost
        known[1] += 1.0

    def push(self, model: str, owner: Waiting, claim: Claim) -> Ticket:
        self._number += 1
        place = _Place(self, self._number, model, owner)
        ticket = place.ticket = self._here.push(model, place, claim)
        self._places[place.number] = place
        if self._unanswered is None:
            self._unanswered = self._clock()
        self._say_passed()
        self._stand(place, again=False)
        return ticket

    def leave(self, model: str, ticket: Ticket) -> None:
        place = ticket.owner
        if isinstance(place, _Place) and place.number in self._places:
            self._here.leave(model, ticket)
            self.over(place)

    def ahead(self, model: str, ticket: Ticket) -> int:
        place = ticket.owner
        told = place.ahead if isinstance(place, _Place) and not self.alone else -1
        return told if told >= 0 else self._here.ahead(model, ticket)

    def waiting(self, model: str) -> int:
        here = self._here.waiting(model)
        return here if self.alone else max(here, self._told.get(model, (0, 0.0))[0])

    def retry_after_s(self, model: str, ahead: int) -> int:
        told = self._told.get(model)
        return MAX_RETRY_S if told is None else retry_after_s(told[1], ahead)

    def freed(self, worker: Worker) -> None:
        if self.alone:
            self._here.freed(worker)
        elif self._busy:
            for model in worker.names | worker.pinned:
                if model in self._busy:
                    self._tell(Freed(model))

    def tick(self) -> None:
        now = self._clock()
        if not self._places:
            self._unanswered = None
        elif self._unanswered is not None and now - self._unanswered >= SILENT_S:
            self._be(alone=True)
        if self.alone:
            self._here.tick()
        if now - self._passed_at >= PASSED_S:
            self._say_passed()
            for place in self._places.values():
                if now - place.heard_at >= AGAIN_S:  # what was said of him is lost
                    self._stand(place, again=True)

    def models(self) -> list[str]:
        return self._here.models()

    def tickets(self, model: str) -> list[Ticket]:
        return self._here.tickets(model)

    # --- what the owner says ---

    def owned(self, known: bool) -> None:
        """Another control process owns the queue from now on, and knows nothing yet; or (not ``known``) none does."""
        self._owned = known
        if known:
            self._tell(Anew())
            for place in self._places.values():
                self._stand(place, again=True)

    def hear(self, word: FromOwner) -> None:
        """One word of the owner."""
        self._unanswered = self._clock() if self._places else None
        self._be(alone=False)
        if isinstance(word, Queues):
            self._busy = frozenset(word.models)
        elif isinstance(word, Standing):
            self._stands(word)
        else:
            place = self._places.get(word.place)
            if place is None:
                self._tell(Left(word.place))
            elif isinstance(word, Out):
                self._told[place.model] = word.waiting, word.rate
                self._take_out(place)
                if word.refused:
                    place.owner.refused()
                else:
                    place.owner.pushed_out()
            else:
                assert isinstance(word, Call)
                self._called(place)

    def _called(self, place: _Place) -> None:
        if not self._free(place.model):
            self._tell(Back(place.number))
            return
        self._take_out(place)
        place.owner.called()
        self._tell(Left(place.number))  # it counts at its worker by now

    def _stands(self, word: Standing) -> None:
        self._told[word.model] = word.waiting, word.rate
        known, now = dict(word.ahead), self._clock()
        for number in [number for number in known if number not in self._places]:
            self._tell(Left(number))
        for place in self._places.values():
            if place.model == word.model:
                place.ahead = known.get(place.number, -1)
                if place.ahead >= 0:
                    place.heard_at = now

    # --- what the owner is told ---

    def over(self, place: _Place) -> None:
        """Somebody is out of the queues of this process."""
        if self._places.pop(place.number, None) is not None:
            self._tell(Left(place.number))

    def _take_out(self, place: _Place) -> None:
        """Of the queues of this process, as the owner said."""
        assert place.ticket is not None
        del self._places[place.number]
        self._here.leave(place.model, place.ticket)

    def _stand(self, place: _Place, again: bool) -> None:
        assert place.ticket is not None
        claim, place.heard_at = place.ticket.claim, self._clock()
        self._tell(Stand(
            place.number, place.model, str(claim.tenant), claim.rank, claim.weight, claim.cost, claim.size,
            place.ticket.since, again,
        ))  # fmt: skip

    def _tell(self, word: ToOwner) -> None:
        if self._owned:
            self._say(word)

    def _say_passed(self) -> None:
        self._passed_at = self._clock()
        if self._passed:
            sums, self._passed = self._passed, {}
            for (model, tenant, rank, weight), (cost, requests) in sums.items():
                self._tell(Passed(model, tenant, rank, weight, cost, int(requests)))

    def _most(self, model: str) -> float:
        """How many of a model may wait here: the owner says it, who knows of all and when a place is to be expected."""
        return self._bounds.own_most(model) if self.alone else math.inf

    def _be(self, alone: bool) -> None:
        if self.alone is not alone:
            self.alone, bounds = alone, self._bounds
            self.room.max_requests = bounds.own_requests if alone else bounds.requests
            self.room.max_bytes = bounds.own_bytes if alone else bounds.bytes
