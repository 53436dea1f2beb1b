"""A Kubernetes API server for a node and its CSINode, as far as a taint and labels need one; it checks what it is told.

A JSON patch (RFC 6902) or a merge patch (RFC 7396) is applied whole or not at all, to what the node is at that moment,
as the real server does: a test that fails is 422, and so is a label that can't be one. Any change but to taints and to
labels of ours is kept in ``complaints``. Faults: ``refuse``, statuses for the next requests; ``silent``; ``torn``;
``before_patch``, what happens between a client's look and its patch.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.kubernetes.errors import Refusal
from tests.fakes.kubernetes.patches import json_patch, merge_patch
from tests.support.certificates import Authority
from tests.support.loopback import Asked, Loopback, Said, said

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
LABEL = re.compile(rf"(?:[a-z0-9](?:[a-z0-9.-]{{0,251}}[a-z0-9])?/)?{NAME}")
VALUE = re.compile(rf"(?:{NAME})?")
"""Keys and values of labels, as Kubernetes wants them."""
TOKEN = "the-service-account"


@dataclass
class NodeServer:
    """A context that serves ``node``, over TLS with a certificate made in ``directory``."""

    node: dict[str, Any]
    directory: Path
    drivers: list[str] | None = None
    """None: there is no CSINode yet."""
    refuse: list[int] = field(default_factory=list)
    silent: bool = False
    """It takes requests and answers none."""
    torn: int = 0
    """So many of the next patches are done, and the connection is closed before the answer."""
    before_patch: list[Callable[[], None]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    token: str = TOKEN

    @property
    def taints(self) -> list[dict[str, Any]]:
        return self.node["spec"].get("taints") or []

    @property
    def labels(self) -> dict[str, str]:
        return self.node["metadata"].get("labels") or {}

    @property
    def patches(self) -> int:
        """How many patches came."""
        return sum(each.startswith("PATCH ") for each in self.requests)

    @property
    def account(self) -> Path:
        """A pod's service account: the directory with its token and the cluster's authority."""
        return self.directory / "serviceaccount"

    @property
    def environ(self) -> dict[str, str]:
        """What Kubernetes sets in a pod."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self._server.port)}

    def __enter__(self) -> NodeServer:
        authority = Authority(self.directory / "authority")
        self.account.mkdir(exist_ok=True)
        (self.account / "token").write_text(self.token)
        shutil.copy(authority.path, self.account / "ca.crt")
        self._server = Loopback(self._answer, authority.issue("api-server", "127.0.0.1")).__enter__()
        return self

    def __exit__(self, *how: object) -> None:
        self._server.__exit__(*how)

    def _answer(self, asked: Asked) -> Said:
        self.requests.append(f"{asked.method} {asked.path}")
        if self.silent:
            return Said(silent=True)
        if asked.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        if self.refuse:
            return _status(self.refuse.pop(0), "told to")
        path, _, query = asked.path.partition("?")
        name = self.node["metadata"]["name"]
        if asked.method == "GET" and path == f"/apis/storage.k8s.io/v1/csinodes/{name}":
            if self.drivers is None:
                return _status(404, f'csinodes.storage.k8s.io "{name}" not found')
            listed = [{"name": each, "nodeID": name, "topologyKeys": None} for each in self.drivers]
            return said({"kind": "CSINode", "metadata": {"name": name}, "spec": {"drivers": listed}})
        if path != f"/api/v1/nodes/{name}" or asked.method not in ("GET", "PATCH"):
            self.complaints.append(f"unknown request {asked.method} {path}")
            return _status(404, "not found")
        if asked.method == "PATCH":
            if query != "fieldManager=helios-csi":
                self.complaints.append(f"nobody says who patches: {query!r}")
            if self.before_patch:
                self.before_patch.pop(0)()
            try:
                self._patch(asked)
            except Refusal as error:
                return _status(422, f"the server rejected our request due to an error in our request: {error.message}")
            if self.torn:
                self.torn -= 1
                return Said(torn=True)
        if "as=PartialObjectMetadata" in asked.headers.get("Accept", ""):
            return said({"kind": "PartialObjectMetadata", "metadata": self.node["metadata"]})
        return said(self.node)

    def _patch(self, asked: Asked) -> None:
        """Change the node, whole or not at all. Raises Refusal."""
        kind, patch = asked.headers.get("Content-Type"), json.loads(asked.body)
        if kind == "application/json-patch+json":
            if not any(each["op"] == "test" for each in patch):
                self.complaints.append("a patch without a test could hit what somebody else has changed")
            after = json_patch(self.node, patch)
            if _without_taints(after) != _without_taints(self.node):
                self.complaints.append("something else than taints was changed")
        elif kind == "application/merge-patch+json":
            after = merge_patch(self.node, patch)
            if set(patch) != {"metadata"} or set(patch["metadata"]) != {"labels"}:
                self.complaints.append("something else than labels was changed")
            for key, value in patch["metadata"]["labels"].items():
                if not LABEL.fullmatch(key) or not (value is None or VALUE.fullmatch(value)):
                    raise Refusal(422, "Invalid", f"metadata.labels: Invalid value: {key!r}: {value!r}")
                if not key.startswith("helios.dev/cached-"):
                    self.complaints.append(f"somebody else's label was changed: {key}")
        else:
            raise Refusal(422, "Invalid", f"the body of the request was in an unknown format: {kind}")
        self.node = after


def _without_taints(node: dict[str, Any]) -> dict[str, Any]:
    return {**node, "spec": {**node["spec"], "taints": None}}


def _status(code: int, message: str) -> Said:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
    return said(status, code)
