"""Who read what when, in SQL: hours, days of what is older, bounded. Every function runs inside a transaction.

Times are whole seconds since 1970 UTC, the beginning of an hour or a day.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from registry.metadata.database import batches
from registry.metadata.quota_tables import usage, usage_reporters

HOUR: Final = 3600
DAY: Final = 86400
OTHERS: Final = "(others)"
"""Stands for nodes, and for models, that an hour has no row left for."""


@dataclass(frozen=True, slots=True)
class Key:
    """What reads are counted for; ``repo`` in its canonical form, ``time`` the beginning of the hour."""

    time: int
    repo: str
    commit: str
    node: str


@dataclass(frozen=True, slots=True)
class Reads:
    """How often, and how many bytes."""

    reads: int = 0
    bytes: int = 0

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.reads + other.reads, self.bytes + other.bytes)


def add(connection: Connection, counts: Mapping[Key, Reads], most: int) -> int:
    """Add reads to their hours; returns how many keys were merged because an hour has ``most`` rows already.

    Nodes that are new to such an hour count as others; where it has half as many again, so do models.
    """
    rows: dict[Key, Reads] = {}
    merged = 0
    for time in sorted({key.time for key in counts}):
        of_hour = {key: reads for key, reads in counts.items() if key.time == time}
        query = sa.select(sa.func.count()).where(usage.c.time == time, usage.c.span == HOUR)
        room = most - (connection.scalar(query) or 0)
        known = set(of_hour) if room >= len(of_hour) else _known(connection, time, of_hour)
        for key, reads in of_hour.items():
            place = key
            if key not in known:
                if room <= 0:
                    merged += 1
                    few = room > -(most // 2)
                    place = Key(time, key.repo, key.commit, OTHERS) if few else Key(time, OTHERS, "", OTHERS)
                room -= 1
            rows[place] = rows.get(place, Reads()) + reads
    _upsert(connection, HOUR, rows)
    return merged


def _known(connection: Connection, time: int, keys: Collection[Key]) -> set[Key]:
    c = usage.c
    found: set[Key] = set()
    for batch in batches(sorted({key.repo for key in keys})):
        query = sa.select(c.repository, c.commit, c.node).where(c.time == time, c.span == HOUR)
        rows = connection.execute(query.where(c.repository.in_(batch)))
        found |= {Key(time, repo, commit, node) for repo, commit, node in rows}
    return found


def _upsert(connection: Connection, span: int, rows: Mapping[Key, Reads]) -> None:
    make: Any = import_module(f"sqlalchemy.dialects.{connection.dialect.name}").insert
    insert = make(usage)
    c, new = usage.c, insert.excluded
    statement = insert.on_conflict_do_update(
        index_elements=[c.time, c.span, c.repository, c.commit, c.node],
        set_={"reads": c.reads + new.reads, "bytes": c.bytes + new.bytes},
    )
    values = [
        {"time": key.time, "span": span, "repository": key.repo, "commit": key.commit, "node": key.node}
        | {"reads": reads.reads, "bytes": reads.bytes}
        for key, reads in sorted(rows.items(), key=lambda item: (item[0].time, item[0].repo, item[0].node))
    ]
    for batch in batches(values):
        connection.execute(statement, list(batch))


# --- reports ---


def is_new(connection: Connection, reporter: str, sequence: int, now: int) -> bool:
    """Whether a report has not been counted; from here on it has."""
    c = usage_reporters.c
    last = connection.scalar(sa.select(c.sequence).where(c.reporter == reporter))
    if last is not None and sequence <= last:
        return False
    connection.execute(usage_reporters.delete().where(c.reporter == reporter))
    connection.execute(usage_reporters.insert().values(reporter=reporter, sequence=sequence, time=now))
    return True


# --- retention ---


def compact(connection: Connection, before: int) -> bool:
    """Turn the hours of the oldest day that ends before that time into one day; False where there is none."""
    c = usage.c
    oldest = connection.scalar(sa.select(sa.func.min(c.time)).where(c.span == HOUR))
    if oldest is None or (day := oldest - oldest % DAY) + DAY > before:
        return False
    hours = (c.span == HOUR) & (c.time >= day) & (c.time < day + DAY)
    sums = (sa.func.sum(c.reads), sa.func.sum(c.bytes))
    query = sa.select(c.repository, c.commit, c.node, *sums).where(hours).group_by(c.repository, c.commit, c.node)
    rows = {
        Key(day, repo, commit, node): Reads(int(reads), int(count))
        for repo, commit, node, reads, count in connection.execute(query).all()
    }
    _upsert(connection, DAY, rows)
    connection.execute(usage.delete().where(hours))
    return True


def forget(connection: Connection, before: int, reporters_before: int) -> None:
    """Drop what is older, and what is known of reporters that were silent since."""
    connection.execute(usage.delete().where(usage.c.time + usage.c.span <= before))
    connection.execute(usage_reporters.delete().where(usage_reporters.c.time < reporters_before))


def cut(connection: Connection, most: int) -> int:
    """Drop the oldest times until at most so many rows are left; returns how many rows went."""
    c = usage.c
    count = connection.scalar(sa.select(sa.func.count()).select_from(usage)) or 0
    gone = 0
    while count - gone > most:
        oldest = connection.scalar(sa.select(sa.func.min(c.time)))
        gone += connection.execute(usage.delete().where(c.time == oldest)).rowcount
    return gone


# --- asking ---

_COLUMNS: Final = {"time": (usage.c.time, usage.c.span), "repo": (usage.c.repository.label("repo"),)}
COLUMNS: Final[Mapping[str, tuple[sa.ColumnElement[Any], ...]]] = {
    **_COLUMNS, "commit": (usage.c.commit,), "node": (usage.c.node,)
}  # fmt: skip
"""What may be told apart."""


MOST_NAMES: Final = 30_000
"""Repositories of which can be asked at a time: what engines bind in one statement."""


def repositories_in(connection: Connection, since: int, until: int) -> list[str]:
    """Canonical names of what was read in hours and days that overlap the time."""
    query = sa.select(usage.c.repository).where(usage.c.time + usage.c.span > since, usage.c.time < until)
    return list(connection.scalars(query.distinct()))


def ask(
    connection: Connection,
    by: Sequence[str],
    *,
    since: int,
    until: int,
    repos: Sequence[str] | None = None,
    limit: int,
) -> list[dict[str, Any]]:
    """Reads from hours and days that overlap the time, summed up but for what ``by`` (of ``COLUMNS``) tells apart, in
    order; at most ``limit`` rows. Without ``repos`` of all repositories."""
    c = usage.c
    columns = [column for name in by for column in COLUMNS[name]]
    sums = (sa.func.sum(c.reads).label("reads"), sa.func.sum(c.bytes).label("bytes"))
    query = sa.select(*columns, *sums).where(c.time + c.span > since, c.time < until)
    if repos is not None:
        query = query.where(c.repository.in_(sorted(repos)[:MOST_NAMES]))
    plain = [usage.c[column.name if column.name != "repo" else "repository"] for column in columns]
    rows = connection.execute(query.group_by(*plain).order_by(*plain).limit(limit)).mappings()
    found = [dict(row) for row in rows]
    return [row | {"reads": int(row["reads"] or 0), "bytes": int(row["bytes"] or 0)} for row in found]
