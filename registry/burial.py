"""Deleting objects that were given up, by the rules of registry/metadata/claims.py.

A store in the cloud may take its time, so nothing is deleted in a writer's turn: a first transaction says which objects
are being deleted, a last one that they are gone, and in between only who would write one of just these waits.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from sqlalchemy.engine import Connection

from helios.errors import NoSpace, Unavailable
from heliosfs.store.objects import ObjectStore
from registry.metadata import claims
from registry.metadata.database import WAIT_S, Changes, Database

BATCH: Final = 64
TURN_S: Final = 2.0
"""No deletion begins later than this after its transaction, in seconds: with one removal, which a cloud store gives up
soon (``cloud.REMOVE_S``), it must end long before ``HOLD_S``."""
HOLD_S: Final = 60.0
"""For so long an object that is being deleted can't be claimed, unless it is said before that it has gone: then
somebody else may write what we were about to delete."""
LOOK_S: Final = 0.02
"""How often who waits for a deletion looks whether it is over, in seconds."""


Choice = tuple[list[str], list[str]]
"""Objects to be deleted, and those that were looked at and stay."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be deleted; ``choose`` only reads, ``note`` writes that these are seen to."""

    choose: Callable[[Connection], Choice]
    note: Callable[[Connection, list[str]], None]


@dataclass(frozen=True, slots=True)
class _Grave:
    """Objects that are being deleted, by whom, and when that was said, in seconds of a clock that goes on while the
    machine sleeps."""

    keys: list[str]
    remover: str
    since: float


def bury(database: Database, store: ObjectStore) -> int:
    """Delete every object that is doomed by now and that nobody names or claims; returns how many there were.

    Raises Unavailable where the store does not answer: the rest is deleted the next time.
    """
    count, now = 0, database.kind.now

    def choose(connection: Connection) -> Choice:
        keys = claims.some_doomed(connection, now, BATCH)
        kept = claims.needed(connection, keys)
        return [key for key in keys if key not in kept], sorted(kept)

    while True:
        with database.read(single=True) as connection:
            if not claims.some_doomed(connection, now, 1):
                return count
        store.check()  # where the store is away nothing is done
        count += _remove(database, store, _Work(choose, claims.undoom))


def withdraw(database: Database, store: ObjectStore, session: str, keys: Collection[str]) -> None:
    """Delete objects that a session wrote in vain, unless somebody names or claims them besides."""

    def choose(connection: Connection) -> Choice:
        kept = claims.needed(connection, keys, besides=session)
        kept |= claims.spared(connection, database.kind.now, keys)
        return sorted(set(keys) - kept), sorted(kept)

    def release(connection: Connection, done: list[str]) -> None:
        claims.release(connection, session, done)

    _remove(database, store, _Work(choose, release))


def claim_unburied(database: Database, keys: Collection[str], claim: Callable[[Connection], None]) -> None:
    """Run ``claim``, which claims objects that are about to be written, in a transaction in which none of them is being
    deleted. Raises Unavailable where that takes longer than a writer's turn may."""
    deadline, now = time.monotonic() + WAIT_S, database.kind.now
    while True:
        with database.write(lazy=True, changes=Changes.NOTHING) as connection:
            if not claims.leaving(connection, now, keys):
                claim(connection)
                return
        leaving = True
        while leaving:
            if time.monotonic() > deadline:
                raise Unavailable("what this would write is being deleted just now", hint="Try again in a minute.")
            time.sleep(LOOK_S)
            with database.read() as connection:
                leaving = claims.leaving(connection, now, keys)


def _remove(database: Database, store: ObjectStore, work: _Work) -> int:
    try:
        grave = _open(database, work)
    except NoSpace:
        return _make_room(database, store, work)
    return _fill(database, store, grave)


def _open(database: Database, work: _Work) -> _Grave:
    """Say what is being deleted: that must be on disk before the first of it goes."""
    remover = secrets.token_hex(16)
    with database.write(changes=Changes.NOTHING) as connection:
        since = time.clock_gettime(time.CLOCK_BOOTTIME)
        keys, kept = work.choose(connection)
        work.note(connection, [*keys, *kept])
        claims.begin_removal(connection, keys, remover, database.kind.now, HOLD_S)
    return _Grave(keys, remover, since)


def _fill(database: Database, store: ObjectStore, grave: _Grave) -> int:
    """Delete the objects, as far as there is time for it; returns how many. The others stay doomed."""
    gone: list[str] = []
    try:
        for key in grave.keys:
            if time.clock_gettime(time.CLOCK_BOOTTIME) - grave.since > TURN_S:
                break
            store.delete(key)
            gone.append(key)
    finally:
        if grave.keys:
            with database.write(lazy=True, changes=Changes.NOTHING) as connection:
                claims.end_removal(connection, grave.remover, gone)
    return len(gone)


def _make_room(database: Database, store: ObjectStore, work: _Work) -> int:
    """Delete in a writer's turn, before a word is written: where the metadata's disk is full nothing can be said
    beforehand, and what is deleted may be what makes room. Who waits could not write either."""
    with database.write(changes=Changes.NOTHING) as connection:
        since = time.clock_gettime(time.CLOCK_BOOTTIME)
        keys, kept = work.choose(connection)
        gone: list[str] = []
        for key in keys:
            if time.clock_gettime(time.CLOCK_BOOTTIME) - since > TURN_S:
                break
            store.delete(key)
            gone.append(key)
        work.note(connection, [*gone, *kept])
    return len(gone)
