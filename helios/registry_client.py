"""The registry's native API (docs/native-api.md) for Python: blocking, typed, threads may share one client.

Records (manifests, recipes, placements) are returned as bytes: their readers are in ``heliosfs.store``. Every method
raises the HeliosError that the registry answered with, Unavailable when it can't be reached, or DeadlineExceeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError, InvalidInput, Unavailable
from helios.http.client import HttpClient, error_of
from helios.names import RepoId
from helios.registry_answers import (
    Allowed,
    Commit,
    CommitList,
    DomainInfo,
    DomainList,
    FollowedList,
    FollowedRef,
    Imported,
    Kept,
    KeptList,
    KnownChunks,
    Lease,
    LeaseList,
    ModelPlace,
    Move,
    MoveList,
    Notice,
    NoticeList,
    Offered,
    Place,
    PlaceList,
    PodAllowed,
    Priority,
    PriorityList,
    Pushed,
    PushState,
    QuotaList,
    QuotaState,
    Reads,
    RefTable,
    Repo,
    RepoList,
    Revision,
    Signature,
    StartedPush,
    StoredFile,
    Usage,
)

T = TypeVar("T")

Sent = Callable[[int], None]
"""Told how many more bytes were sent."""

SLOWEST_BYTES_S: Final = 4 << 20
"""A transfer may take its size over this rate (bytes a second), plus the client's usual deadline."""


TURN_S: Final = 300.0
"""Longest that a file which a registry puts together waits for others', in seconds."""

MAX_LIST: Final = 64 << 20
"""Longest list that is read, in bytes."""


