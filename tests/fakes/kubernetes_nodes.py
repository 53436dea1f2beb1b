"""A Kubernetes API server for a node and its CSINode, as far as removing a taint needs one; it checks what it is told.

A JSON patch (RFC 6902) is applied whole or not at all, to what the node is at that moment, as the real server does: a
test that fails is 422. What a real one would refuse, and any change but to taints, is kept in ``complaints``. Faults:
``refuse``, statuses for the next requests; ``before_patch``, what happens between a client's look and its patch.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.fakes.kubernetes.errors import Refusal
from tests.fakes.kubernetes.patches import json_patch

TOKEN = "the-service-account"


@dataclass
class NodeServer:
    """A context that serves ``node``."""

    node: dict[str, Any]
    drivers: list[str] | None = None
    """None: there is no CSINode yet."""
    refuse: list[int] = field(default_factory=list)
    before_patch: list[Callable[[], None]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def taints(self) -> list[dict[str, Any]]:
        return self.node["spec"].get("taints") or []

    def kubeconfig(self, path: Path) -> Path:
        """A file with which it is reached."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def __enter__(self) -> NodeServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(*outer._get(self))

            def do_PATCH(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(*outer._patch(self, body))

            def _answer(self, status: int, what: Any) -> None:
                body = json.dumps(what).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _check(self, request: Any) -> tuple[int, Any] | None:
        self.requests.append(f"{request.command} {request.path}")
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.complaints.append("no token")
        if self.refuse:
            return _status(self.refuse.pop(0), "told to")
        return None

    def _get(self, request: Any) -> tuple[int, Any]:
        if refused := self._check(request):
            return refused
        name = self.node["metadata"]["name"]
        if request.path == f"/api/v1/nodes/{name}":
            return 200, self.node
        if request.path == f"/apis/storage.k8s.io/v1/csinodes/{name}":
            if self.drivers is None:
                return _status(404, f'csinodes.storage.k8s.io "{name}" not found')
            listed = [{"name": each, "nodeID": name, "topologyKeys": None} for each in self.drivers]
            return 200, {"kind": "CSINode", "metadata": {"name": name}, "spec": {"drivers": listed}}
        self.complaints.append(f"unknown path {request.path}")
        return _status(404, "not found")

    def _patch(self, request: Any, body: bytes) -> tuple[int, Any]:
        if refused := self._check(request):
            return refused
        if not re.fullmatch(rf"/api/v1/nodes/{self.node['metadata']['name']}", request.path):
            self.complaints.append(f"unknown path {request.path}")
            return _status(404, "not found")
        if request.headers.get("Content-Type") != "application/json-patch+json":
            self.complaints.append(f"not a JSON patch: {request.headers.get('Content-Type')}")
            return _status(415, "unsupported media type")
        if self.before_patch:
            self.before_patch.pop(0)()
        operations = json.loads(body)
        if not any(each["op"] == "test" for each in operations):
            self.complaints.append("a patch without a test could hit what somebody else has changed")
        try:
            after = json_patch(self.node, operations)
        except Refusal as error:
            return _status(422, f"the server rejected our request due to an error in our request: {error.message}")
        if _without_taints(after) != _without_taints(self.node):
            self.complaints.append("something else than taints was changed")
        self.node = after
        return 200, self.node


def _without_taints(node: dict[str, Any]) -> dict[str, Any]:
    return {**node, "spec": {**node["spec"], "taints": None}}


def _status(code: int, message: str) -> tuple[int, Any]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
