"""A registry's metadata over HTTP, in this process: counts what it is asked, can be made silent or dead.

It checks what it is told: an unknown route or a malformed parameter is an error of the test.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec

from helios.errors import HeliosError, NotFound, RepoNotFound, RevisionNotFound
from helios.names import RepoId, check_revision, is_commit
from heliosfs.store.manifest import (
    CommitRecord,
    FileEntry,
    Manifest,
    git_blob_oid,
    lfs_pointer,
    local_commit,
)
from heliosfs.store.recipe import Recipe
from registry.usage.routes import ReadReport

LFS_FROM = 1024
"""Files of this many bytes or more are LFS files."""


class MetadataRegistry:
    """``publish`` makes commits; ``asked`` counts calls by route; ``silent_s`` delays every answer."""

    def __init__(self) -> None:
        self.refs: dict[RepoId, dict[str, str]] = {}
        self.records: dict[tuple[RepoId, str], CommitRecord] = {}
        self.manifests: dict[str, bytes] = {}
        self.content: dict[str, Path | bytes] = {}
        self.asked: Counter[str] = Counter()
        self.problems: list[str] = []
        self.silent_s = 0.0
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    def __enter__(self) -> MetadataRegistry:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        assert not self.problems

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port after a ``stop``."""
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body in one segment: two would cost 40 ms (delayed acknowledgement)

            def do_GET(self) -> None:
                registry.answer(self)

            def do_POST(self) -> None:
                registry.answer(self, self.rfile.read(int(self.headers["content-length"])))

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on. Kept-alive ones are answered by nobody either."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def publish(
        self,
        name: str,
        files: Mapping[str, bytes | Path],
        ref: str = "main",
        executable: tuple[str, ...] = (),
        kind: str = "models",
        at: int = 1_700_000_000,
    ) -> str:
        entries = {path: self._entry(content, path in executable) for path, content in files.items()}
        return self.publish_record(name, Manifest(entries).encode(), ref, kind, at)

    def publish_record(
        self, name: str, manifest: bytes, ref: str = "main", kind: str = "models", at: int = 1_700_000_000
    ) -> str:
        """Make a commit of a manifest's record, whatever stands in it; its name and its digest are right."""
        repo, digest = RepoId.parse(name, kind), hashlib.sha256(manifest).hexdigest()
        commit = local_commit(repo, digest)
        self.manifests[digest] = manifest
        self.records[repo, commit] = CommitRecord(str(repo), commit, digest, "tester", at)
        self.refs.setdefault(repo, {})[ref] = commit
        return commit

    def _entry(self, content: bytes | Path, executable: bool) -> FileEntry:
        data = content if isinstance(content, bytes) else content.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        self.content[sha256] = content
        lfs = len(data) >= LFS_FROM
        oid = git_blob_oid(lfs_pointer(sha256, len(data)) if lfs else data)
        recipe = Recipe.build(
            sha256, [(b"\0" * 32, min(len(data) - at, 1 << 22)) for at in range(0, len(data), 1 << 22)]
        )
        return FileEntry(sha256, len(data), oid, recipe.digest, lfs, executable)

    def answer(self, handler: BaseHTTPRequestHandler, sent: bytes | None = None) -> None:
        if self._server is None:
            handler.close_connection = True
            return
        parts = urlsplit(handler.path)
        params = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.asked[parts.path] += 1
        time.sleep(self.silent_s)
        try:
            status, body = 200, self._route(parts.path, params) if sent is None else self._told(parts.path, sent)
        except HeliosError as error:
            document = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
            status, body = error.status, json.dumps(document).encode()
        except Exception as error:
            self.problems.append(f"{handler.path}: {error!r}")
            status, body = 500, b""
        try:
            handler.send_response(status)
            handler.send_header("content-length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True

    def _route(self, path: str, params: dict[str, str]) -> bytes:
        if path == "/healthz":
            return b"ok\n"
        if path == "/api/v1/repos":
            repos = [
                {"repo": str(repo), "refs": refs, "updated": 0} for repo, refs in sorted(self.refs.items(), key=str)
            ]
            return json.dumps({"repos": repos}).encode()
        if path == "/api/v1/priorities":
            return b'{"priorities": []}'
        repo = RepoId.from_canonical(params["repo"])
        if repo not in self.refs:
            raise RepoNotFound(f"there is no {repo}")
        if path == "/api/v1/refs":
            return json.dumps({"refs": self.refs[repo]}).encode()
        if path == "/api/v1/commits":
            rev = check_revision(params["rev"])
            commit = rev if is_commit(rev) else self.refs[repo].get(rev, "")
            if (repo, commit) not in self.records:
                raise RevisionNotFound(f"{repo} has no {rev}")
            return json.dumps({"commits": [msgspec.to_builtins(self.records[repo, commit])]}).encode()
        if path == "/api/v1/manifest":
            return self.manifests[self.records[repo, params["commit"]].manifest]
        if path == "/api/v1/content":
            raise NotFound("this registry knows no content")  # as an older one says
        raise AssertionError(f"nobody asks for {path}")

    def _told(self, path: str, sent: bytes) -> bytes:
        assert path == "/api/v1/usage/reads", f"nobody is told anything at {path}"
        for row in msgspec.json.decode(sent, type=ReadReport).rows:
            assert (RepoId.from_canonical(row.repo), row.commit) in self.records
        return b'{"new": true}'
