"""Quotas: what a publish, an upload or a download may still bring.

Whoever is going to bring bytes *reserves* them first, for the session that he holds anyway (registry/sessions.py): so a
reservation ends with its session, be that in order, by a failure, or with a process that died. Reserving looks at what
is used and at what all others have reserved in one writing transaction, and writers take turns: of two who fit alone
but not together one is refused. A publish turns reservations into use in its own transaction.

What is used is an exact count and what was charged since. Charges are upper bounds (a content that comes a second time
is found out only later), so before anybody is refused it is counted again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy.engine import Connection

from helios.config import RegistrySettings
from helios.errors import HeliosError, QuotaExceeded, UsageError
from helios.names import RepoId
from heliosfs.store.keys import PUBLIC
from registry.access import matches
from registry.metadata import claims, pins, quotas
from registry.metadata.database import Changes, Database
from registry.metadata.quotas import Amount, Count
from registry.threads import Threads

log = logging.getLogger("helios.registry.quotas")

COUNT_S: Final = 600.0
"""How old a count may be, in seconds: shares change by what others do, and what was removed is found by counting."""
LOOK_S: Final = 10.0
COMMIT: Final = "commit:"
"""Key of what a commit's files take, each commit counted as a full copy."""
GIB: Final = 1 << 30

Transaction = Callable[[Connection], None]
"""What is done in one writing transaction."""

