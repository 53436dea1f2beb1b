"""Removing rows in steps, each a transaction of its own: other writers wait for one of them at most.

No step is seen by anybody: what goes has been out of reach before. So it may end anywhere, is gone on with by whoever
comes next, and two may do it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from registry.metadata import content, pins, removals
from registry.metadata.database import Changes, Database

PAGE: Final = 500
"""Rows that are looked for at a time."""
COUNT: Final = 64
BYTES: Final = 32 << 30
"""Most blobs or objects, and bytes of them, that are removed in one transaction: the latter bounds rows of chunks."""

Row = TypeVar("Row", bound=tuple[object, ...])


def slices(rows: Sequence[Row], size: Callable[[Row], int]) -> Iterator[Sequence[Row]]:
    """The rows of blobs or objects in slices that one transaction removes."""
    start = total = 0
    for index, row in enumerate(rows):
        if index > start and (index - start == COUNT or total + size(row) > BYTES):
            yield rows[start:index]
            start, total = index, 0
        total += size(row)
    if start < len(rows):
        yield rows[start:]


def forget_leftovers(database: Database) -> None:
    """Forget the blobs that no commit ever held and no session claims, and the objects that nobody needs or claims."""
    after = ("", "")
    while True:
        with database.read(single=True) as connection:
            found = content.pending_blobs(connection, after, PAGE)
        for some in slices(found, lambda row: row[2]):
            with database.write() as connection:
                content.drop_pending(connection, [(domain, sha256) for domain, sha256, _ in some])
        if len(found) < PAGE:
            break
        after = found[-1][:2]
    last = 0
    while True:
        with database.read(single=True) as connection:
            objects = content.unneeded(connection, last, PAGE)
        for part in slices(objects, lambda row: row[1]):
            with database.write() as connection:
                content.drop_unneeded(connection, [number for number, _ in part])
        if len(objects) < PAGE:
            return
        last = objects[-1][0]


def finish_removals(database: Database, lease_s: float, stopped: Callable[[], bool] = lambda: False) -> None:
    """Go on with all removals, until nothing is left of them or it is ``stopped``.

    Answers that are under way may read records for ``lease_s`` yet.
    """
    with database.read(single=True) as connection:
        removal = removals.under_way(connection)
    while removal is not None and not stopped():
        # Nothing of it is seen by anybody any more, and what gets lost in a crash is done again.
        with database.write(lazy=True, changes=Changes.NOTHING) as connection:
            removal = removals.under_way(connection)
            if removal is not None:
                until = pins.clock(connection, database.kind.now) + lease_s
                removals.go_on(connection, removal, until)
