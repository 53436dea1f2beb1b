"""The registry's native API (docs/native-api.md) for Python: blocking, typed, threads may share one client.

Records (manifests, recipes, placements) are returned as bytes: their readers are in ``heliosfs.store``. Every method
raises the HeliosError that the registry answered with, Unavailable when it can't be reached, or DeadlineExceeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from helios.errors import IntegrityError, InvalidInput, Unavailable
from helios.http.client import HttpClient, error_of
from helios.names import RepoId

T = TypeVar("T")

SLOWEST_BYTES_S: Final = 4 << 20
"""A transfer may take its size over this rate (bytes a second), plus the client's usual deadline."""


class Repo(msgspec.Struct, frozen=True):
    """A repository: its canonical name, its refs, the bytes of its distinct files, when a ref last moved (unix s)."""

    repo: str
    refs: dict[str, str]
    bytes: int
    updated: int

    @property
    def id(self) -> RepoId:
        return RepoId.from_canonical(self.repo)


class Revision(msgspec.Struct, frozen=True):
    """What a revision names: a commit (40 hex) and its manifest's digest (64 hex)."""

    commit: str
    manifest: str


class Commit(msgspec.Struct, frozen=True):
    """A commit record; ``time`` in unix seconds."""

    repo: str
    commit: str
    manifest: str
    author: str
    time: int
    message: str = ""
    parent: str | None = None
    lineage: dict[str, str] = {}


class Move(msgspec.Struct, frozen=True):
    """A ref's way from a commit (None: it was new) to another (None: it was removed); ``time`` in unix seconds."""

    ref: str
    old: str | None
    new: str | None
    author: str
    time: int


class Notice(msgspec.Struct, frozen=True):
    """``commit`` is empty for the whole repository; ``state`` is ``deprecated`` or ``retired``; ``time`` in unix s."""

    commit: str
    state: str
    message: str
    author: str
    time: int
    replacement: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """Bytes: every commit as a full copy; distinct files; what the store keeps."""

    logical: int
    unique: int
    stored: int


class StoredFile(msgspec.Struct, frozen=True):
    """A file of a push that is stored; its bytes are new or deduplicated."""

    path: str
    sha256: str
    size: int
    new_bytes: int
    deduplicated_bytes: int


class PushState(msgspec.Struct, frozen=True):
    """How far a push is: files stored, and bytes read including those of files under way."""

    files: int
    bytes: int


class Pushed(msgspec.Struct, frozen=True):
    """A finished push; ``unchanged`` when the ref pointed at this commit before."""

    commit: str
    manifest: str
    logical_bytes: int
    new_bytes: int
    deduplicated_bytes: int
    unchanged: bool


class Kept(msgspec.Struct, frozen=True):
    """A file that is or was kept back; times in unix seconds."""

    repo: str
    path: str
    sha256: str
    findings: str
    since: int
    released: int | None = None
    released_by: str | None = None


class FollowedRef(msgspec.Struct, frozen=True):
    """An upstream ref that is followed: where it points here, a commit that waits for approval, when it was asked."""

    repo: str
    ref: str
    commit: str
    pending: str | None
    checked: float
    policy: str


class Imported(msgspec.Struct, frozen=True):
    """What a bundle brought: commits, bytes of their files, and bytes that were not here before."""

    commits: list[str]
    logical_bytes: int
    new_bytes: int


