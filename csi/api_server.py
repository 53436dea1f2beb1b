"""The node's own objects at the Kubernetes API server, over plain HTTPS with the pod's service account.

Three calls for the two things that the driver changes on its node, a taint and labels: the official client, which the
router uses, needs some 110 MB for them (docs/csi.md), this one what OpenSSL takes. Addresses are the environment's, as
in every pod; token and authority lie in a directory, and the token is renewed there. Everything blocks, each call for
a bounded time; threads may share it.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from helios.decoding import from_json
from helios.errors import Conflict, Forbidden, HeliosError, NotFound, Unavailable, UsageError
from helios.http.client import HttpClient
from helios.http.hosts import bracketed
from helios.tokens import TokenFile

REQUEST_S: Final = 10.0
"""Longest wait for one answer, in seconds."""
MAX_ANSWER: Final = 4 << 20
"""Longest answer that is read, in bytes: a node lists its images."""
METADATA: Final = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
"""Ask for an object's metadata alone."""
MANAGER: Final = "helios-csi"
"""By whom fields were written, as the API server notes it."""

Operations = Sequence[Mapping[str, Any]]
"""A JSON patch (RFC 6902)."""


class _Taints(msgspec.Struct, frozen=True):
    taints: list[dict[str, Any]] | None = None


class _Node(msgspec.Struct, frozen=True):
    spec: _Taints = _Taints()


class _Driver(msgspec.Struct, frozen=True):
    name: str


class _Drivers(msgspec.Struct, frozen=True):
    drivers: list[_Driver] | None = None


class _CsiNode(msgspec.Struct, frozen=True):
    spec: _Drivers = _Drivers()


class _Metadata(msgspec.Struct, frozen=True):
    labels: dict[str, str] | None = None


class _Labelled(msgspec.Struct, frozen=True):
    metadata: _Metadata = _Metadata()


class _Status(msgspec.Struct, frozen=True):
    message: str = ""


class ApiServer:
    """Calls raise NotFound, Forbidden, Conflict (what was to be changed is not as it was), Unavailable."""

    def __init__(self, account: Path, environ: Mapping[str, str], *, request_s: float = REQUEST_S) -> None:
        """``account`` holds ``token`` and ``ca.crt``. Raises UsageError outside of a cluster."""
        host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not port.isdigit():
            raise UsageError(
                "csi.startup_taint and csi.node_labels need a cluster: KUBERNETES_SERVICE_HOST is not set",
                hint="They are for a pod with a service account.",
            )
        self._account, self._base, self._request_s = account, f"https://{bracketed(host)}:{port}", request_s
        self._lock = threading.Lock()
        self._client: HttpClient | None = None

    def drivers(self, node: str) -> set[str]:
        """The CSI drivers that the node's kubelet knows."""
        try:
            content = self._ask(f"reading the CSINode {node}", "GET", f"/apis/storage.k8s.io/v1/csinodes/{quote(node)}")
        except NotFound:
            return set()  # the kubelet makes it with the first driver
        return {each.name for each in _decoded(content, _CsiNode).spec.drivers or []}

    def taints(self, node: str) -> list[dict[str, Any]]:
        """The node's taints, in their order."""
        return _decoded(self._ask(f"reading the node {node}", "GET", _path(node)), _Node).spec.taints or []

    def patch(self, node: str, operations: Operations) -> None:
        """Apply a JSON patch to the node: all of it, or Conflict."""
        self._patch(f"removing a taint of the node {node}", node, "application/json-patch+json", list(operations))

    def labels(self, node: str) -> dict[str, str]:
        """The node's labels."""
        content = self._ask(f"reading the labels of {node}", "GET", _path(node), accept=METADATA)
        return _decoded(content, _Labelled).metadata.labels or {}

    def set_labels(self, node: str, changes: Mapping[str, str | None]) -> dict[str, str]:
        """Set labels, or remove them (None), and leave all others as they are; the labels that there are then.

        A JSON merge patch (RFC 7396) names nothing else, so there is nobody whose change it could undo.
        """
        body = {"metadata": {"labels": dict(changes)}}
        content = self._patch(f"labelling the node {node}", node, "application/merge-patch+json", body)
        return _decoded(content, _Labelled).metadata.labels or {}

    def close(self) -> None:
        """Close the connections."""
        self._drop()

    # --- inside ---

    def _patch(self, what: str, node: str, kind: str, body: Any) -> bytes:
        path = f"{_path(node)}?fieldManager={MANAGER}"
        return self._ask(what, "PATCH", path, accept=METADATA, kind=kind, body=msgspec.json.encode(body))

    def _ask(
        self, what: str, method: str, path: str, *, accept: str = "application/json", kind: str = "", body: bytes = b""
    ) -> bytes:
        headers = {"accept": accept, **({"content-type": kind} if kind else {})}
        try:
            client = self._connected()
            with client.request(method, path, headers=headers, body=body or None) as response:
                status, content = response.status, response.read(MAX_ANSWER)
        except HeliosError as error:
            self._drop()  # the next one reads the authority again, which may have been replaced
            raise Unavailable(f"{what}: {error.message}") from None
        if status >= 300:
            raise _refusal(what, status, content)
        return content

    def _connected(self) -> HttpClient:
        """Raises UsageError for a service account that can't be read (yet)."""
        with self._lock:
            if self._client is None:
                token, authority = TokenFile(self._account / "token"), self._account / "ca.crt"
                try:
                    context = ssl.create_default_context(cafile=str(authority))
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise UsageError(f"the cluster's authority {authority} can't be read: {reason}") from None
                self._client = HttpClient(
                    self._base, timeout_s=self._request_s, max_idle=2, token=token, context=context
                )
            return self._client

    def _drop(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


def _path(node: str) -> str:
    return f"/api/v1/nodes/{quote(node)}"


def _decoded(content: bytes, kind: type[Any]) -> Any:
    try:
        return from_json(content, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unavailable(f"the API server's answer can't be read: {error}") from None


def _refusal(what: str, status: int, content: bytes) -> HeliosError:
    try:
        said = from_json(content, _Status).message
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = ""
    problem = f"{what}: {status}{said and f', {said}'}"
    if status in (409, 422):  # 422: a test of the patch failed
        return Conflict(problem)
    if status == 404:
        return NotFound(problem)
    if status in (401, 403):
        hint = (
            "The driver's service account needs get and patch on nodes, and for the startup taint get on "
            "csinodes.storage.k8s.io."
        )
        return Forbidden(problem, hint=hint)
    return Unavailable(problem)
