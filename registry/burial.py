"""Deleting objects that were given up, by the rules of registry/metadata/claims.py."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Final

from heliosfs.store.objects import ObjectStore
from registry.metadata import claims
from registry.metadata.database import Changes, Database

BATCH: Final = 64
TURN_S: Final = 2.0
"""Others wait while objects are deleted, so a turn is short. It must also end long before the database takes a writer
for abandoned (``postgres.ABANDONED_S``): from then on somebody else may write what we are about to delete."""


def bury(database: Database, store: ObjectStore) -> int:
    """Delete every doomed object that nobody names or claims; returns how many there were."""
    count = 0
    while True:
        with database.read(single=True) as connection:
            if not claims.some_doomed(connection, 1):
                return count
        with database.write(changes=Changes.NOTHING) as connection:
            started = time.clock_gettime(time.CLOCK_BOOTTIME)  # it goes on while the machine sleeps
            keys = claims.some_doomed(connection, BATCH)
            kept = claims.needed(connection, keys)
            done = [key for key in keys if key in kept]
            for key in keys:
                if time.clock_gettime(time.CLOCK_BOOTTIME) - started > TURN_S:
                    break
                if key not in kept:
                    store.delete(key)
                    done.append(key)
                    count += 1
            claims.undoom(connection, done)


def withdraw(database: Database, store: ObjectStore, session: str, keys: Collection[str]) -> None:
    """Delete objects that a session wrote in vain, unless somebody names or claims them besides.

    They are deleted before a word is written: where the disk is full, that is what makes room.
    """
    with database.write(changes=Changes.NOTHING) as connection:
        kept = claims.needed(connection, keys, besides=session)
        for key in keys:
            if key not in kept:
                store.delete(key)
        claims.release(connection, session, keys)
