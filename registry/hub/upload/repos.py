"""Making and removing repositories, branches and tags."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final
from urllib.parse import quote

import msgspec
from starlette.responses import JSONResponse, Response

from helios.errors import Conflict, Forbidden, InvalidInput, RepoNotFound
from helios.names import RepoId, check_ref
from registry.access import Access
from registry.card import BadCard, parse_card
from registry.catalog import Catalog
from registry.hub.answers import page
from registry.hub.asked import Asked, Handlers
from registry.hub.gate import Gate
from registry.hub.upload.commits import BytesSource
from registry.ingest.kinds import LFS_EXTENSIONS
from registry.sessions import Sessions

MAIN: Final = "main"
KINDS: Final = {"model": "models", "dataset": "datasets"}
ATTRIBUTES: Final = "".join(
    f"*.{extension} filter=lfs diff=lfs merge=lfs -text\n" for extension in sorted(LFS_EXTENSIONS)
).encode()
"""What a new repository holds: a commit has one file at least, and on the Hub this is it."""


class CreateRepo(msgspec.Struct):
    """``private`` and ``visibility`` say the same, in older and newer clients."""

    name: str
    organization: str | None = None
    type: str | None = None
    private: bool | None = None
    visibility: str | None = None


class Readme(msgspec.Struct):
    content: str


class CreateBranch(msgspec.Struct):
    startingPoint: str | None = None  # noqa: N815 - as it is written


class CreateTag(msgspec.Struct):
    tag: str
    message: str | None = None


class Repos:
    """Handlers of ``repos/create``, ``repos/delete``, ``branch`` and ``tag``."""

    def __init__(self, catalog: Catalog, sessions: Sessions, gate: Gate) -> None:
        """``gate`` knows which refs follow an upstream."""
        self._catalog, self._sessions, self._gate = catalog, sessions, gate

    def handlers(self) -> Handlers:
        return {
            "create": {"POST": self.create},
            "delete": {"DELETE": self.delete},
            "branch": {"POST": self.add_branch, "DELETE": self.remove},
            "tag": {"POST": self.add_tag, "DELETE": self.remove},
            "validate-yaml": {"POST": self.validate},
        }

    async def validate(self, asked: Asked) -> Response:
        """Whether the head of a README is a card; clients ask before they upload one."""
        wanted = await asked.json(Readme)
        try:
            await asyncio.to_thread(parse_card, wanted.content.encode("utf-8", "replace"))
        except BadCard as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    async def create(self, asked: Asked) -> Response:
        wanted = await asked.json(CreateRepo)
        repo = _named(wanted)
        asked.access.check_writable(repo)
        if (wanted.private or wanted.visibility == "private") and asked.access.tenant is None:
            raise InvalidInput("only what a tenant owns is private here: use the tenant's endpoint, …/t/<tenant>")
        url = page(asked.request.scope, repo)
        try:
            await self._gate.check_own(asked, repo, MAIN)
            await asyncio.to_thread(self._create, repo, asked.access)
        except Conflict:
            message = f"You already created this {repo.kind[:-1]} repo"  # the Hub's words
            headers = {"x-error-code": Conflict.code, "x-error-message": message}
            return JSONResponse({"error": message, "code": Conflict.code, "url": url}, 409, headers)
        return JSONResponse({"url": url, "name": repo.id})

    def _create(self, repo: RepoId, access: Access) -> None:
        with contextlib.suppress(RepoNotFound):
            self._catalog.refs(repo)
            raise Conflict(f"{repo.id} is there already")
        with self._sessions.open(repo) as session:
            entry = session.ingest(".gitattributes", len(ATTRIBUTES), BytesSource(ATTRIBUTES), lfs=False).entry
            self._catalog.publisher.publish(
                repo, MAIN, {".gitattributes": entry}, author=access.label or access.tenant or "",
                message="initial commit", parent=None, expect=None,
            )  # fmt: skip

    async def delete(self, asked: Asked) -> Response:
        repo = _named(await asked.json(CreateRepo))
        asked.access.check_governs(repo, "removing a repository")
        await asyncio.to_thread(self._catalog.delete_repo, repo, author=asked.access.label or "")
        return JSONResponse({})

    async def add_branch(self, asked: Asked) -> Response:
        wanted = await asked.json(CreateBranch)
        return await self._add(asked, asked.call.revision or "", wanted.startingPoint or MAIN, "branch")

    async def add_tag(self, asked: Asked) -> Response:
        return await self._add(asked, (await asked.json(CreateTag)).tag, asked.call.revision or MAIN, "tag")

    async def _add(self, asked: Asked, ref: str, start: str, kind: str) -> Response:
        repo = asked.repo
        asked.access.check_writable(repo)
        await self._gate.check_own(asked, repo, ref)
        await asyncio.to_thread(self._point, repo, check_ref(ref), start, asked.access.label or "", kind)
        return JSONResponse({"ref": quote(ref)})

    def _point(self, repo: RepoId, ref: str, start: str, author: str, kind: str) -> None:
        commit = self._catalog.resolve(repo, start).commit
        try:
            self._catalog.set_ref(repo, ref, commit, None, author=author, kind=kind)
        except Conflict:
            raise Conflict(f"Reference already exists: {repo.id} has a {ref!r}") from None

    async def remove(self, asked: Asked) -> Response:
        repo, ref = asked.repo, asked.call.revision or ""
        asked.access.check_writable(repo)
        if ref == MAIN:
            raise Forbidden("the branch main can't be removed")
        await self._gate.check_own(asked, repo, ref)
        await asyncio.to_thread(self._catalog.delete_ref, repo, check_ref(ref), author=asked.access.label or "")
        return JSONResponse({})


def _named(wanted: CreateRepo) -> RepoId:
    kind = KINDS.get(wanted.type or "model")
    if kind is None:
        raise InvalidInput(f"there are no repositories of type {wanted.type!r} here: {', '.join(KINDS)}")
    return RepoId.parse(f"{wanted.organization}/{wanted.name}" if wanted.organization else wanted.name, kind)
