"""Writes to the API server: each with a deadline, and only while this process leads.

Right before a request is handed to the client, with nothing awaited in between, it is asked for how long this process
may still act; the request's deadline is shorter than that, and without enough time nothing is sent.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec

from helios.decoding import from_json
from helios.errors import HeliosError, IntegrityError
from helios.http.bodies import within
from helios.kube.calls import request
from helios.kube.following import Clients
from helios.kube.kinds import LEASE, Kind
from helios.metrics import OperatorMetrics
from orchestrator.actions import MANAGER, Manifest
from orchestrator.runtime.refusals import NotLeading

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient

CALL_S: Final = 10.0
"""Longest time for one call, in seconds."""
LEAST_S: Final = 0.05
"""With less time than this left nothing is sent any more, in seconds."""
MAX_ANSWER: Final = 8 << 20
"""Longest answer that is read, in bytes; etcd's largest object has 1.5 MiB."""

APPLY: Final = "application/apply-patch+yaml"
"""JSON is nearly YAML (``as_yaml``), and every API server since 1.22 knows this name of it."""
MERGE: Final = "application/merge-patch+json"
UNPRINTABLE: Final = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")

LISTED: Final = 100
FAILURES: Final = (aiohttp.ClientError, TimeoutError, OSError, HeliosError)
"""What calls raise."""


