"""A Hugging Face Hub in one process, with faults on demand: what pulls are tested against.

It serves snapshots of files over real HTTP/1.1 with the routes, headers and error codes of the Hub
(info, tree and commits with pages, refs, resolve with Range), large files through a redirect to a second origin that
plays the CDN, and compresses small text for whoever asks for it, as the Hub does. It shares no code with Helios.

``seen`` logs every request with the bytes that left; ``violations`` what a well-behaved client would not have done: a
request that is not huggingface_hub's, a token sent to the CDN, a download that is not pinned to a commit, a range
that starts outside the file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_content import HubFile, Repo, Said

BLOCK = 64 << 10


@dataclass
class Fault:
    """What goes wrong with requests whose path matches, ``times`` times (-1: always)."""

    match: str
    times: int = 1
    method: str | None = None
    skip: int = 0
    """Leave the first so many matching requests alone."""
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the answer with that status; without one, added to the answer's own."""
    body: bytes = b""
    delay_s: float = 0.0
    """Wait before the answer's head."""
    truncate_at: int | None = None
    """Break the connection after so many bytes of the body."""
    flip_at: int | None = None
    """Flip one bit of the file's byte at this offset."""
    bytes_per_s: float | None = None
    stall_at: int | None = None
    """Send so many bytes of the body and then nothing, until the server closes."""
    omit: tuple[str, ...] = ()
    """Headers of the answer to leave out, in lower case."""
    ignore_range: bool = False
    shift_range: int = 0
    """Answer a range from so many bytes later than asked, and say so in Content-Range."""
    then: Callable[[], object] | None = None
    """Called when the fault strikes: to move a ref, for example."""
    first_byte: int | None = None
    """Only requests for a range that begins there (no range begins at 0)."""


@dataclass
class Seen:
    """A request that came, and how many bytes of a body went out."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0

    @property
    def span(self) -> tuple[int, int | None]:
        """The bytes asked for: from, and up to where (None: to the end)."""
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        return (0, None) if found is None else (int(found[1]), int(found[2]) + 1 if found[2] else None)

    @property
    def range_start(self) -> int | None:
        found = re.match(r"bytes=(\d+)-", self.headers.get("range", ""))
        return None if found is None else int(found[1])


class Upstream:
    """The Hub and its CDN; a context manager. ``url`` is what HF_ENDPOINT gets."""

    def __init__(self, *, cdn: bool = True, page_size: int = 1000, siblings_limit: int | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.violations: list[str] = []
        self.page_size, self.siblings_limit = page_size, siblings_limit
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.bytes_per_s: float | None = None
        self._hub = self._listen(HubHandler)
        self._cdn = self._listen(CdnHandler) if cdn else None
        self.url = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.cdn_url = f"http://127.0.0.1:{self._cdn.server_address[1]}" if self._cdn else None

    def _listen(self, handler: type[Handler]) -> ThreadingHTTPServer:
        server = _Server(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, args=(0.05,), name="upstream", daemon=True).start()
        return server

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.closing.set()
        for server in (self._hub, self._cdn):
            if server is not None:
                server.shutdown()
                server.server_close()

    # --- content -----------------------------------------------------------------------------------------------------

    def commit(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        *,
        ref: str | None = "main",
        kind: str = "models",
        lfs: Mapping[str, bool] | None = None,
        tag: bool = False,
        title: str = "A commit",
        message: str = "",
    ) -> str:
        """Add a commit with exactly these files and point the ref at it; returns its id.

        ``tag``: the ref is one. The commit follows the one that the ref, or else main, was at.
        """
        snapshot = {path: HubFile.of(data, path, (lfs or {}).get(path)) for path, data in files.items()}
        text = repr(
            (
                repo,
                sorted((p, f.sha256) for p, f in snapshot.items()),
                len(self.repos.get(f"{kind}/{repo}", Repo()).commits),
            )
        )
        commit = hashlib.sha1(text.encode()).hexdigest()
        held = self.repos.setdefault(f"{kind}/{repo}", Repo())
        held.commits[commit] = snapshot
        held.said[commit] = Said(title, message, held.refs.get(ref or "main") or held.refs.get("main"))
        if ref is not None:
            held.refs[ref] = commit
            if tag:
                held.tags.add(ref)
        return commit

    def move(self, repo: str, ref: str, commit: str, kind: str = "models") -> None:
        self.repos[f"{kind}/{repo}"].refs[ref] = commit

    # --- what happened -----------------------------------------------------------------------------------------------

    def requests(self, pattern: str, method: str | None = None) -> list[Seen]:
        """The requests whose path matches, in order."""
        with self.lock:
            return [s for s in self.seen if re.search(pattern, s.path) and method in (None, s.method)]

    def sent(self, pattern: str) -> int:
        """Bytes of bodies that left for the paths that match."""
        return sum(s.sent for s in self.requests(pattern))

    def strike(self, method: str, path: str, first_byte: int = 0) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times == 0 or fault.method not in (None, method) or not re.search(fault.match, path):
                    continue
                if fault.first_byte not in (None, first_byte):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= fault.times > 0
                break
            else:
                return None
        if fault.then is not None:
            fault.then()
        return replace(fault)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event; anything else shows up in the test's answer."""


