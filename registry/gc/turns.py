"""Work that only one of a registry's processes does at a time, because two would do the same."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from helios.errors import Conflict, HeliosError
from registry.catalog import Catalog
from registry.metadata import pins
from registry.metadata.database import Changes

log = logging.getLogger("helios.registry.gc")


@contextlib.contextmanager
def turn(catalog: Catalog, name: str, what: str) -> Iterator[None]:
    """Do ``what``, of which there is one ``name``. Raises Conflict while another process that is alive does."""
    database = catalog.database
    with database.write(lazy=True, changes=Changes.NOTHING) as connection:
        now = pins.clock(connection, database.kind.now)
        if not pins.take_turn(connection, name, catalog.member.id, now, shared=database.kind.shared):
            raise Conflict(f"another process of this registry is {what}; wait until it is done")
    try:
        yield
    finally:
        try:
            with database.write(lazy=True, changes=Changes.NOTHING) as connection:
                pins.leave_turn(connection, name, catalog.member.id)
        except HeliosError as error:  # it ends by itself
            log.warning("a turn could not be given back", extra={"turn": name, "error": error.message})
