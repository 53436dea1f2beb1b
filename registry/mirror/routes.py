"""``/api/v1/mirror``: which upstream refs are followed, letting them move or go (docs/native-api.md)."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import InvalidInput
from helios.names import check_ref, is_commit
from registry.api.support import Json, administration, listed, read_json, readable
from registry.mirror.mirror import Mirror


class Approve(msgspec.Struct, forbid_unknown_fields=True):
    """``repo`` in its canonical form; ``commit`` is the one that waits."""

    repo: str
    ref: str
    commit: str


class Detach(msgspec.Struct, forbid_unknown_fields=True):
    """``repo`` in its canonical form."""

    repo: str
    ref: str


def routes(mirror: Mirror) -> list[Route]:
    async def listing(request: Request) -> Response:
        seen = await listed(request)
        found = await asyncio.to_thread(mirror.followed)
        refs = [
            {
                "repo": known.repository,
                "ref": known.ref,
                "commit": known.commit,
                "pending": known.pending,
                "checked": round(known.checked, 1),
                "policy": policy,
            }
            for known, policy in found
            if seen.shows(known.repository)
        ]
        return Json({"refs": refs})

    async def approve(request: Request) -> Response:
        administration(request, "approving a move")
        wanted = await read_json(request, Approve)
        if not is_commit(wanted.commit):
            raise InvalidInput(f"{wanted.commit[:80]!r} is not a commit: 40 lower-case hexadecimal digits")
        repo, ref = await readable(request, wanted.repo), check_ref(wanted.ref)
        await asyncio.to_thread(mirror.approve, repo, ref, wanted.commit)
        return Json({"repo": str(repo), "ref": ref, "commit": wanted.commit})

    async def detach(request: Request) -> Response:
        administration(request, "detaching a ref from its upstream")
        wanted = await read_json(request, Detach)
        repo, ref = await readable(request, wanted.repo), check_ref(wanted.ref)
        await asyncio.to_thread(mirror.detach, repo, ref)
        return Json({"repo": str(repo), "ref": ref})

    return [
        Route("/api/v1/mirror", listing, methods=["GET"]),
        Route("/api/v1/mirror/approve", approve, methods=["POST"]),
        Route("/api/v1/mirror/detach", detach, methods=["POST"]),
    ]