class Handler(BaseHTTPRequestHandler):
    """What the Hub and the CDN have in common."""

    hub: Upstream
    protocol_version = "HTTP/1.1"
    timeout = 60
    note: Seen
    fault: Fault

    def log_message(self, format: str, *args: Any) -> None:
        """``seen`` is the log."""

    def do_GET(self) -> None:
        self.respond()

    do_HEAD = do_POST = do_GET

    def respond(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.note = Seen(self.command, url.path, url.query, headers)
        with self.hub.lock:
            self.hub.seen.append(self.note)
        self.fault = self.hub.strike(self.command, url.path, self.note.span[0]) or Fault("$.")
        if self.fault.delay_s:
            self.hub.closing.wait(self.fault.delay_s)
        if self.fault.status is not None:
            return self.answer(self.fault.status, dict(self.fault.headers), self.fault.body)
        self.route(url.path, parse_qs(url.query))

    def route(self, path: str, query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def violate(self, text: str) -> None:
        self.hub.violations.append(f"{self.note.method} {self.note.path}: {text}")

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.note.status = status
        self.send_response(status)
        added = self.fault.headers if self.fault.status is None else {}
        for name, value in {**headers, **added}.items():
            if name.lower() not in self.fault.omit:
                self.send_header(name, value)
        self.end_headers()

    def answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.note.sent += len(body)

    def json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        self.answer(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def error(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        head = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer(status, head, json.dumps({"error": message}).encode())

    def send_file(self, file: HubFile, headers: Mapping[str, str]) -> None:
        """The file's bytes with Range, after the fault's wishes."""
        start, stop, status = 0, file.size, 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.note.headers.get("range", ""))
        if found and not self.fault.ignore_range:
            start, stop = int(found[1]), min(int(found[2]) + 1 if found[2] else file.size, file.size)
            if start >= file.size:
                self.violate(f"range {found[0]} of a file of {file.size} bytes")
                return self.answer(416, {"Content-Range": f"bytes */{file.size}"})
            start, status = min(start + self.fault.shift_range, file.size), 206
        head = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(stop - start)}
        if status == 206:
            head["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        self.head(status, head)
        if self.command != "HEAD":
            self.stream(file, start, stop)

    def stream(self, file: HubFile, start: int, stop: int) -> None:
        rate = self.fault.bytes_per_s or self.hub.bytes_per_s
        cut = min((c for c in (self.fault.truncate_at, self.fault.stall_at) if c is not None), default=None)
        end = stop if cut is None else min(stop, start + cut)
        for offset in range(start, end, BLOCK):
            data = bytearray(file.read(offset, min(BLOCK, end - offset)))
            if self.fault.flip_at is not None and offset <= self.fault.flip_at < offset + len(data):
                data[self.fault.flip_at - offset] ^= 1
            self.wfile.write(data)
            self.note.sent += len(data)
            if rate and self.hub.closing.wait(len(data) / rate):
                break
        if self.fault.stall_at is not None:
            self.hub.closing.wait(60)
        if end < stop:
            self.close_connection = True


class CdnHandler(Handler):
    """Presigned URLs: the path names the blob, the query holds the signature, no token may come along."""

    def route(self, path: str, query: dict[str, list[str]]) -> None:
        if "authorization" in self.note.headers:
            self.violate("the token was sent to another origin")
        if query.get("sig") != [signature(path)]:
            return self.answer(403, {}, b"bad signature")
        sha256 = path.rsplit("/", 1)[-1]
        for repo in self.hub.repos.values():
            for snapshot in repo.commits.values():
                for file in snapshot.values():
                    if file.sha256 == sha256:
                        return self.send_file(file, {"ETag": f'"{sha256}"'})
        self.answer(404, {})


class HubHandler(Handler):
    """The Hub's routes."""

    xet: str | None = None

    def route(self, path: str, query: dict[str, list[str]]) -> None:
        if path == "/api/agent-harnesses":  # huggingface_hub 2.x asks for it by itself, once
            return self.error(404, None, "none")
        if "hf_hub/" not in self.note.headers.get("user-agent", ""):
            self.violate(f"user agent {self.note.headers.get('user-agent')!r} is not huggingface_hub's")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        kind = parts[1] if parts[0] == "api" else parts[0] if parts[0] == "datasets" else "models"
        rest = parts[2:] if parts[0] == "api" else parts[1:] if parts[0] == "datasets" else parts
        for length in (2, 1):
            repo = self.hub.repos.get(f"{kind}/{'/'.join(rest[:length])}")
            if repo is not None:
                break
        else:
            return self.error(401, "RepoNotFound", "Repository not found")
        repo_id, call, args = "/".join(rest[:length]), *(rest[length : length + 1] or [""]), rest[length + 1 :]
        shown = self.note.headers.get("authorization")
        if repo.private is not None and shown != f"Bearer {repo.private}":
            return self.error(401, "RepoNotFound", "Repository not found")
        open_to_all = repo.listed and parts[0] == "api"
        if repo.gated is not None and not open_to_all and shown != f"Bearer {repo.gated}":
            return self.error(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        if call == "refs":
            return self.json(repo.ref_list("include_prs" in query))
        revision = args[0] if args else "main"
        commit = repo.resolve(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if parts[0] != "api":
            self.xet = None if not repo.masked_xet else "*" * 64 if repo.gated else "ab" * 32
            return self.resolve(files, commit, revision, "/".join(args[1:]))
        if call == "tree":
            xet = None if not repo.masked_xet else "*" * 64 if repo.gated else "ab" * 32
            return self.tree(files, "/".join(args[1:]), query, xet)
        if call == "commits":
            return self.pages(repo.history(commit), query, int(query.get("limit", ["50"])[0]))
        if call in ("", "revision"):
            return self.info(repo_id, repo, commit, "blobs" in query)
        self.error(404, None, f"no such route: {path}")

    def info(self, repo_id: str, repo: Repo, commit: str, blobs: bool) -> None:
        files = sorted(repo.commits[commit].items())[: self.hub.siblings_limit]
        self.json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit,
                "private": repo.private is not None,
                "gated": "auto" if repo.gated else False,
                "lastModified": "2026-03-01T12:00:00.000Z",
                "cardData": repo.card,
                "siblings": [file.as_sibling(path, blobs) for path, file in files],
            }
        )

    def tree(self, files: dict[str, HubFile], below: str, query: dict[str, list[str]], xet: str | None = None) -> None:
        first = int(query.get("cursor", ["0"])[0])
        items = [f.as_tree_item(p, xet) for p, f in sorted(files.items()) if not below or p.startswith(f"{below}/")]
        headers = {}
        if first + self.hub.page_size < len(items):
            kept = "&".join(f"{k}={v[0]}" for k, v in query.items() if k != "cursor")
            link = f"{self.hub.url}{self.note.path}?{kept}&cursor={first + self.hub.page_size}"
            headers["Link"] = f'<{link}>; rel="next"'
        self.json(items[first : first + self.hub.page_size], headers)

    def pages(self, items: list[dict[str, Any]], query: dict[str, list[str]], limit: int) -> None:
        """A page by its number, ``p``."""
        page = int(query.get("p", ["0"])[0])
        headers = {"X-Total-Count": str(len(items))}
        if (page + 1) * limit < len(items):
            headers["Link"] = f'<{self.hub.url}{self.note.path}?limit={limit}&p={page + 1}>; rel="next"'
        self.json(items[page * limit : (page + 1) * limit], headers)

    def resolve(self, files: dict[str, HubFile], commit: str, revision: str, path: str) -> None:
        if revision != commit and self.command == "GET":
            self.violate("a download that is not pinned to a commit")
        file = files.get(path)
        if file is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            if self.xet:
                headers["X-Xet-Hash"] = self.xet
            if self.hub.cdn_url is not None:
                target = f"/repos/{file.sha256}"
                headers["Location"] = f"{self.hub.cdn_url}{target}?sig={signature(target)}"
                return self.answer(302, headers)
        elif "gzip" in self.note.headers.get("accept-encoding", ""):
            # As the Hub's edge does: compressed on the fly, so Range is ignored and no length is given.
            body = gzip.compress(file.read(0, file.size))
            self.head(200, {**headers, "Content-Encoding": "gzip", "Connection": "close"})
            if self.command != "HEAD":
                self.wfile.write(body)
                self.note.sent += len(body)
            self.close_connection = True
            return None
        self.send_file(file, headers)


def signature(path: str) -> str:
    return hashlib.sha256(f"cdn {path}".encode()).hexdigest()[:16]


def rate_limited(seconds: int) -> tuple[int, dict[str, str]]:
    """Status and headers of the Hub's 429."""
    return 429, {
        "RateLimit": f'"resolvers";r=0;t={seconds}',
        "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300',
    }
