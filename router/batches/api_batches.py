"""``/v1/batches``: create, look, list, cancel. Each tenant has its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helios.config import BatchSettings
from helios.decoding import from_json
from helios.errors import NotFound
from router import errors
from router.admission.rights import Principal
from router.batches import machine
from router.batches.api import Access, answering, expiry_s, number, page, tenant_of
from router.batches.api_files import Files
from router.batches.lines import ENDPOINTS
from router.batches.machine import NotPossible
from router.batches.records import BATCH_ID, BatchRecord, Who, new_id
from router.batches.shelf import Shelf

ROUTE: Final = "/v1/batches"
DEFAULT_LIST, MAX_LIST = 20, 100
MAX_BODY: Final = 64 << 10
MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512
"""OpenAI's bounds: pairs, and characters of each key and value."""
FIELDS: Final = frozenset({"completion_window", "endpoint", "input_file_id", "metadata", "output_expires_after"})


class Batches:
    """The endpoints. ``now`` gives unix seconds; ``woken`` is told of a new batch."""

    def __init__(
        self, shelf: Shelf, files: Files, access: Access, settings: BatchSettings, now: Callable[[], float],
        woken: Callable[[], None],
    ) -> None:  # fmt: skip
        self._shelf, self._files, self._access, self._settings = shelf, files, access, settings
        self._now, self._woken = now, woken
        self.routes = [
            Route(ROUTE, self._create, methods=["POST"]),
            Route(ROUTE, self._list, methods=["GET"]),
            Route(ROUTE + "/{batch}", self._retrieve, methods=["GET"]),
            Route(ROUTE + "/{batch}/cancel", self._cancel, methods=["POST"]),
        ]

    @answering
    async def _create(self, request: Request) -> Response:
        principal = self._access.principal(request, ROUTE)
        asked = await _body(request)
        tenant, endpoint = tenant_of(principal), asked.get("endpoint")
        if endpoint not in ENDPOINTS:
            known = ", ".join(ENDPOINTS)
            raise errors.invalid_body(f"endpoint has to be one of {known}.", "invalid_value", "endpoint")
        if not principal.may_use(endpoint):
            raise errors.not_allowed(None, endpoint)
        if asked.get("completion_window") != "24h":
            raise errors.invalid_body("completion_window has to be '24h'.", "invalid_value", "completion_window")
        metadata, life_s = _metadata(asked.get("metadata")), self._life_s(asked.get("output_expires_after"))
        identity = asked.get("input_file_id")
        if not isinstance(identity, str):
            message = "input_file_id has to be the id of a file."
            raise errors.invalid_body(message, "missing_required_parameter", "input_file_id")
        file = await self._files.find(tenant, identity, "input_file_id")
        if file.purpose != "batch":
            raise errors.invalid_body("The file's purpose is not 'batch'.", "invalid_purpose", "input_file_id")
        if len(await self._shelf.open_batches(tenant)) >= self._settings.max_open:
            raise errors.too_many_batches(self._settings.max_open)
        now = self._now()
        record = BatchRecord(
            id=new_id("batch_", now), who=_who(principal), endpoint=endpoint, input_file_id=file.id,
            output_file_id=new_id("file-", now), error_file_id=new_id("file-", now), metadata=metadata,
            output_expires_s=int(life_s), created_at=int(now), expires_at=int(now) + machine.WINDOW_S,
        )  # fmt: skip
        await self._shelf.add_batch(record)
        self._woken()
        return JSONResponse(record.shown())

    def _life_s(self, asked: Any) -> float:
        """How long the output shall live. Raises ApiError."""
        if asked is None:
            return self._settings.keep_days * 86400
        if not isinstance(asked, dict):
            message = "output_expires_after has to be an object."
            raise errors.invalid_body(message, "invalid_type", "output_expires_after")
        return expiry_s(asked.get("anchor"), asked.get("seconds"), "output_expires_after")

    @answering
    async def _list(self, request: Request) -> Response:
        tenant = tenant_of(self._access.principal(request, ROUTE))
        limit, after = number(request, "limit", DEFAULT_LIST, MAX_LIST), request.query_params.get("after")
        ids = [one for one in await self._shelf.batch_ids(tenant) if after is None or one < after]

        async def read(identity: str) -> dict[str, Any] | None:
            try:
                return (await self._shelf.batch(tenant, identity)).record.shown()
            except NotFound:
                return None

        return JSONResponse(await page(ids[::-1], limit, read))

    @answering
    async def _retrieve(self, request: Request) -> Response:
        tenant, identity = self._named(request)
        try:
            return JSONResponse((await self._shelf.batch(tenant, identity)).record.shown())
        except NotFound:
            raise errors.no_such("Batch", identity, "batch_id") from None

    @answering
    async def _cancel(self, request: Request) -> Response:
        tenant, identity = self._named(request)
        try:
            record = await self._shelf.change(
                tenant, identity, lambda record: machine.cancelling(record, self._now())
            )  # fmt: skip
        except NotFound:
            raise errors.no_such("Batch", identity, "batch_id") from None
        except NotPossible:
            raise errors.cannot_cancel(identity) from None
        self._woken()
        return JSONResponse(record.shown())

    def _named(self, request: Request) -> tuple[str, str]:
        """The tenant, and the id of the batch. Raises ApiError."""
        tenant, identity = tenant_of(self._access.principal(request, ROUTE)), request.path_params["batch"]
        if not BATCH_ID.match(identity):
            raise errors.no_such("Batch", identity, "batch_id")
        return tenant, identity


def _who(principal: Principal) -> Who:
    if principal.key:
        return Who(principal.tenant, principal.key)
    return Who(principal.tenant, "", [(list(right.models), list(right.routes)) for right in principal.rights])


async def _body(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises ApiError."""
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_BODY:
            raise errors.too_large(MAX_BODY)
    try:
        asked = from_json(content, dict[str, Any])
    except msgspec.DecodeError as error:
        raise errors.invalid_body(f"The body is no JSON object: {error}.") from None
    if unknown := sorted(asked.keys() - FIELDS):
        raise errors.invalid_body(f"Unknown parameter: {unknown[0][:100]!r}.", "unknown_parameter", unknown[0][:100])
    return asked


def _metadata(asked: Any) -> dict[str, str] | None:
    if asked is None:
        return None
    if not isinstance(asked, dict) or not all(isinstance(value, str) for value in asked.values()):
        raise errors.invalid_body("metadata has to be an object of strings.", "invalid_type", "metadata")
    if len(asked) > MAX_METADATA or any(len(k) > MAX_KEY or len(v) > MAX_VALUE for k, v in asked.items()):
        message = f"metadata has at most {MAX_METADATA} pairs, of {MAX_KEY} and {MAX_VALUE} characters."
        raise errors.invalid_body(message, "invalid_value", "metadata")
    return asked