async def call(
    client: ApiClient, method: str, path: str, *, timeout_s: float, query: Mapping[str, Any] | None = None,
    body: Any = None, content_type: str = "application/json",
) -> Manifest:  # fmt: skip
    """The answer's object. Raises Refused, IntegrityError, and what aiohttp raises."""
    if content_type == APPLY:
        # The client sends bytes as they are under a name that it does not know for JSON.
        body, content_type = as_yaml(body), f"{APPLY}; charset=utf-8"
    async with asyncio.timeout(timeout_s):
        answer = await request(
            client, method, path, query=query, body=body, content_type=content_type,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )  # fmt: skip
        async with answer:
            content = await within(answer.content, MAX_ANSWER)
    if content is None:
        raise IntegrityError(f"{method} {path}: the answer has more than {MAX_ANSWER >> 20} MiB")
    try:
        found = from_json(content, dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{method} {path}: the answer does not decode: {error}") from None
    return found


def as_yaml(body: Any) -> bytes:
    """An object as JSON that is YAML as well, as API servers read what is applied: YAML has no pairs of surrogates
    (``\\ud83d\\ude00``), so such characters stand for themselves; those that may not, and other ends of lines, are
    escaped (YAML 1.1, 5.1 and 5.7)."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


@dataclass(slots=True)
class _Open:
    """A client, and how many use it; it is closed by the last one once it is not to be used any more."""

    stack: AsyncExitStack
    client: ApiClient
    namespace: str
    users: int = 0


class Connection:
    """The client of all calls, lists and watches included: opened when one is needed, and anew, with credentials as
    they are then, after a call had no answer or was refused for want of good ones."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._open: _Open | None = None
        self._opening = asyncio.Lock()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[tuple[ApiClient, str]]:
        """The client, and the namespace that is meant; what is raised in the context is looked at. Raises UsageError
        for credentials that can't be read."""
        async with self._opening:
            if self._open is None:
                stack = AsyncExitStack()
                self._open = _Open(stack, *await stack.enter_async_context(self._clients()))
            used = self._open
            used.users += 1
        try:
            yield used.client, used.namespace
        except NotLeading:
            raise
        except FAILURES as error:
            refused = isinstance(error, HeliosError) and error.status != 401
            if not refused and self._open is used:
                self._open = None
            raise
        finally:
            used.users -= 1
            if self._open is not used and not used.users:
                await used.stack.aclose()

    async def close(self) -> None:
        """Nobody uses it any more."""
        gone, self._open = self._open, None
        if gone is not None and not gone.users:
            await gone.stack.aclose()


class Leases:
    """The one Lease of an election. Its calls are not fenced: they are what the fence is made of."""

    def __init__(self, connection: Connection, namespace: str, name: str, timeout_s: float) -> None:
        """``namespace``: empty: the one that is meant."""
        self._connection, self._namespace, self._name, self._timeout_s = connection, namespace, name, timeout_s

    async def read(self) -> Manifest | None:
        async with self._connection.client() as (client, meant):
            try:
                path = LEASE.path(self._namespace or meant, self._name)
                return await call(client, "GET", path, timeout_s=self._timeout_s)
            except HeliosError as error:
                if error.status == 404:
                    return None
                raise

    async def write(self, version: str, spec: dict[str, Any]) -> Manifest:
        """Create it (``version`` empty), or replace what has this version. Raises Refused (409) if it is not so."""
        async with self._connection.client() as (client, meant):
            metadata = {"name": self._name, "namespace": self._namespace or meant}
            method, path = "POST", LEASE.path(metadata["namespace"])
            if version:
                method, path = "PUT", LEASE.path(metadata["namespace"], self._name)
                metadata["resourceVersion"] = version
            body = {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}
            query = {"fieldManager": MANAGER}
            return await call(client, method, path, query=query, body=body, timeout_s=self._timeout_s)


class Writer:
    """Writes of who leads. ``remaining_s``: for how long it may act from now on, in seconds; 0: not at all."""

    def __init__(
        self, connection: Connection, remaining_s: Callable[[], float], metrics: OperatorMetrics, *,
        call_s: float = CALL_S,
    ) -> None:  # fmt: skip
        self._connection, self._remaining_s, self._metrics, self._call_s = connection, remaining_s, metrics, call_s

    async def apply(
        self, kind: Kind, manifest: Manifest, *, subresource: str = "", force: bool = True
    ) -> Manifest:  # fmt: skip
        metadata = manifest["metadata"]
        path = kind.path(metadata.get("namespace", ""), metadata["name"], subresource)
        query = {"fieldManager": MANAGER, "force": "true" if force else "false", "fieldValidation": "Strict"}
        return await self._send("PATCH", path, kind, query=query, body=manifest, content_type=APPLY)

    async def merge(
        self, kind: Kind, namespace: str, name: str, patch: Manifest, *, subresource: str = ""
    ) -> Manifest:  # fmt: skip
        path = kind.path(namespace, name, subresource)
        return await self._send("PATCH", path, kind, query={"fieldManager": MANAGER}, body=patch, content_type=MERGE)

    async def create(self, kind: Kind, namespace: str, manifest: Manifest) -> Manifest:
        return await self._send("POST", kind.path(namespace), kind, query={"fieldManager": MANAGER}, body=manifest)

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str, resource_version: str) -> Manifest:
        options = {
            "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background",
            "preconditions": {"uid": uid, "resourceVersion": resource_version},
        }  # fmt: skip
        return await self._send("DELETE", kind.path(namespace, name), kind, body=options)

    async def labelled(self, kind: Kind, selector: str) -> list[Manifest]:
        """What there is now of a kind, everywhere: at most ``LISTED`` objects."""
        query = {"labelSelector": selector, "limit": str(LISTED)}
        async with self._connection.client() as (client, _):
            answer = await call(client, "GET", kind.path(""), query=query, timeout_s=self._call_s)
        found: list[Manifest] = answer.get("items") or []
        # Items of a list don't say of which kind they are.
        return [{"apiVersion": kind.api_version, "kind": kind.kind, **one} for one in found]

    async def _send(self, method: str, path: str, kind: Kind, **options: Any) -> Manifest:
        async with self._connection.client() as (client, _):
            left = self._remaining_s()
            if left <= LEAST_S:
                raise NotLeading(f"{method} {path} was not sent: this process does not lead any more")
            result = "failed"
            try:
                found = await call(client, method, path, timeout_s=min(self._call_s, left - LEAST_S), **options)
                result = "done"
            except HeliosError as error:
                result = str(error.status)
                raise
            finally:
                self._metrics.writes.labels(kind.kind, method, result).inc()
            return found
