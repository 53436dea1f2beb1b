"""Removing a domain: all that is stored in it goes, in the two phases of a collection.

Rows of its blobs go at once, since no repository holds them any more; what a push or pull relies on stays, and is
reported. Their objects are deleted when nobody can hold a placement that names them (registry/burial.py): the next run,
or the registry by itself, deletes them then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from helios.errors import Conflict, InvalidInput, NotFound, Unavailable
from heliosfs.store.keys import PUBLIC, check_domain
from registry.burial import bury
from registry.catalog import Catalog
from registry.gc.collect import Times
from registry.metadata import claims, content, domains, gc, inventory, pins
from registry.metadata.domains import DomainUsage
from registry.removal import COUNT, forget_leftovers

BATCH = 500


class Removal(msgspec.Struct):
    """What a run did. ``busy``: claims of pushes and pulls under way, whose content stays; ``waiting`` objects are
    deleted at ``until`` (seconds since 1970), when the leases on them are over. All is gone where both are 0."""

    domain: str
    removed_blobs: int = 0
    removed_objects: int = 0
    freed_bytes: int = 0
    deleted_objects: int = 0
    busy: int = 0
    waiting: int = 0
    until: float = 0.0

    def result(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        out: dict[str, Any] = msgspec.to_builtins(self)
        return out


def listing(catalog: Catalog) -> list[tuple[DomainUsage, list[str]]]:
    """Every domain in which something lies or may, and the tenants that have it."""
    names = catalog.stored_domains()
    with catalog.database.read() as connection:
        return [(domains.usage(connection, name), catalog.domains.tenants_of(name)) for name in names]


class DomainRemover:
    """Of one registry. ``times``: as for collections."""

    def __init__(self, catalog: Catalog, times: Times) -> None:
        self._catalog, self._database = catalog, catalog.database
        self._keep_s = times.lease_s + times.grace_s

    def run(
        self,
        domain: str,
        *,
        say: Callable[[str], None] = lambda _line: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Removal:
        """Remove a domain. Raises InvalidInput for ``public``, Conflict while a tenant or a repository has it, NotFound
        for one of which nothing is left, Unavailable when stopped in the middle: what is done then stays done."""
        self._check(domain)
        report = Removal(domain)
        say("removing what pushes and pulls have left")
        forget_leftovers(self._database)
        say("removing files")
        self._remove_blobs(domain, report, stopped)
        forget_leftovers(self._database)
        say("looking for objects that nothing names")
        self._doom_strays(domain, report, stopped)
        say("deleting objects")
        report.deleted_objects = bury(self._database, self._catalog.store)
        with self._database.read() as connection:
            report.busy = domains.left_in(connection, domain)[1]
            found = domains.usage(connection, domain)
        report.waiting, report.until = found.waiting, found.until
        return report

    def _check(self, domain: str) -> None:
        if check_domain(domain) == PUBLIC:
            raise InvalidInput(f"the domain {PUBLIC} is everybody's and can't be removed")
        if tenants := self._catalog.domains.tenants_of(domain):
            raise Conflict(
                f"the domain {domain} is that of the tenant {', '.join(tenants)}",
                hint="Take it out of registry.tenants and start the registry again.",
            )
        with self._database.read() as connection:
            there = domains.lie_in(connection, domain)
            known = domain in content.domains(connection) or domains.usage(connection, domain).waiting > 0
        if there:
            some = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
            raise Conflict(f"in the domain {domain} lie repositories: {some}", hint="Remove them first: helios rm")
        if not known and not any(True for _ in self._stored(domain)):
            raise NotFound(f"there is no domain {domain}: nothing is stored in it")

    def _remove_blobs(self, domain: str, report: Removal, stopped: Callable[[], bool]) -> None:
        after = ""
        while True:
            _go_on(stopped)
            with self._database.write() as connection:
                batch = domains.blobs_in(connection, domain, after, COUNT)
                if not batch:
                    return
                until = pins.clock(connection, self._database.kind.now) + self._keep_s
                removed = gc.remove_blobs(connection, domain, batch, until)
            after = batch[-1]
            report.removed_blobs += len(removed.blobs)
            report.removed_objects += removed.objects
            report.freed_bytes += removed.bytes

    def _doom_strays(self, domain: str, report: Removal, stopped: Callable[[], bool]) -> None:
        """Doom what the store holds and no row names: of writers that were killed before they noted anything."""
        batch: dict[str, int] = {}
        for key, size in self._stored(domain):
            batch[key] = size
            if len(batch) == BATCH:
                self._doom(batch, report)
                batch = {}
                _go_on(stopped)
        self._doom(batch, report)

    def _doom(self, batch: dict[str, int], report: Removal) -> None:
        with self._database.write() as connection:
            strays = inventory.strays(connection, batch)
            until = pins.clock(connection, self._database.kind.now) + self._keep_s
            claims.doom(connection, strays, until)
        report.removed_objects += len(strays)
        report.freed_bytes += sum(batch[key] for key in strays)

    def _stored(self, domain: str) -> Iterator[tuple[str, int]]:
        return ((info.key, info.size) for info in self._catalog.store.list(f"{domain}/"))


def _go_on(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Unavailable("the removal was stopped", hint="The next one goes on where it was.")