class RegistryClient:
    """Calls to one registry. ``local`` says that it runs on this machine and may read files by their path."""

    def __init__(self, http: HttpClient, *, local: bool = False) -> None:
        self.http, self.local = http, local

    def close(self) -> None:
        self.http.close()

    def repos(self) -> list[Repo]:
        return self._get("/api/v1/repos", RepoList).repos

    def refs(self, repo: RepoId) -> dict[str, str]:
        return self._get("/api/v1/refs", RefTable, repo=str(repo)).refs

    def resolve(self, repo: RepoId, rev: str) -> Revision:
        return self._get("/api/v1/resolve", Revision, repo=str(repo), rev=rev)

    def commits(self, repo: RepoId, rev: str, limit: int = 50) -> list[Commit]:
        """Newest first."""
        return self._get("/api/v1/commits", CommitList, repo=str(repo), rev=rev, limit=str(limit)).commits

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
        return self._get("/api/v1/refs", RefTable, repo=str(repo)).kinds

    def ref_history(self, repo: RepoId, ref: str | None = None, limit: int = 50) -> list[Move]:
        """Who moved which ref when, newest first."""
        params = {"repo": str(repo), "limit": str(limit)} | ({} if ref is None else {"ref": ref})
        return self._get("/api/v1/refs/history", MoveList, **params).moves

    def notices(self, repo: RepoId) -> list[Notice]:
        """What is deprecated or retired of a repository."""
        return self._get("/api/v1/notices", NoticeList, repo=str(repo)).notices

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

    def delete(self, repo: RepoId, ref: str | None = None, expect: str | None = None) -> None:
        """Remove a ref, or the whole repository. A ref is removed from the commit ``expect`` only, if that is given;
        raises Conflict otherwise."""
        params = {"repo": str(repo)} | ({} if ref is None else {"ref": ref})
        params |= {} if expect is None else {"expect": expect}
        self.http.json("DELETE", "/api/v1/repos", params=params)

    # --- quotas and classes ---

    def quotas(self) -> list[QuotaState]:
        """How full every quota is."""
        return self._get("/api/v1/quotas", QuotaList).quotas

    def reads(self, *, since: int | None = None, repo: RepoId | None = None, by: str = "repo,time") -> Reads:
        """Who read what since then, in unix seconds (None: a week ago); ``by``: time, repo, commit, node (commas)."""
        params = {"by": by} | ({} if repo is None else {"repo": str(repo)})
        return self._get("/api/v1/usage/reads", Reads, **params | ({} if since is None else {"since": str(since)}))

    def priorities(self) -> list[Priority]:
        """The classes that were given."""
        return self._get("/api/v1/priorities", PriorityList).priorities

    def set_priority(self, repo: RepoId, ref: str | None, priority: str, *, author: str = "") -> None:
        """Give a repository (``ref`` None) or a ref a class: critical, normal or scratch."""
        body = {"repo": str(repo), "ref": ref, "priority": priority, "author": author}
        self.http.json("PUT", "/api/v1/priorities", body=body)

    def clear_priority(self, repo: RepoId, ref: str | None) -> None:
        """Take a class back. Raises NotFound where none was given."""
        params = {"repo": str(repo)} | ({} if ref is None else {"ref": ref})
        self.http.json("DELETE", "/api/v1/priorities", params=params)

    # --- quarantine ---

    def kept(self, repo: RepoId | None = None, *, released: bool = False) -> list[Kept]:
        """Files that are kept back; with ``released`` also those that were let go."""
        params = {"released": "true" if released else "false"} | ({} if repo is None else {"repo": str(repo)})
        return self._get("/api/v1/quarantine", KeptList, **params).files

    def release(self, repo: RepoId, sha256: str, by: str) -> None:
        """Let a file go that is kept back."""
        self.http.json("POST", "/api/v1/quarantine/release", body={"repo": str(repo), "sha256": sha256, "by": by})

    def signer(self, repo: RepoId, commit: str) -> str | None:
        """Who signed the commit, where a rule of the registry asked for it; None: nobody."""
        return self._get("/api/v1/signature", Signature, repo=str(repo), commit=commit).signer

    # --- levels ---

    def places(self) -> list[ModelPlace]:
        """At which level everything is that the registry knows."""
        return self._get("/api/v1/where", PlaceList).models

    def where(self, repo: RepoId, rev: str) -> Place:
        """At which level a revision is. Changes nothing."""
        return self._get("/api/v1/where", Place, repo=str(repo), rev=rev)

    def fetch(self, repo: RepoId, rev: str) -> Place:
        """The same, and have it brought from the upstream if it is not here; answers at once."""
        return _decode(self.http.bytes("POST", "/api/v1/where", body={"repo": str(repo), "rev": rev}), Place)

    # --- mirror ---

    def followed(self) -> list[FollowedRef]:
        """The upstream refs that the registry follows."""
        return self._get("/api/v1/mirror", FollowedList).refs

    def approve(self, repo: RepoId, ref: str, commit: str) -> None:
        """Let a followed ref move to the commit that waits for it."""
        self.http.json("POST", "/api/v1/mirror/approve", body={"repo": str(repo), "ref": ref, "commit": commit})

    def detach(self, repo: RepoId, ref: str) -> None:
        """Make a followed ref one's own, so that it can be pushed to."""
        self.http.json("POST", "/api/v1/mirror/detach", body={"repo": str(repo), "ref": ref})

    # --- push ---

    def start_push(
        self, repo: RepoId, ref: str, files: list[dict[str, Any]], *, message: str, author: str
    ) -> StartedPush:
        """Start a push of ``files`` (``path``, ``size`` in bytes, ``executable``)."""
        body = {"repo": str(repo), "ref": ref, "message": message, "author": author, "files": files}
        return _decode(self.http.bytes("POST", "/api/v1/pushes", body=body), StartedPush)

    def put_file(self, push: str, path: str, local: Path, size: int, sent: Sent = lambda _: None) -> StoredFile:
        """Publish one of a push's files, read by the registry itself where it is local, else sent.

        Sending it breaks off with Unavailable where the connection does. ``sent`` is told how many more bytes were
        sent. Raises InvalidInput when the file is not ``size`` bytes long any more or changes meanwhile.
        """
        if self.local:
            where, params = f"/api/v1/pushes/{quote(push)}/files", {"path": path, "local": str(local)}
            return _decode(self.http.bytes("PUT", where, params=params, timeout_s=self._deadline(size)), StoredFile)
        try:
            with open(local, "rb", buffering=0) as file:
                before = local.stat()
                content = self._send(push, "files", path, _Exact(file, path, size, sent), size, self._deadline(size))
                after = local.stat()
        except OSError as error:
            raise InvalidInput(f"{path}: can't be read: {error.strerror}") from None
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
            raise InvalidInput(f"{path}: changed while it was published; publish again when nobody writes it")
        return _decode(content, StoredFile)

    def offer(self, push: str, path: str, recipe: bytes, size: int) -> Offered:
        """Offer one of a push's files, of ``size`` bytes, by its recipe's record, any number of times."""
        timeout_s = TURN_S + self._deadline(size)
        return _decode(self._send(push, "recipes", path, recipe, len(recipe), timeout_s), Offered)

    def known_chunks(self, push: str, path: str, head: bytes) -> int:
        """How many of the chunks that a batch's head names the registry has (and may say so)."""
        content = self._send(push, "chunks", path, head, len(head), self._deadline(len(head)), method="POST")
        return _decode(content, KnownChunks).known

    def put_chunks(self, push: str, path: str, body: Any, length: int) -> None:
        """Send a batch of chunks of a file (heliosfs/store/batch.py), ``length`` bytes with its head."""
        self._send(push, "chunks", path, body, length, self._deadline(length))

    def _send(
        self, push: str, what: str, path: str, body: Any, length: int, timeout_s: float, *, method: str = "PUT"
    ) -> bytes:
        where = f"/api/v1/pushes/{quote(push)}/{what}"
        headers = {"content-length": str(length), "content-type": "application/octet-stream"}
        with self.http.request(
            method, where, params={"path": path}, headers=headers, body=body, timeout_s=timeout_s
        ) as response:
            content = response.read(MAX_LIST)
        if response.status >= 400:
            raise error_of(response.status, content, f"{method} {where}")
        return content

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
                raise error_of(response.status, response.read(MAX_LIST), "GET /api/v1/bundles")
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
                content = answer.read(MAX_LIST)
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

    def domains(self) -> list[DomainInfo]:
        """Every domain, what it holds and whose it is (docs/native-api.md)."""
        return self._get("/api/v1/domains", DomainList).domains

    def remove_domain(self, domain: str, *, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Remove a domain with all that is stored in it: the events as they come, ``done`` last; see ``pull``."""
        return self._events("/api/v1/domains/remove", {"domain": domain}, timeout_s)

    def compress(
        self, repo: RepoId | None, unread_s: float | None, *, dry_run: bool, timeout_s: float
    ) -> Iterator[dict[str, Any]]:
        """Compress what nobody has read for so long (None: as is set): the events as they come; see ``pull``."""
        wanted = {"repo": None if repo is None else str(repo), "unread_s": unread_s, "dry_run": dry_run}
        return self._events("/api/v1/compress", wanted, timeout_s)

    def lease(self, holder: str, repo: RepoId, commit: str, seconds: float) -> float:
        """Keep a commit for so long from now on (0: no longer), whatever happens to its refs; returns until when."""
        body = {"holder": holder, "repo": str(repo), "commit": commit, "seconds": seconds}
        answer: dict[str, float] = self.http.json("PUT", "/api/v1/leases", body=body)
        return answer["expires"]

    def allowed(self, repo: RepoId, namespace: str) -> Allowed:
        """Whether pods of a Kubernetes namespace may read a repository."""
        return self._get("/api/v1/access", Allowed, repo=str(repo), namespace=namespace)

    def pod_allowed(self, repo: RepoId, token: str) -> PodAllowed:
        """Whether the pod whose service account's token it is may read a repository. Raises Unauthorized for a token
        that the registry does not take."""
        content = self.http.bytes("POST", "/api/v1/access", body={"repo": str(repo), "token": token})
        return _decode(content, PodAllowed)

    def leases(self) -> list[Lease]:
        """Every lease that holds, of repositories that the caller may see."""
        return self._get("/api/v1/leases", LeaseList).leases

    def _events(self, path: str, wanted: dict[str, Any], timeout_s: float) -> Iterator[dict[str, Any]]:
        body = msgspec.json.encode(wanted)
        headers = {"content-type": "application/json"}
        with self.http.request("POST", path, headers=headers, body=body, timeout_s=timeout_s) as response:
            if response.status >= 400:
                raise error_of(response.status, response.read(MAX_LIST), f"POST {path}")
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
        return _decode(self.http.bytes("GET", path, params=params, limit=MAX_LIST), kind)


class _Exact:
    """A file as a request's body: exactly the announced bytes, or InvalidInput."""

    def __init__(self, file: BinaryIO, path: str, size: int, sent: Sent = lambda _: None) -> None:
        self._file, self._path, self._left, self._sent = file, path, size, sent

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self._left -= len(data)
        if self._left < 0 or (not data and self._left):
            raise InvalidInput(f"{self._path}: its size changed while it was published")
        self._sent(len(data))
        return data


def _decode(content: bytes, kind: type[T]) -> T:
    try:
        return from_json(content, kind)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"the registry's answer does not decode: {error}") from None
