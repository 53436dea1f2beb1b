"""``/api/v1/usage/reads``: mounts report what was read through them, and who read what can be asked
(docs/registry-usage.md)."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import InvalidInput
from helios.names import RepoId, is_commit
from registry.api.support import Json, access, listed, read_json, repository
from registry.metadata.usage import COLUMNS, DAY, Reads
from registry.usage.recorder import Recorder
from registry.usage.telling import is_name

MAX_ROWS: Final = 100_000
"""Most rows of an answer."""
REPORT_ROWS: Final = 1000
MAX_BODY: Final = 1 << 20
MAX_AGE_S: Final = 7 * DAY
MOST: Final = 1 << 53
"""Most reads or bytes of one row of a report."""

_REPORTER: Final = re.compile(r"[0-9a-f]{16,64}\Z")
_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]


class ReadsOf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files opened, and bytes read, of one revision."""

    repo: str
    commit: str
    reads: _Count
    bytes: _Count


class ReadReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was read through a mount since its last report. ``reporter`` is a number of the mount's process, and
    ``sequence`` counts its reports, so that one that is sent twice counts once."""

    node: str
    reporter: str
    sequence: Annotated[int, msgspec.Meta(ge=0, le=MOST)]
    rows: Annotated[list[ReadsOf], msgspec.Meta(max_length=REPORT_ROWS)]
    age_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_AGE_S)] = 0.0


def routes(recorder: Recorder) -> list[Route]:
    async def report(request: Request) -> Response:
        wanted = await read_json(request, ReadReport, MAX_BODY)
        if not is_name(wanted.node):
            raise InvalidInput(f"{wanted.node[:80]!r} names no node: 1 to 128 printable characters without spaces")
        if not _REPORTER.match(wanted.reporter):
            raise InvalidInput(f"{wanted.reporter[:80]!r} is no reporter: 16 to 64 hexadecimal digits")
        rows, who = [], access(request)
        for row in wanted.rows:
            if not is_commit(row.commit):
                raise InvalidInput(f"{row.commit[:80]!r} is not a commit: 40 lower-case hexadecimal digits")
            repo = RepoId.from_canonical(row.repo)
            who.check_visible(repo)
            rows.append((str(repo), row.commit, Reads(row.reads, row.bytes)))
        new = await asyncio.to_thread(
            recorder.report, wanted.reporter, wanted.sequence, wanted.node, wanted.age_s, rows
        )
        return Json({"new": new})

    async def asked(request: Request) -> Response:
        now, seen = int(recorder.now()), await listed(request)
        query = request.query_params
        repo = str(await repository(request)) if "repo" in query else None
        since, until = _time(request, "since", now - 7 * DAY), _time(request, "until", now + 1)
        by = [part for part in query.get("by", "repo,time").split(",") if part]
        if unknown := [part for part in by if part not in COLUMNS]:
            raise InvalidInput(f"by={unknown[0][:40]!r} can't be told apart; there are {', '.join(COLUMNS)}")
        wanted = [name for name in COLUMNS if name in by]
        shown = None if repo is not None or seen.all else seen.shows
        rows = await asyncio.to_thread(
            recorder.ask, wanted, since=since, until=until, repo=repo, shown=shown, limit=MAX_ROWS + 1
        )
        return Json({"since": since, "until": until, "rows": rows[:MAX_ROWS], "more": len(rows) > MAX_ROWS})

    return [
        Route("/api/v1/usage/reads", report, methods=["POST"]),
        Route("/api/v1/usage/reads", asked, methods=["GET"]),
    ]


def _time(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise InvalidInput(f"{name}={text[:40]!r} is not a time in whole seconds since 1970")
    return int(text)
