"""What a process that relays and the owner of the queue say to each other: small words, many to a message.

A place in the queue has a number, which its process gives and never gives again. Every word may come twice, or to one
who does not know the place any more: then nothing follows from it, or that is said.
"""

from __future__ import annotations

from typing import Final

import msgspec

MOST: Final = 1_000
"""Words in one message."""


class Word(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One of them."""


# --- to the owner ---


class Anew(Word, frozen=True):
    """All that was said before counts no more; what counts is said now."""


class Stand(Word, frozen=True):
    """A request waits. ``rank``: lower first; ``cost`` in tokens; ``size``: bytes of its body; ``since``: seconds of
    the machine's clock; ``again``: it had its place before."""

    place: int
    model: str
    tenant: str
    rank: int
    weight: float
    cost: float
    size: int
    since: float
    again: bool = False


class Left(Word, frozen=True):
    """It waits no more. If it was called it counts at a worker by now, or has ended."""

    place: int


class Back(Word, frozen=True):
    """It was called, and no worker has room: it waits on."""

    place: int


class Passed(Word, frozen=True):
    """So many requests of a tenant did not have to wait since this was said last, ``cost`` tokens together."""

    model: str
    tenant: str
    rank: int
    weight: float
    cost: float
    requests: int


class Freed(Word, frozen=True):
    """A worker of the model has a request less."""

    model: str


# --- from the owner ---


class Call(Word, frozen=True):
    """It is next."""

    place: int


class Out(Word, frozen=True):
    """It has no place (any more): ``refused`` at once, or pushed out. ``waiting``: how many wait for the model;
    ``rate``: how many go to workers in a second."""

    place: int
    refused: bool
    waiting: int
    rate: float


class Queues(Word, frozen=True):
    """The models for which somebody waits, all of them."""

    models: list[str]


class Standing(Word, frozen=True):
    """How the places of one process stand in a model's queue, but for those that were called: each with how many are
    ``ahead`` of it. ``waiting``: how many wait; ``rate``: how many go to workers in a second."""

    model: str
    waiting: int
    rate: float
    ahead: list[tuple[int, int]]


ToOwner = Anew | Stand | Left | Back | Passed | Freed
FromOwner = Call | Out | Queues | Standing
