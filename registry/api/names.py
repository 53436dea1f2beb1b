"""Repositories, refs, commits: the mutable names."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import InvalidInput
from helios.names import check_ref, is_commit
from registry.access import NAME
from registry.api.support import (
    Json,
    access,
    governed,
    listed,
    parameter,
    pushable,
    read_json,
    readable,
    repository,
    services,
)
from registry.metadata.repositories import Expected

MAX_HISTORY = 1000
MAX_TOKEN_BODY = 32 << 10
"""Longest body with a token, in bytes."""
NAMESPACE = NAME
"""A DNS label, as tenants' names are."""


class MoveRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to move a ref, where it must be now (None: nowhere), and what a new one becomes."""

    commit: str
    expect: str | None
    author: str = ""
    kind: Literal["branch", "tag", "alias"] = "branch"


def routes() -> list[Route]:
    return [
        Route("/api/v1/repos", repos, methods=["GET"]),
        Route("/api/v1/repos", remove, methods=["DELETE"]),
        Route("/api/v1/refs", refs, methods=["GET"]),
        Route("/api/v1/refs", move, methods=["PUT"]),
        Route("/api/v1/refs/history", history, methods=["GET"]),
        Route("/api/v1/resolve", resolve, methods=["GET"]),
        Route("/api/v1/commits", commits, methods=["GET"]),
        Route("/api/v1/usage", usage, methods=["GET"]),
        Route("/api/v1/access", allowed, methods=["GET"]),
        Route("/api/v1/access", allowed_by_token, methods=["POST"]),
    ]


async def repos(request: Request) -> Response:
    seen = await listed(request)
    found = await asyncio.to_thread(services(request).catalog.repos)
    shown = [r for r in found if seen.shows(str(r.repo))]
    rows = [
        {"repo": str(r.repo), "refs": r.refs, "kinds": r.kinds, "bytes": r.bytes, "updated": r.updated} for r in shown
    ]
    return Json({"repos": rows})


async def allowed(request: Request) -> Response:
    """Whether pods of a Kubernetes namespace may read a repository that the caller may read."""
    namespace, repo = parameter(request, "namespace"), await repository(request)
    if not NAMESPACE.match(namespace):
        raise InvalidInput(
            f"namespace={namespace[:80]!r} is no namespace of Kubernetes: use a-z, 0-9 and - (at most 63)"
        )
    restricted = await asyncio.to_thread(services(request).restricted)
    reason = services(request).tenants.why_not(namespace, repo, restricted)
    return Json({"allowed": reason is None, "reason": reason})


class PodAsks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a pod wants to read, and its service account's token."""

    repo: str
    token: str


async def allowed_by_token(request: Request) -> Response:
    """Whether the pod whose token it is may read a repository that the caller may read, and whose it is."""
    asked = await read_json(request, PodAsks, MAX_TOKEN_BODY)
    repo = await readable(request, asked.repo)
    pod = await services(request).pods.find(asked.token)
    restricted = await asyncio.to_thread(services(request).restricted)
    reason = services(request).tenants.why_not(pod.namespace, repo, restricted)
    whose = {"namespace": pod.namespace, "service_account": pod.service_account, "pod_uid": pod.uid}
    return Json({"allowed": reason is None, "reason": reason} | whose)


async def remove(request: Request) -> Response:
    catalog, repo = services(request).catalog, governed(request, parameter(request, "repo"), "removing")
    author = access(request).label or ""
    expect: Expected = ...
    if "expect" in request.query_params:
        expect = _commit(parameter(request, "expect"))
    if "ref" in request.query_params:
        ref = parameter(request, "ref")
        await asyncio.to_thread(catalog.delete_ref, repo, ref, expect, author=author, followed=True)
    elif expect is not ...:
        raise InvalidInput("expect says where a ref must be, and no ref is named", hint="Add ref=, or leave it out.")
    else:
        await asyncio.to_thread(catalog.delete_repo, repo, author=author)
    return Json({})


async def refs(request: Request) -> Response:
    catalog, repo = services(request).catalog, await repository(request)
    found = await asyncio.to_thread(catalog.refs, repo)
    return Json({"refs": found, "kinds": await asyncio.to_thread(catalog.ref_kinds, repo)})


async def history(request: Request) -> Response:
    """Who moved which ref when; also of a repository that is gone."""
    ref = check_ref(parameter(request, "ref")) if "ref" in request.query_params else None
    limit = _limit(request)
    moves = await asyncio.to_thread(services(request).catalog.ref_history, await repository(request), ref, limit)
    return Json({"moves": moves})


async def move(request: Request) -> Response:
    catalog, ref = services(request).catalog, parameter(request, "ref")
    repo = await pushable(request, parameter(request, "repo"), ref)
    wanted = await read_json(request, MoveRef)
    commit = _commit(wanted.commit)
    await asyncio.to_thread(catalog.set_ref, repo, ref, commit, wanted.expect, author=wanted.author, kind=wanted.kind)
    return Json({"commit": commit})


async def resolve(request: Request) -> Response:
    repo = await repository(request)
    found = await asyncio.to_thread(services(request).catalog.resolve, repo, parameter(request, "rev"))
    return Json({"commit": found.commit, "manifest": found.manifest_digest})


async def commits(request: Request) -> Response:
    limit = _limit(request)
    catalog, repo, rev = services(request).catalog, await repository(request), parameter(request, "rev")
    return Json({"commits": await asyncio.to_thread(catalog.history, repo, rev, limit)})


async def usage(request: Request) -> Response:
    """Of a repository, or of all; for who sees not all of them, of those that he sees."""
    catalog, seen = services(request).catalog, await listed(request)
    repo = await repository(request) if "repo" in request.query_params else None
    every = request.query_params.get("all") == "true"
    if not every and (repo is not None or seen.all):
        return Json(await asyncio.to_thread(catalog.contents.usage, repo))
    shares, unheld = await asyncio.to_thread(catalog.contents.shares)
    models = [
        {"repo": s.repo, "logical": s.logical, "unique": s.unique, "stored": round(s.stored)}
        for s in shares
        if seen.shows(s.repo)
    ]
    if seen.all:
        total = msgspec.to_builtins(await asyncio.to_thread(catalog.contents.usage, repo))
    else:
        total, unheld = {what: sum(m[what] for m in models) for what in ("logical", "unique", "stored")}, 0
    if not every:
        return Json(total)
    models = [model for model in models if repo is None or model["repo"] == str(repo)]
    return Json({"total": total, "repos": models, "unheld": round(unheld)})


def _commit(text: str) -> str:
    if not is_commit(text):
        raise InvalidInput(f"{text[:80]!r} is not a commit: 40 lower-case hexadecimal digits")
    return text


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", "50")
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 0 < int(text) <= MAX_HISTORY:
        raise InvalidInput(f"limit={text[:40]!r} is not a number from 1 to {MAX_HISTORY}")
    return int(text)
