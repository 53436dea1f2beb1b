"""``/v1/files``: upload, list, look, read, delete. Each tenant has its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from helios.config import RouterSettings
from helios.errors import NotFound
from router import errors
from router.batches.api import Access, answering, expiry_s, number, page, tenant_of
from router.batches.records import FILE_ID, FileRecord, Part, new_id
from router.batches.shelf import PART, Shelf

ROUTE: Final = "/v1/files"
MAX_LIST: Final = 10_000
UPLOADS: Final = 8
"""Uploads that a process takes at a time; each is on the disk until it is whole."""
FRAMING: Final = 64 << 10
"""Bytes of a form beside the file."""
MAX_NAME: Final = 255


class Files:
    """The endpoints. ``now`` gives unix seconds."""

    def __init__(self, shelf: Shelf, access: Access, settings: RouterSettings, now: Callable[[], float]) -> None:
        self._shelf, self._access, self._now = shelf, access, now
        self._settings, self._idle_s = settings.batches, settings.idle_timeout_s
        self._uploads = 0
        self.routes = [
            Route(ROUTE, self._create, methods=["POST"]),
            Route(ROUTE, self._list, methods=["GET"]),
            Route(ROUTE + "/{file}", self._retrieve, methods=["GET"]),
            Route(ROUTE + "/{file}", self._delete, methods=["DELETE"]),
            Route(ROUTE + "/{file}/content", self._content, methods=["GET"]),
        ]

    async def find(self, tenant: str, identity: str, param: str) -> FileRecord:
        """A file of the tenant. Raises ApiError (404) naming ``param``, and Unavailable."""
        missing = errors.no_such("File", identity, param)
        if not FILE_ID.match(identity):
            raise missing
        try:
            record = await self._shelf.file(tenant, identity)
        except NotFound:
            raise missing from None
        if self._expired(record):
            raise missing
        return record

    def _expired(self, record: FileRecord) -> bool:
        return record.expires_at is not None and self._now() >= record.expires_at

    # --- upload ---

    @answering
    async def _create(self, request: Request) -> Response:
        tenant = tenant_of(self._access.principal(request, ROUTE))
        if self._uploads >= UPLOADS:
            raise errors.too_many_uploads(UPLOADS)
        self._uploads += 1
        try:
            async with self._form(request) as form:
                record = await self._take(tenant, form)
        finally:
            self._uploads -= 1
        return JSONResponse(record.shown())

    async def _take(self, tenant: str, form: FormData) -> FileRecord:
        """Check the form, and store its file. Raises ApiError."""
        purpose, upload = form.get("purpose"), form.get("file")
        if purpose != "batch":
            raise errors.invalid_body("purpose has to be 'batch'.", "invalid_value", "purpose")
        if not isinstance(upload, UploadFile):
            raise errors.invalid_body("The form has no file.", "missing_required_parameter", "file")
        if not upload.size:
            raise errors.invalid_body("The file is empty.", "empty_file", "file")
        limit = self._settings.max_file_mib
        if upload.size > limit << 20:
            raise errors.file_too_large(limit)
        life_s = self._life_s(form)
        if len(await self._shelf.file_ids(tenant)) >= self._settings.max_files:
            raise errors.too_many_files(self._settings.max_files)
        now = self._now()
        identity = new_id("file-", now)
        parts: list[Part] = []
        try:
            while data := await upload.read(PART):
                parts.append(await self._shelf.write_part(tenant, identity, f"{len(parts):06d}", data))
            name = (upload.filename or "file")[:MAX_NAME]
            record = FileRecord(
                id=identity, tenant=tenant, filename=name, purpose="batch", created_at=int(now),
                expires_at=int(now + life_s), parts=parts,
            )  # fmt: skip
            await self._shelf.add_file(record)
        except BaseException:
            with contextlib.suppress(Exception):  # what stays is swept up
                await self._shelf.drop_file(tenant, identity)
            raise
        return record

    def _life_s(self, form: FormData) -> float:
        anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return self._settings.keep_days * 86400
        return expiry_s(anchor, seconds, "expires_after")

    @contextlib.asynccontextmanager
    async def _form(self, request: Request) -> AsyncIterator[FormData]:
        """The form, its file on the disk where it is long. Raises ApiError for one that is none, or too long."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            message = "This route takes a multipart form: Content-Type must be multipart/form-data with a boundary."
            raise errors.invalid_body(message, "invalid_content_type")
        limit = self._settings.max_file_mib
        most, came = (limit << 20) + FRAMING, 0
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise errors.file_too_large(limit)
        receive = request.receive

        async def bounded() -> Message:
            nonlocal came
            try:
                async with asyncio.timeout(self._idle_s):
                    message = await receive()
            except TimeoutError:
                raise errors.body_timeout(self._idle_s) from None
            came += len(message.get("body", b""))
            if came > most:
                raise errors.file_too_large(limit)
            return message

        try:
            form = await Request(request.scope, bounded).form(max_files=1, max_fields=16)
        except HTTPException as error:
            raise errors.invalid_body(f"The form can't be read: {error.detail}.", "invalid_form") from None
        except ClientDisconnect:
            raise errors.invalid_body("The client left.", "invalid_form") from None
        except OSError:
            raise errors.no_space() from None
        try:
            yield form
        finally:
            await form.close()

    # --- the rest ---

    @answering
    async def _list(self, request: Request) -> Response:
        tenant = tenant_of(self._access.principal(request, ROUTE))
        limit = number(request, "limit", MAX_LIST, MAX_LIST)
        order, after = request.query_params.get("order", "desc"), request.query_params.get("after")
        purpose = request.query_params.get("purpose")
        if order not in ("asc", "desc"):
            raise errors.invalid_body("order has to be 'asc' or 'desc'.", "invalid_value", "order")
        ids = await self._shelf.file_ids(tenant)
        if after is not None:
            ids = [one for one in ids if (one > after if order == "asc" else one < after)]

        async def read(identity: str) -> dict[str, Any] | None:
            try:
                record = await self._shelf.file(tenant, identity)
            except NotFound:
                return None
            shows = not self._expired(record) and purpose in (None, record.purpose)
            return record.shown() if shows else None

        return JSONResponse(await page(ids if order == "asc" else ids[::-1], limit, read))

    @answering
    async def _retrieve(self, request: Request) -> Response:
        tenant = tenant_of(self._access.principal(request, ROUTE))
        return JSONResponse((await self.find(tenant, request.path_params["file"], "file_id")).shown())

    @answering
    async def _delete(self, request: Request) -> Response:
        tenant = tenant_of(self._access.principal(request, ROUTE))
        record = await self.find(tenant, request.path_params["file"], "file_id")
        await self._shelf.drop_file(tenant, record.id)
        return JSONResponse({"id": record.id, "object": "file", "deleted": True})

    @answering
    async def _content(self, request: Request) -> Response:
        tenant = tenant_of(self._access.principal(request, ROUTE))
        record = await self.find(tenant, request.path_params["file"], "file_id")
        pieces = self._shelf.read_parts(record.parts)
        first = await anext(pieces, b"")

        async def content() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        headers = {"content-length": str(record.size)}
        return StreamingResponse(content(), headers=headers, media_type="application/octet-stream")
