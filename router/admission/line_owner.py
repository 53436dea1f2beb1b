"""The one queue of a router of several processes, which the control process owns: who is next, whoever he came to.

It hears of those who wait (``Stand``) and of sums of those who need not (``Passed``), and calls the first while a
worker of his model has a place. How many places there are is read where all processes count what is under way (the
board), less those that were given and not taken yet: who is called answers that he counts there (``Left``), or that
there was no place (``Back``), and is the first again. So nothing depends on hearing of a place that got free: that
(``Freed``) makes it quick, and ``tick`` looks at every queue ten times a second.

A process that answers no call for ``CALL_S`` is passed over until it says something: another one gets the place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

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
from router.admission.queue import Claim, FairQueue, Full, Room, Ticket

SETTLE_S: Final = 0.25
"""A new owner calls nobody for so long: all processes say first who waits."""
CALL_S: Final = 1.0
"""A call that was not answered after so long holds no place any more, in seconds."""
PAUSE_S: Final = 0.2
"""A process that had no place for somebody of a model is not asked again for so long, in seconds."""
TELL_S: Final = 1.0
"""How often all are told for which models somebody waits, and who waits where he stands: the latter less often..."""
LONGEST_S: Final = 4.0
"""...up to this, in seconds..."""
QUICK: Final = 2_000
"""...where more than so many wait, who would be put in order in a second."""

Send = Callable[[int, list[FromOwner]], None]
"""Tells a process, or (0) all."""


class _Place:
    """Somebody who waits, as his process numbered him."""

    __slots__ = ("asked_at", "called_at", "line", "member", "model", "number", "ticket")

    def __init__(self, line: LineOwner, member: int, number: int, model: str) -> None:
        self.line, self.member, self.number, self.model = line, member, number, model
        self.ticket: Ticket | None = None
        self.called_at: float | None = None
        self.asked_at = 0.0
        """When that was said last."""

    def called(self) -> None:
        raise NotImplementedError("who is called is told by a word")

    def waits_for(self, waking: bool) -> None:
        raise NotImplementedError("what he waits for, his process knows")

    def refused(self) -> None:
        self.line.out(self, refused=True)

    def pushed_out(self) -> None:
        self.line.out(self, refused=False)


class LineOwner:
    """One router's. ``places``: how many more requests the workers of a model may get now; ``most``: how many of a
    model may wait; ``clock``: the machine's."""

    def __init__(
        self, room: Room, places: Callable[[str], float], most: Callable[[str], float], send: Send,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.room, self._free, self._most, self._send, self._clock = room, places, most, send, clock
        self._queues: dict[str, FairQueue] = {}
        self._members: dict[int, dict[int, _Place]] = {}
        """Who waits or was called, by process and number."""
        self._calls: dict[str, dict[_Place, None]] = {}
        """Who was called and has not answered, by model, the oldest first."""
        self._late: set[int] = set()
        """Processes that don't answer."""
        self._paused: dict[tuple[int, str], float] = {}
        """Until when a process is not asked about a model."""
        self._from = math.inf
        """From when on it calls."""
        self._busy: set[str] = set()
        """Models of which all were told that somebody waits."""
        self._busy_at = -math.inf
        """When that was."""
        self._told: dict[str, float] = {}
        """When those who wait for a model were told where they stand..."""
        self._new: set[str] = set()
        """...and the models of those who have not been."""
        self._out: dict[int, list[FromOwner]] = {}

    # --- what the processes say ---

    def hear(self, member: int, words: Iterable[ToOwner]) -> None:
        """A process says this."""
        self._late.discard(member)
        if self._from == math.inf:
            self._from = self._clock() + SETTLE_S
        models: set[str] = set()
        for word in words:
            models |= self._heard(member, word)
        for model in models:
            self._serve(model)
        self._tell_busy(models)
        self._flush()

    def gone(self, member: int) -> None:
        """A process has ended: whoever waited there does not any more."""
        models = self._forget(member)
        self._late.discard(member)
        for model in models:
            self._serve(model)
        self._flush()

    def deposed(self) -> None:
        """Another control process owns the queue."""
        for member in list(self._members):
            self._forget(member)
        self._busy.clear()
        self._queues.clear()
        self.room.queues.clear()
        self._from = math.inf

    def tick(self) -> None:
        """Some time has passed."""
        now = self._clock()
        for calls in self._calls.values():
            for place in calls:
                if place.called_at is None or now - place.called_at < CALL_S:
                    break
                self._late.add(place.member)
                if now - place.asked_at >= CALL_S:  # the call may be lost, or its answer
                    place.asked_at = now
                    self._say(place.member, Call(place.number))
        self._paused = {key: until for key, until in self._paused.items() if until > now}
        waited = [model for model, queue in self._queues.items() if len(queue)]
        for model in waited:
            self._serve(model)
        self._tell_busy(waited)
        over = [model for model in self._busy if not len(self._queues[model])]
        self._busy.difference_update(over)
        if over or (self._busy and now - self._busy_at >= TELL_S):  # which shows that there is an owner, too
            self._say_busy()
        for model in waited:
            self._tell_standing(model, now)
        self._flush()

    @property
    def idle(self) -> bool:
        """Whether nobody waits, as everybody knows."""
        return not (self._busy or self.room.requests)

    # --- one word ---

    def _heard(self, member: int, word: ToOwner) -> set[str]:
        """The models of which somebody may be called now."""
        if isinstance(word, Stand):
            return self._stand(member, word)
        if isinstance(word, Left):
            place = self._members.get(member, {}).pop(word.place, None)
            return set() if place is None else self._leave(place)
        if isinstance(word, Back):
            return self._back(member, word.place)
        if isinstance(word, Freed):
            return {word.model}
        if isinstance(word, Passed):
            claim = Claim(word.tenant, word.rank, word.weight, word.cost, 0)
            self.queue(word.model).passed(claim, word.requests)
            return set()
        assert isinstance(word, Anew)
        models = self._forget(member)
        self._members[member] = {}
        self._say(member, Queues(sorted(self._busy)))
        return models

    def _stand(self, member: int, word: Stand) -> set[str]:
        places = self._members.setdefault(member, {})
        if word.place in places:
            return set()
        place = _Place(self, member, word.place, word.model)
        claim = Claim(word.tenant, word.rank, word.weight, word.cost, word.size)
        try:
            place.ticket = self.queue(word.model).push(place, claim, word.since, again=word.again)
        except Full:
            place.refused()
            return set()
        places[word.place] = place
        self._new.add(word.model)
        return {word.model}

    def _back(self, member: int, number: int) -> set[str]:
        place = self._members.get(member, {}).get(number)
        if place is None or place.called_at is None or place.ticket is None:
            return set()
        self._answered(place)
        self._queues[place.model].back(place.ticket)
        self._paused[member, place.model] = self._clock() + PAUSE_S
        return {place.model}

    def _leave(self, place: _Place) -> set[str]:
        """Somebody who is no more among those of his process."""
        assert place.ticket is not None
        if place.called_at is None:
            self._queues[place.model].leave(place.ticket)
        else:
            self._answered(place)
            self._queues[place.model].gone(place.ticket)
        return {place.model}

    def _forget(self, member: int) -> set[str]:
        models: set[str] = set()
        for place in self._members.pop(member, {}).values():
            models |= self._leave(place)
        return models

    # --- who is next ---

    def queue(self, model: str) -> FairQueue:
        """Those who wait for the model, whichever process they came to."""
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = FairQueue(self.room, self._clock, partial(self._most, model))
        return queue

    def _serve(self, model: str) -> None:
        """Call those who wait, while there is a place."""
        queue, now = self._queues.get(model), self._clock()
        if queue is None or not len(queue) or now < self._from:
            return
        calls = self._calls.setdefault(model, {})
        free = self._free(model) - sum(1 for place in calls if place.member not in self._late)
        while free >= 1 and (ticket := queue.call(self._able)) is not None:
            place = ticket.owner
            assert isinstance(place, _Place)
            place.called_at = place.asked_at = now
            calls[place] = None
            self._say(place.member, Call(place.number))
            free -= 1

    def _able(self, ticket: Ticket) -> bool:
        place = ticket.owner
        assert isinstance(place, _Place)
        return place.member not in self._late and (place.member, place.model) not in self._paused

    def _answered(self, place: _Place) -> None:
        place.called_at = None
        self._calls[place.model].pop(place, None)

    # --- what the processes are told ---

    def out(self, place: _Place, refused: bool) -> None:
        """Somebody has no place."""
        self._members.get(place.member, {}).pop(place.number, None)
        queue = self.queue(place.model)
        self._say(place.member, Out(place.number, refused, len(queue), queue.drain.rate()))

    def _tell_busy(self, models: Iterable[str]) -> None:
        new = {model for model in models if model in self._queues and len(self._queues[model])} - self._busy
        if new:
            self._busy |= new
            self._say_busy()

    def _say_busy(self) -> None:
        self._busy_at = self._clock()
        self._say(0, Queues(sorted(self._busy)))

    def _tell_standing(self, model: str, now: float) -> None:
        """Tell who waits where he stands, if it is time to."""
        queue = self._queues[model]
        least = min(len(queue) / QUICK, LONGEST_S)
        pause = least if model in self._new else max(TELL_S, least)
        if now - self._told.get(model, -math.inf) < pause or not len(queue):
            return
        self._told[model] = now
        self._new.discard(model)
        ahead: dict[int, list[tuple[int, int]]] = {}
        for index, ticket in enumerate(queue.order()):
            place = ticket.owner
            assert isinstance(place, _Place)
            ahead.setdefault(place.member, []).append((place.number, index))
        for member, places in ahead.items():
            self._say(member, Standing(model, len(queue), queue.drain.rate(), places))

    def _say(self, member: int, word: FromOwner) -> None:
        self._out.setdefault(member, []).append(word)

    def _flush(self) -> None:
        out, self._out = self._out, {}
        for member, words in out.items():
            self._send(member, words)
