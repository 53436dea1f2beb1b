"""Who is next: a bounded queue that is fair between tenants, for the requests of one model whose workers are busy.

Start-time fair queueing (P. Goyal, H. Vin, H. Cheng, SIGCOMM 1996), with tokens as the cost, since a request of a
hundred tokens is not one of a hundred thousand (Y. Sheng et al., "Fairness in Serving Large Language Models", OSDI
2024). Each tenant's requests are in order. The start tag of its first is the later of the virtual time when the tenant
began to wait and of the end tag of what it had served last; the end tag is start + cost / weight; the least start tag
is served, and the virtual time is that tag. While two tenants wait, what they get, each over its weight, differs by
no more than their largest costs over their weights; who was idle has saved up nothing. Requests that need not wait
pass through the same books, so what somebody took before the queue began counts. A tag is only given when its
request is first of its tenant, so who leaves the queue costs his tenant nothing.

Classes of priority come first, strictly: what must not starve under others is given a class of its own on purpose.

When the room is full, whoever has the most requests in it, for its weight and in the lowest class, loses its last
one (P. McKenney, "Stochastic Fairness Queueing", 1990: drop from the longest queue), unless that is the newcomer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Protocol

RATE_S: Final = 30.0
"""Over about so many seconds the rate at which the queue drains is averaged."""
MAX_RETRY_S: Final = 60


class Waiting(Protocol):
    """Somebody in the queue."""

    def called(self) -> None:
        """It is his turn; he is in the queue no more."""
        ...

    def waits_for(self, waking: bool) -> None:
        """What he waits for from now on: the model to come up, or a worker with less to do."""
        ...

    def pushed_out(self) -> None:
        """The place went to somebody else: he is in the queue no more."""
        ...

    def refused(self) -> None:
        """There was no place after all: he is in the queue no more."""
        ...


class Full(Exception):
    """There is no room, and nobody with less claim to it."""


class Claim:
    """What decides where somebody stands. ``rank``: lower first; ``cost`` in tokens; ``size``: bytes of the body."""

    __slots__ = ("cost", "rank", "size", "tenant", "weight")

    def __init__(self, tenant: Hashable, rank: int, weight: float, cost: float, size: int) -> None:
        self.tenant, self.rank, self.weight, self.cost, self.size = tenant, rank, weight, cost, size


class Room:
    """The bounds that the queues of all models share, in requests and bytes."""

    __slots__ = ("bytes", "max_bytes", "max_requests", "queues", "requests")

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests, self.max_bytes = max_requests, max_bytes
        self.requests = self.bytes = 0
        self.queues: list[FairQueue] = []

    def take(self, size: int) -> None:
        self.requests += 1
        self.bytes += size

    def give_back(self, size: int) -> None:
        self.requests -= 1
        self.bytes -= size

    def fits(self, size: int) -> bool:
        return self.requests < self.max_requests and self.bytes + size <= self.max_bytes


class Ticket:
    """A place in the queue; ``since`` when, in seconds."""

    __slots__ = ("claim", "owner", "since")

    def __init__(self, owner: Waiting, claim: Claim, since: float) -> None:
        self.owner, self.claim, self.since = owner, claim, since


class _Flow:
    """A tenant in one class. ``waiting`` keeps the order, and lets anybody leave at once."""

    __slots__ = ("end", "start", "waiting", "weight")

    def __init__(self) -> None:
        self.waiting: dict[Ticket, None] = {}
        self.start = self.end = 0.0
        self.weight = 1.0

    def enter(self, ticket: Ticket) -> None:
        last = next(reversed(self.waiting)) if self.waiting else None
        self.waiting[ticket] = None
        if last is not None and ticket.since < last.since:  # said again, after others who came later
            self.waiting = dict.fromkeys(sorted(self.waiting, key=_since))


class _Class:
    __slots__ = ("flows", "virtual")

    def __init__(self) -> None:
        self.flows: dict[Hashable, _Flow] = {}
        self.virtual = 0.0

    def serve(self, flow: _Flow, claim: Claim) -> None:
        """The books for one that goes: it stood first of its flow."""
        self.virtual = flow.start
        flow.end = flow.start + claim.cost / claim.weight
        flow.start = flow.end

    def forget_idle(self) -> None:
        """Flows whose end is past are as new ones; of others half are forgotten, those that are nearest to it."""
        idle = sorted((flow.end, index, tenant) for index, (tenant, flow) in enumerate(self.flows.items())
                      if not flow.waiting)  # fmt: skip
        for index, (end, _, tenant) in enumerate(idle):
            if end <= self.virtual or index < len(idle) // 2:
                del self.flows[tenant]


MAX_IDLE: Final = 256
"""From so many flows of a class on idle ones are forgotten."""


class FairQueue:
    """The queue of one model. ``clock`` gives seconds; ``most``: how many may wait in it, beside the room's bounds."""

    def __init__(self, room: Room, clock: Callable[[], float], most: Callable[[], float] = lambda: math.inf) -> None:
        self._room, self._clock, self._most = room, clock, most
        self._classes: dict[int, _Class] = {}
        self._size = self.held = 0
        """``held``: with those that were called and have not gone yet."""
        self._look_at: dict[int, int] = {}
        self.drain = DrainRate(clock)
        room.queues.append(self)

    def __len__(self) -> int:
        return self._size

    def passed(self, claim: Claim, requests: int = 1) -> None:
        """Somebody did not have to wait, or several of a tenant, whose costs are summed in the claim."""
        klass, flow = self._flow(claim)
        if not flow.waiting:
            flow.start = max(klass.virtual, flow.end)
        klass.serve(flow, claim)
        self.drain.count(requests)

    def push(self, owner: Waiting, claim: Claim, since: float | None = None, *, again: bool = False) -> Ticket:
        """Stand in the queue. ``since``: when he began to wait, which is his place among those of his tenant; now
        where it isn't said. ``again``: he had his place before. Raises Full, but for those."""
        if not again and self.held >= self._most() and not self._push_out(claim, [self]):
            raise Full
        while not again and not self._room.fits(claim.size):
            if claim.size > self._room.max_bytes or not self._push_out(claim, self._room.queues):
                raise Full
        ticket = Ticket(owner, claim, self._clock() if since is None else since)
        klass, flow = self._flow(claim)
        if not flow.waiting:
            flow.start = max(klass.virtual, flow.end)
        flow.enter(ticket)
        flow.weight = claim.weight
        self._size += 1
        self.held += 1
        self._room.take(claim.size)
        return ticket

    def first(self) -> Ticket | None:
        """Who is next; he stays until ``pop`` or ``leave``."""
        found = self._first_flow()
        return None if found is None else found[2]

    def pop(self) -> Ticket | None:
        """Who is next goes."""
        ticket = self.call()
        if ticket is not None:
            self.gone(ticket)
        return ticket

    def call(self, able: Callable[[Ticket], bool] | None = None) -> Ticket | None:
        """Who is next, of those who are ``able`` to go, is out of the queue: he goes (``gone``), or comes ``back``.
        Until then he keeps his part of the room."""
        found = self._first_flow(able)
        if found is None:
            return None
        klass, flow, ticket = found
        del flow.waiting[ticket]
        self._size -= 1
        klass.serve(flow, ticket.claim)
        self.drain.count()
        return ticket

    def gone(self, ticket: Ticket) -> None:
        """One that was called went."""
        self.held -= 1
        self._room.give_back(ticket.claim.size)

    def back(self, ticket: Ticket) -> None:
        """One that was called found no place: he is the first of his tenant again, and his tenant stands as before."""
        _, flow = self._flow(ticket.claim)
        flow.waiting = {ticket: None, **flow.waiting}
        flow.start -= ticket.claim.cost / ticket.claim.weight
        self._size += 1
        self.drain.count(-1)

    def leave(self, ticket: Ticket) -> None:
        """Somebody does not wait any more, wherever he stands; nothing for one that has gone."""
        klass = self._classes.get(ticket.claim.rank)
        flow = None if klass is None else klass.flows.get(ticket.claim.tenant)
        if flow is not None and ticket in flow.waiting:
            self._remove(flow, ticket)

    def take_all(self) -> list[Ticket]:
        """All who wait go, and not to a worker."""
        gone = self.tickets()
        for ticket in gone:
            self.leave(ticket)
        return gone

    def tickets(self) -> list[Ticket]:
        """All who wait, in no particular order."""
        return [t for klass in self._classes.values() for flow in klass.flows.values() for t in flow.waiting]

    def order(self) -> list[Ticket]:
        """All who wait, as they would go if nobody came any more."""
        found: list[Ticket] = []
        for rank in sorted(self._classes):
            tags: dict[Ticket, float] = {}
            for tenant in self._classes[rank].flows:
                tags |= self._starts(rank, tenant)
            found += sorted(tags, key=tags.__getitem__)
        return found

    def ahead(self, ticket: Ticket) -> int:
        """How many would go before him if nobody came any more."""
        mine = ticket.claim
        before = 0
        start = self._starts(mine.rank, mine.tenant)[ticket]
        for rank, klass in self._classes.items():
            if rank < mine.rank:
                before += sum(len(flow.waiting) for flow in klass.flows.values())
            elif rank == mine.rank:
                for tenant in klass.flows:
                    starts = self._starts(rank, tenant)
                    before += sum(1 for other, tag in starts.items() if other is not ticket and tag < start)
        return before

    def retry_after_s(self, ahead: int) -> int:
        """When somebody with so many before him may expect a place, in whole seconds."""
        return retry_after_s(self.drain.rate(), ahead)

    def load_of(self, claim: Claim, more: int = 0) -> tuple[int, float]:
        """How much a tenant has in here: the greater, the sooner it loses one."""
        klass = self._classes.get(claim.rank)
        flow = None if klass is None else klass.flows.get(claim.tenant)
        return claim.rank, ((0 if flow is None else len(flow.waiting)) + more) / claim.weight

    def heaviest(self) -> Claim | None:
        """The claim of the last of the flow that has the most, in the lowest class."""
        claims = [
            next(reversed(flow.waiting)).claim
            for klass in self._classes.values() for flow in klass.flows.values() if flow.waiting
        ]  # fmt: skip
        return max(claims, key=self.load_of, default=None)

    def drop_last(self, claim: Claim) -> None:
        """The flow of this claim loses its last."""
        flow = self._classes[claim.rank].flows[claim.tenant]
        ticket = next(reversed(flow.waiting))
        self._remove(flow, ticket)
        ticket.owner.pushed_out()

    def _push_out(self, newcomer: Claim, queues: Sequence[FairQueue]) -> bool:
        found = [(queue, claim) for queue in queues if (claim := queue.heaviest()) is not None]
        if not found:
            return False
        queue, claim = max(found, key=lambda pair: pair[0].load_of(pair[1]))
        if queue.load_of(claim) <= self.load_of(newcomer, more=1):
            return False
        queue.drop_last(claim)
        return True

    def _flow(self, claim: Claim) -> tuple[_Class, _Flow]:
        klass = self._classes.get(claim.rank)
        if klass is None:
            klass = self._classes[claim.rank] = _Class()
        flow = klass.flows.get(claim.tenant)
        if flow is None:
            if len(klass.flows) >= self._look_at.get(claim.rank, MAX_IDLE):
                klass.forget_idle()
                self._look_at[claim.rank] = max(MAX_IDLE, 2 * len(klass.flows))
            flow = klass.flows[claim.tenant] = _Flow()
        return klass, flow

    def _first_flow(self, able: Callable[[Ticket], bool] | None = None) -> tuple[_Class, _Flow, Ticket] | None:
        if not self._size:
            return None
        for rank in sorted(self._classes):
            klass = self._classes[rank]
            waiting = [flow for flow in klass.flows.values() if flow.waiting]
            if able is None and waiting:
                flow = min(waiting, key=_start)  # among equals the one that has been known longest
                return klass, flow, next(iter(flow.waiting))
            for flow in sorted(waiting, key=_start):
                for ticket in flow.waiting:
                    if able is None or able(ticket):
                        return klass, flow, ticket
        return None

    def _remove(self, flow: _Flow, ticket: Ticket) -> None:
        del flow.waiting[ticket]
        self._size -= 1
        self.held -= 1
        self._room.give_back(ticket.claim.size)

    def _starts(self, rank: int, tenant: Hashable) -> dict[Ticket, float]:
        flow = self._classes[rank].flows[tenant]
        tags, tag = {}, flow.start
        for ticket in flow.waiting:
            tags[ticket] = tag
            tag += ticket.claim.cost / ticket.claim.weight
        return tags


def _since(ticket: Ticket) -> float:
    return ticket.since


def _start(flow: _Flow) -> float:
    return flow.start


def retry_after_s(rate: float, ahead: int) -> int:
    """When somebody with so many before him may expect a place where ``rate`` of them go in a second, in seconds."""
    return MAX_RETRY_S if rate * MAX_RETRY_S <= ahead + 1 else math.ceil((ahead + 1) / rate)


class DrainRate:
    """Requests a second that went to workers, averaged with exponential weights. ``clock`` gives seconds."""

    __slots__ = ("_at", "_clock", "_since", "_sum")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sum = 0.0
        self._at = self._since = clock()

    def count(self, requests: int = 1) -> None:
        self._decay()
        self._sum += requests

    def rate(self) -> float:
        self._decay()
        # Divided by the weight of the time that there was, so that it is right from the start.
        return self._sum / (RATE_S * -math.expm1(-max(1.0, self._at - self._since) / RATE_S))

    def _decay(self) -> None:
        now = self._clock()
        self._sum *= math.exp(-(now - self._at) / RATE_S)
        self._at = now