_NAMES: Final = {"logical": "all revisions together", "stored": "what is stored for them"}


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit that repositories share: ``limit`` in bytes, 0 for any amount. ``key`` stands for it in SQL."""

    label: str
    patterns: tuple[str, ...]
    limit: Amount

    @property
    def key(self) -> str:
        return f"{self.label}: {' '.join(self.patterns)}"

    def concerns(self, repo: RepoId) -> bool:
        return matches(repo, self.patterns)


@dataclass(frozen=True, slots=True)
class State:
    """How much of a quota is taken, in bytes; a ``limit`` of 0 is none."""

    quota: str
    repos: tuple[str, ...]
    limit: Amount
    used: Amount
    reserved: Amount


def make_quotas(settings: RegistrySettings) -> list[Quota]:
    """The quotas that the configuration names. Raises UsageError for one that makes no sense."""
    out: list[Quota] = []
    tenants = settings.tenants
    for rule in settings.quotas:
        where = f"registry.quotas for {rule.repo or rule.tenant!r}"
        if bool(rule.repo) == bool(rule.tenant):
            raise UsageError("registry.quotas: each has either repo, a pattern such as org/*, or tenant")
        if rule.tenant and rule.tenant not in tenants:
            raise UsageError(f"{where}: there is no such tenant; known: {', '.join(sorted(tenants)) or 'none'}")
        if not 0 <= rule.logical_gib < 1 << 33 or not 0 <= rule.stored_gib < 1 << 33:
            raise UsageError(f"{where}: logical_gib and stored_gib are numbers of GiB, 0 for no limit")
        patterns = (rule.repo,) if rule.repo else tuple(tenants[rule.tenant].owns)
        limit = Amount(round(rule.logical_gib * GIB), round(rule.stored_gib * GIB))
        out.append(Quota(rule.repo or f"tenant {rule.tenant}", patterns, limit))
    if len({quota.key for quota in out}) != len(out):
        raise UsageError("registry.quotas: two are for the same repositories; write them as one")
    return out


class Quotas:
    """The quotas of one registry. Methods block; threads may share it."""

    def __init__(
        self,
        database: Database,
        rules: Sequence[Quota] = (),
        refused: Callable[[str], object] = lambda _label: None,
        domain_of: Callable[[RepoId], str] = lambda _repo: PUBLIC,
    ) -> None:
        """``refused`` is told of each refusal: the quota's label; ``domain_of`` says where a repository is stored."""
        self.rules = list(rules)
        self._database, self._refused, self._domain_of = database, refused, domain_of
        self._counting = threading.Lock()

    def concerning(self, repo: RepoId) -> list[Quota]:
        """The quotas that the repository counts for: all that fit."""
        return [quota for quota in self.rules if quota.concerns(repo)]

    def reserve(self, session: str, repo: RepoId, wants: Mapping[str, Amount]) -> None:
        """Promise bytes to a session that is under way, by key: the sha256 of a content, or a text with a colon in it
        for what is the session's own. What it had reserved for a key before is replaced.

        Raises QuotaExceeded, and then nothing has changed; Unavailable when the session has ended.
        """
        if (rules := self.concerning(repo)) and wants:
            wants = {self._key(repo, key): amount for key, amount in wants.items()}
            self._within(rules, lambda connection: self._reserve(connection, session, repo, rules, wants))

    def check(self, repo: RepoId, wants: Amount) -> None:
        """Raise QuotaExceeded for what would not fit now. Nothing is reserved: for an early answer."""
        if not (rules := self.concerning(repo)):
            return

        def look(connection: Connection) -> None:
            for rule in rules:
                self._compare(connection, rule, repo, wants, Amount())

        self._within(rules, look)

    def release(self, session: str, repo: RepoId, keys: Collection[str]) -> None:
        """Give back what a session has reserved for these, under whatever quota."""
        if self.rules:
            keys = {self._key(repo, key) for key in keys}
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                quotas.release(connection, session, keys)

    def reserve_commit(self, session: str, payer: str | None, repo: RepoId, size: int) -> None:
        """Promise a session the logical bytes of a commit, but for those that the session ``payer`` has reserved."""
        if not (rules := self.concerning(repo)):
            return
        with self._database.read() as connection:
            held = [
                sum(amount.logical for amount in quotas.held_by(connection, payer, rule.key).values()) if payer else 0
                for rule in rules
            ]
        if (lacking := size - min(held)) > 0:
            self.reserve(session, repo, {COMMIT: Amount(lacking)})

    def settle(
        self, connection: Connection, payer: str | None, repo: RepoId, logical: int, keys: Collection[str]
    ) -> None:
        """Inside a publish: charge a commit's logical bytes (0 for one that is there already) and what the session
        ``payer`` had reserved for its contents."""
        for rule in self.concerning(repo):
            if logical:
                quotas.charge(connection, rule.key, Amount(logical))
        if self.rules and payer is not None:
            quotas.pay(connection, payer, {self._key(repo, key) for key in keys})

    def landed(self, connection: Connection, repo: RepoId, key: str) -> None:
        """A downloaded content is stored, in the repository's domain: charge it to whoever has reserved it there."""
        if self.rules:
            quotas.landed(connection, self._key(repo, key))

    def adjust(self, connection: Connection, session: str, repo: RepoId, key: str, change: int) -> None:
        """Make a session's stored bytes for a key more or less, inside a writing transaction. Raises QuotaExceeded."""
        for rule in self.concerning(repo):
            held = quotas.held_by(connection, session, rule.key, [key]).get(key, Amount())
            now = Amount(held.logical, max(0, held.stored + change))
            if change > 0:
                self._compare(connection, rule, repo, Amount(0, change), Amount())
            quotas.reserve(connection, session, rule.key, {key: now})

    # --- what is used ---

    def states(self, shown: Callable[[Quota], bool] = lambda _quota: True) -> list[State]:
        """How full every quota is that is ``shown``, counted now."""
        rules = [rule for rule in self.rules if shown(rule)]
        for rule in rules:
            self.count(rule)
        with self._database.read() as connection:
            return [self._state(connection, rule) for rule in rules]

    def known(self) -> list[State]:
        """How full every quota is by the last count and what was charged since: for metrics."""
        if not self.rules:
            return []
        with self._database.read() as connection:
            return [self._state(connection, rule) for rule in self.rules]

    def count(self, quota: Quota) -> None:
        """Find out what a quota's repositories use, in a snapshot, while others go on."""
        with self._counting:
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                quotas.open_account(connection, quota.key)
            with self._database.read() as connection:
                count = _count(connection, quota)
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                quotas.set_count(connection, quota.key, count, pins.clock(connection, self._database.kind.now))

    async def keep_counted(self, upkeep: Threads) -> None:
        """Count again what was counted long ago, until cancelled. Run by the daemon as a task of its own."""
        if not self.rules:
            return
        while True:
            try:
                await upkeep(self._count_old)
            except HeliosError as error:
                log.warning("quotas could not be counted; trying again later", extra={"error": error.message})
            await asyncio.sleep(LOOK_S)

    def _count_old(self) -> None:
        with self._database.read() as connection:
            now, counted = pins.clock(connection, self._database.kind.now), quotas.counted(connection)
        for rule in self.rules:
            if not 0 <= now - counted.get(rule.key, 0.0) < COUNT_S:
                self.count(rule)

    def within(self, repo: RepoId, work: Transaction) -> None:
        """Do something in a writing transaction that may exceed a quota of the repository, by ``adjust``."""
        self._within(self.concerning(repo), work)

    # --- inside ---

    def _key(self, repo: RepoId, key: str) -> str:
        """What a key is in SQL: the same content is stored, and reserved, once in each domain."""
        domain = self._domain_of(repo)
        if ":" in key or domain == PUBLIC:
            return key
        return hashlib.sha256(f"{domain} {key}".encode()).hexdigest()

    def _within(self, rules: Sequence[Quota], work: Transaction) -> None:
        """Do the work in a writing transaction; what it refuses is counted, and then it is tried once more."""
        unknown: list[Quota] = []
        if rules:
            with self._database.read() as connection:
                unknown = [rule for rule in rules if quotas.used(connection, rule.key) is None]
        for rule in unknown:
            self.count(rule)
        try:
            self._try(work)
        except QuotaExceeded:
            for rule in rules:
                self.count(rule)
            try:
                self._try(work)
            except QuotaExceeded as error:
                self._refused(error.quota)
                log.warning("a quota is exceeded", extra={"quota": error.quota, "error": error.message})
                raise

    def _try(self, work: Transaction) -> None:
        with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
            work(connection)

    def _reserve(
        self,
        connection: Connection,
        session: str,
        repo: RepoId,
        rules: Sequence[Quota],
        wants: Mapping[str, Amount],
    ) -> None:
        claims.require(connection, session)
        for rule in rules:
            before = quotas.reserved(connection, rule.key)
            quotas.reserve(connection, session, rule.key, wants)
            more = quotas.reserved(connection, rule.key) - before
            self._compare(connection, rule, repo, more, more)

    def _compare(self, connection: Connection, rule: Quota, repo: RepoId, more: Amount, of_those: Amount) -> None:
        """Raise QuotaExceeded where ``more`` has no room; ``of_those`` is what of it counts as reserved already."""
        used = quotas.used(connection, rule.key) or Amount()
        others = quotas.reserved(connection, rule.key) - of_those
        for name, text in _NAMES.items():
            limit, want, use, held = (int(getattr(amount, name)) for amount in (rule.limit, more, used, others))
            if limit and want > 0 and use + held + want > limit:
                error = QuotaExceeded(
                    f"{repo.id}: the quota of {rule.label} has no room: {_gib(limit)} are allowed for {text}, "
                    f"{_gib(use)} used, {_gib(held)} reserved by what is under way, and {_gib(want)} more needed. "
                    "Remove what nobody needs, or ask whoever runs the registry for more",
                    hint="See: helios quota. Removed models count until `helios gc` has collected them "
                    "(registry.quotas sets the limit).",
                )
                error.quota = rule.label
                raise error

    def _state(self, connection: Connection, rule: Quota) -> State:
        used = quotas.used(connection, rule.key) or Amount()
        return State(rule.label, rule.patterns, rule.limit, used, quotas.reserved(connection, rule.key))


def _count(connection: Connection, quota: Quota) -> Count:
    """What the quota's repositories use in a snapshot. A domain is counted for itself, as it is stored."""
    by_domain: dict[str, list[int]] = {PUBLIC: []}
    for number, name, domain in quotas.all_repositories(connection):
        if quota.concerns(RepoId.from_canonical(name)):
            by_domain.setdefault(domain, []).append(number)
    waiting = [name for name in quotas.waiting_names(connection) if quota.concerns(RepoId.from_canonical(name))]
    logical = sum(quotas.logical(connection, numbers) for numbers in by_domain.values())
    stored = sum(quotas.stored(connection, domain, numbers, waiting) for domain, numbers in by_domain.items())
    return Count(Amount(logical, round(stored)), quotas.charged(connection, quota.key))


def _gib(count: int) -> str:
    """Bytes for people, in the unit in which quotas are set."""
    if count < 1 << 20:
        return f"{count} bytes"
    return f"{count / (1 << 20):.1f} MiB" if count < GIB else f"{count / GIB:.2f} GiB"