class RegistryClient:
    """Calls to one registry. ``local`` says that it runs on this machine and may read files by their path."""

    def __init__(self, http: HttpClient, *, local: bool = False) -> None:
        self.http, self.local = http, local

    def close(self) -> None:
        self.http.close()

    def repos(self) -> list[Repo]:
        return self._get("/api/v1/repos", _Repos).repos

    def refs(self, repo: RepoId) -> dict[str, str]:
        return self._get("/api/v1/refs", _Refs, repo=str(repo)).refs

    def resolve(self, repo: RepoId, rev: str) -> Revision:
        return self._get("/api/v1/resolve", Revision, repo=str(repo), rev=rev)

    def commits(self, repo: RepoId, rev: str, limit: int = 50) -> list[Commit]:
        """Newest first."""
        return self._get("/api/v1/commits", _Commits, repo=str(repo), rev=rev, limit=str(limit)).commits

    def usage(self, repo: RepoId | None = None) -> Usage:
        return self._get("/api/v1/usage", Usage, **({} if repo is None else {"repo": str(repo)}))

    def manifest(self, repo: RepoId, commit: str) -> bytes:
        """The manifest's record; check it against ``Revision.manifest``."""
        return self.http.bytes("GET", "/api/v1/manifest", params={"repo": str(repo), "commit": commit})

    def recipe(self, repo: RepoId, blob: str) -> bytes:
        """The recipe's record; check it against the manifest's entry."""
        return self.http.bytes("GET", "/api/v1/recipe", params={"repo": str(repo), "blob": blob})

    def placement(self, repo: RepoId, blob: str) -> bytes:
        """The placement's JSON form."""
        return self.http.bytes("GET", "/api/v1/placements", params={"repo": str(repo), "blob": blob})

    def ref_kinds(self, repo: RepoId) -> dict[str, str]:
        """Which refs are tags or aliases; the others are branches."""
        return self._get("/api/v1/refs", _Refs, repo=str(repo)).kinds

    def ref_history(self, repo: RepoId, ref: str | None = None, limit: int = 50) -> list[Move]:
        """Who moved which ref when, newest first."""
        params = {"repo": str(repo), "limit": str(limit)} | ({} if ref is None else {"ref": ref})
        return self._get("/api/v1/refs/history", _Moves, **params).moves

    def notices(self, repo: RepoId) -> list[Notice]:
        """What is deprecated or retired of a repository."""
        return self._get("/api/v1/notices", _Notices, repo=str(repo)).notices

    def put_notice(
        self, repo: RepoId, commit: str | None, state: str, message: str, *, replacement: str | None, author: str
    ) -> None:
        """Deprecate or retire a repository (``commit`` None) or one of its commits."""
        body = {"repo": str(repo), "commit": commit, "state": state, "message": message}
        self.http.json("PUT", "/api/v1/notices", body=body | {"replacement": replacement, "author": author})

    def remove_notice(self, repo: RepoId, commit: str | None) -> None:
        params = {"repo": str(repo)} | ({} if commit is None else {"commit": commit})
        self.http.json("DELETE", "/api/v1/notices", params=params)

    def set_ref(
        self, repo: RepoId, ref: str, commit: str, expect: str | None, *, author: str = "", kind: str = "branch"
    ) -> None:
        """Move a ref that points at ``expect`` (None: that does not exist) now; raises Conflict otherwise.

        ``kind`` is what a new one becomes: branch, tag or alias.
        """
        params = {"repo": str(repo), "ref": ref}
        body = {"commit": commit, "expect": expect, "author": author, "kind": kind}
        self.http.json("PUT", "/api/v1/refs", params=params, body=body)

    def delete(self, repo: RepoId, ref: str | None = None) -> None:
        """Remove a ref, or the whole repository."""
        params = {"repo": str(repo)} | ({} if ref is None else {"ref": ref})
        self.http.json("DELETE", "/api/v1/repos", params=params)

    # --- quarantine ---

    def kept(self, repo: RepoId | None = None, *, released: bool = False) -> list[Kept]:
        """Files that are kept back; with ``released`` also those that were let go."""
        params = {"released": "true" if released else "false"} | ({} if repo is None else {"repo": str(repo)})
        return self._get("/api/v1/quarantine", _KeptFiles, **params).files

    def release(self, repo: RepoId, sha256: str, by: str) -> None:
        """Let a file go that is kept back."""
        self.http.json("POST", "/api/v1/quarantine/release", body={"repo": str(repo), "sha256": sha256, "by": by})

    # --- mirror ---

    def followed(self) -> list[FollowedRef]:
        """The upstream refs that the registry follows."""
        return self._get("/api/v1/mirror", _FollowedRefs).refs

    def approve(self, repo: RepoId, ref: str, commit: str) -> None:
        """Let a followed ref move to the commit that waits for it."""
        self.http.json("POST", "/api/v1/mirror/approve", body={"repo": str(repo), "ref": ref, "commit": commit})

    # --- push ---

    def start_push(self, repo: RepoId, ref: str, files: list[dict[str, Any]], *, message: str, author: str) -> str:
        """Start a push of ``files`` (``path``, ``size`` in bytes, ``executable``); returns its id."""
        body = {"repo": str(repo), "ref": ref, "message": message, "author": author, "files": files}
        answer: dict[str, str] = self.http.json("POST", "/api/v1/pushes", body=body)
        return answer["push"]

    def put_file(self, push: str, path: str, local: Path, size: int) -> StoredFile:
        """Store one file of a push; a registry on this machine reads it itself.

        Raises InvalidInput when the file is not ``size`` bytes long any more or changes meanwhile.
        """
        params = {"path": path}
        where = f"/api/v1/pushes/{quote(push)}/files"
        timeout_s = self._deadline(size)
        if self.local:
            params["local"] = str(local)
            return _decode(self.http.bytes("PUT", where, params=params, timeout_s=timeout_s), StoredFile)
        try:
            return self._send(where, params, path, local, size, timeout_s)
        except Unavailable:  # a kept connection that the server had closed, say: the same request again is harmless
            return self._send(where, params, path, local, size, timeout_s)

    def _send(
        self, where: str, params: dict[str, str], path: str, local: Path, size: int, timeout_s: float
    ) -> StoredFile:
        try:
            with open(local, "rb", buffering=0) as file:
                before = local.stat()
                body: Any = _Exact(file, path, size)
                headers = {"content-length": str(size), "content-type": "application/octet-stream"}
                with self.http.request(
                    "PUT", where, params=params, headers=headers, body=body, timeout_s=timeout_s
                ) as response:
                    content = response.read()
                after = local.stat()
        except OSError as error:
            raise InvalidInput(f"{path}: can't be read: {error.strerror}") from None
        if response.status >= 400:
            raise error_of(response.status, content, f"PUT {where}")
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
            raise InvalidInput(f"{path}: changed while it was published; publish again when nobody writes it")
        return _decode(content, StoredFile)

    def push_state(self, push: str) -> PushState:
        return self._get(f"/api/v1/pushes/{quote(push)}", PushState)

    def commit_push(self, push: str) -> Pushed:
        return _decode(self.http.bytes("POST", f"/api/v1/pushes/{quote(push)}/commit"), Pushed)

    def abort_push(self, push: str) -> None:
        self.http.bytes("DELETE", f"/api/v1/pushes/{quote(push)}", timeout_s=180.0)

    # --- pull ---

    def pull(self, repo: RepoId, rev: str, *, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Bring a revision from the registry's upstream: its events as they come, ``done`` last.

        An ``error`` event is raised as the error it describes. ``timeout_s`` bounds the whole pull.
        """
        return self._events("/api/v1/pulls", {"repo": str(repo), "rev": rev}, timeout_s)

    # --- bundles and replication ---

    def export_bundle(self, revisions: list[str], have: list[str], file: BinaryIO) -> int:
        """Write a bundle of revisions (``models/org/name@rev``) to a file, without what ``have`` holds; its bytes."""
        query = urlencode([("rev", rev) for rev in revisions] + [("have", rev) for rev in have])
        size = 0
        with self.http.request("GET", f"/api/v1/bundles?{query}") as response:
            if response.status >= 400:
                raise error_of(response.status, response.read(), "GET /api/v1/bundles")
            buffer = memoryview(bytearray(1 << 20))
            while count := response.read_ready(buffer):
                response.extend(self.http.timeout_s)
                file.write(buffer[:count])
                size += count
        return size

    def import_bundle(self, local: Path) -> Imported:
        """Bring a bundle in."""
        size = local.stat().st_size
        headers = {"content-length": str(size), "content-type": "application/x-tar"}
        with open(local, "rb", buffering=0) as file:
            body: Any = _Exact(file, str(local), size)
            timeout_s = self._deadline(size)
            with self.http.request(
                "POST", "/api/v1/bundles", headers=headers, body=body, timeout_s=timeout_s
            ) as answer:
                content = answer.read()
        if answer.status >= 400:
            raise error_of(answer.status, content, "POST /api/v1/bundles")
        return _decode(content, Imported)

    def replicate(self, peer: str, repos: list[str] | None, *, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Bring a peer's repositories here: the events as they come, ``done`` last; see ``pull``."""
        return self._events("/api/v1/replications", {"peer": peer, "repos": repos}, timeout_s)

    # --- what is stored ---

    def usages(self) -> dict[str, Any]:
        """``total``, ``repos`` and ``unheld``: bytes of each model and in all (docs/native-api.md)."""
        return self._get("/api/v1/usage", dict, all="true")

    def collect(self, *, dry_run: bool, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Collect garbage: the events as they come, ``done`` last; see ``pull``."""
        return self._events("/api/v1/gc", {"dry_run": dry_run}, timeout_s)

    def verify(self, repo: RepoId | None, sample: float, *, repair: bool, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Look at what is stored: the events as they come, ``done`` last; see ``pull``."""
        wanted = {"repo": None if repo is None else str(repo), "sample": sample, "repair": repair}
        return self._events("/api/v1/verify", wanted, timeout_s)

    def lease(self, holder: str, repo: RepoId, commit: str, seconds: float) -> float:
        """Keep a commit for so long from now on (0: no longer), whatever happens to its refs; returns until when."""
        body = {"holder": holder, "repo": str(repo), "commit": commit, "seconds": seconds}
        answer: dict[str, float] = self.http.json("PUT", "/api/v1/leases", body=body)
        return answer["expires"]

    def _events(self, path: str, wanted: dict[str, Any], timeout_s: float) -> Iterator[dict[str, Any]]:
        body = msgspec.json.encode(wanted)
        headers = {"content-type": "application/json"}
        with self.http.request("POST", path, headers=headers, body=body, timeout_s=timeout_s) as response:
            if response.status >= 400:
                raise error_of(response.status, response.read(), f"POST {path}")
            for line in response.lines():
                if not line:
                    continue
                event: dict[str, Any] = _decode(line, dict)
                if event.get("event") == "error":
                    raise error_of(502, line, f"POST {path}")
                yield event
                if event.get("event") == "done":
                    return
        raise Unavailable("the registry's answer ended without saying how it went; look at its log and try again")

    def _deadline(self, size: int) -> float:
        return self.http.timeout_s + size / SLOWEST_BYTES_S

    def _get(self, path: str, kind: type[T], **params: str) -> T:
        return _decode(self.http.bytes("GET", path, params=params), kind)


class _Repos(msgspec.Struct, frozen=True):
    repos: list[Repo]


class _Refs(msgspec.Struct, frozen=True):
    refs: dict[str, str]
    kinds: dict[str, str] = {}


class _Notices(msgspec.Struct, frozen=True):
    notices: list[Notice]


class _Moves(msgspec.Struct, frozen=True):
    moves: list[Move]


class _Commits(msgspec.Struct, frozen=True):
    commits: list[Commit]


class _FollowedRefs(msgspec.Struct, frozen=True):
    refs: list[FollowedRef]


class _KeptFiles(msgspec.Struct, frozen=True):
    files: list[Kept]


class _Exact:
    """A file as a request's body: exactly the announced bytes, or InvalidInput."""

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self._file, self._path, self._left = file, path, size

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self._left -= len(data)
        if self._left < 0 or (not data and self._left):
            raise InvalidInput(f"{self._path}: its size changed while it was published")
        return data


def _decode(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"the registry's answer does not decode: {error}") from None
