"""Publishing a directory; see registry/pushes.py."""

from __future__ import annotations

import os
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from helios.errors import Forbidden, InvalidInput
from helios.http.protocol import PEER
from helios.names import check_ref
from heliosfs.store.batch import COUNT_SIZE, MAX_RECIPE, Chunk, decode_entries, entries_size
from heliosfs.store.recipe import MAX_BLOB
from registry.api.support import Json, listed, parameter, pushable, read_json, services
from registry.body import Body, collect
from registry.push_log import Announced


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    size: int
    executable: bool = False


class StartPush(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body that starts a push."""

    repo: str
    files: list[File]
    ref: str = "main"
    message: str = ""
    author: str = ""


MAX_TEXT = 4096
"""Longest message and author, in characters."""


def routes() -> list[Route]:
    return [
        Route("/api/v1/pushes", start, methods=["POST"]),
        Route("/api/v1/pushes/{push}/files", put_file, methods=["PUT"]),
        Route("/api/v1/pushes/{push}/recipes", offer, methods=["PUT"]),
        Route("/api/v1/pushes/{push}/chunks", put_chunks, methods=["PUT"]),
        Route("/api/v1/pushes/{push}/chunks", known_chunks, methods=["POST"]),
        Route("/api/v1/pushes/{push}/commit", commit, methods=["POST"]),
        Route("/api/v1/pushes/{push}", state, methods=["GET"]),
        Route("/api/v1/pushes/{push}", give_up, methods=["DELETE"]),
    ]


async def start(request: Request) -> Response:
    wanted = await read_json(request, StartPush)
    repo = await pushable(request, wanted.repo, wanted.ref)
    if max(len(wanted.message), len(wanted.author)) > MAX_TEXT:
        raise InvalidInput(f"the message or the author is longer than {MAX_TEXT} characters")
    if "\0" in wanted.message + wanted.author:
        raise InvalidInput("the message or the author holds a NUL character")
    for file in wanted.files:
        if not 0 <= file.size <= MAX_BLOB:
            raise InvalidInput(f"{file.path!r} can't have {file.size} bytes")
    files = [Announced(file.path, file.size, file.executable) for file in wanted.files]
    pushes = services(request).pushes
    push = await pushes.start(repo, check_ref(wanted.ref), wanted.message, wanted.author, files)
    return Json({"push": push, "recipes": True})


async def put_file(request: Request) -> Response:
    push, path, pushes = request.path_params["push"], parameter(request, "path"), services(request).pushes
    if "local" not in request.query_params:
        return Json(await pushes.put_body(push, path, request.stream()))
    if not _is_owner(request):
        raise Forbidden(
            "local= works only over the unix socket and for the user that runs the registry", hint="Send the bytes."
        )
    async for data in request.stream():
        if data:
            raise InvalidInput("a request with local= has no body")
    return Json(await pushes.put_local(push, path, parameter(request, "local"), partial(_gone, request)))


async def offer(request: Request) -> Response:
    push, path, pushes = request.path_params["push"], parameter(request, "path"), services(request).pushes
    record = await collect(request.stream(), MAX_RECIPE)
    return Json(await pushes.offer(push, path, record, await listed(request), partial(_gone, request)))


async def known_chunks(request: Request) -> Response:
    push, path, pushes = request.path_params["push"], parameter(request, "path"), services(request).pushes
    _, chunks = await _headed(request)
    return Json({"known": await pushes.known(push, path, chunks, await listed(request))})


async def put_chunks(request: Request) -> Response:
    push, path, pushes = request.path_params["push"], parameter(request, "path"), services(request).pushes
    body, chunks = await _headed(request)
    new_bytes = await pushes.put_chunks(push, path, chunks, body.rest(), await listed(request))
    return Json({"new_bytes": new_bytes})


async def _headed(request: Request) -> tuple[Body, list[Chunk]]:
    """A body that begins with the names of chunks, and these."""
    body = Body(request.stream())
    return body, decode_entries(await body.take(entries_size(await body.take(COUNT_SIZE))))


async def commit(request: Request) -> Response:
    return Json(await services(request).pushes.commit(request.path_params["push"]))


async def state(request: Request) -> Response:
    return Json(await services(request).pushes.state(request.path_params["push"]))


async def give_up(request: Request) -> Response:
    await services(request).pushes.abort(request.path_params["push"])
    return Json({})


def _is_owner(request: Request) -> bool:
    """Whether the kernel says that the caller is our own user, at the other end of our unix socket."""
    peer = request.scope.get("extensions", {}).get(PEER)
    return peer is not None and peer["uid"] == os.getuid()


async def _gone(request: Request) -> None:
    """Ends when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
