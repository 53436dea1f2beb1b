"""A registry's metadata over its native API (docs/native-api.md), from the first of several registries that answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from helios.decoding import converted
from helios.errors import IntegrityError, InvalidInput, RevisionNotFound, Unavailable
from helios.http.client import HttpClient
from helios.http.response import Deadline
from helios.names import RepoId, check_ref, is_commit
from helios.tokens import Token, no_token
from heliosfs.store.bulk import MAX_MANIFEST
from heliosfs.store.manifest import CommitRecord
from heliosfs.usage import Row

log = logging.getLogger("heliosfs.catalog")

T = TypeVar("T")

MAX_NAMES: Final = 64 << 20
"""Longest listing of repositories, refs or commits that is accepted, in bytes."""


class MetadataClient:
    """A ``heliosfs.catalog.Registry``. ``urls`` in order of preference; threads may share it.

    ``revive`` is called when none of them answers: it may start one again. An answer is checked before it is believed:
    bad names in it raise IntegrityError.
    """

    def __init__(self, urls: Sequence[str], revive: Callable[[], None] | None = None, token: Token = no_token) -> None:
        self._clients = [HttpClient(url, token=token) for url in urls]
        self._revive = revive
        self._complained: set[str] = set()

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def listing(self, timeout_s: float) -> Mapping[RepoId, Mapping[str, str]]:
        answer = self._json("/api/v1/repos", {}, timeout_s)
        rows = _checked(lambda: [(str(row["repo"]), dict(row["refs"])) for row in answer["repos"]])
        out = {}
        for name, refs in rows:
            try:
                out[RepoId.from_canonical(name)] = _refs(refs)
            except InvalidInput as error:  # one that can't be shown must not hide the others
                if len(self._complained) < 1000 and name not in self._complained:
                    log.warning("a repository can't be shown", extra={"repo": name, "reason": str(error)})
                    self._complained.add(name)
        return out

    def refs(self, repo: RepoId, timeout_s: float) -> Mapping[str, str]:
        answer = self._json("/api/v1/refs", {"repo": str(repo)}, timeout_s)
        return _checked(lambda: _refs(answer["refs"]))

    def commit(self, repo: RepoId, commit: str, timeout_s: float) -> CommitRecord:
        params = {"repo": str(repo), "rev": commit, "limit": "1"}
        answer = self._json("/api/v1/commits", params, timeout_s)
        records = _checked(lambda: [converted(record, CommitRecord) for record in answer["commits"][:1]])
        if not records or records[0].commit != commit:
            raise RevisionNotFound(f"{repo.id} has no commit {commit}")
        return records[0]

    def manifest(self, repo: RepoId, commit: str, timeout_s: float) -> bytes:
        params = {"repo": str(repo), "commit": commit}

        def ask(client: HttpClient, left: float) -> bytes:
            return client.bytes("GET", "/api/v1/manifest", params=params, timeout_s=left, limit=MAX_MANIFEST)

        try:
            return self._first(ask, timeout_s)
        except IntegrityError as error:
            raise IntegrityError(
                f"the manifest of {repo} at {commit} can't be used: {error.message}",
                hint="A mount takes manifests of up to 32 MiB, about 100,000 files: split the repository.",
            ) from error

    def lease(self, holder: str, repo: RepoId, commit: str, seconds: float, timeout_s: float) -> None:
        """Have the registry keep a commit for so long from now on, whatever happens to its refs."""
        body = {"holder": holder, "repo": str(repo), "commit": commit, "seconds": seconds}
        self._first(lambda client, left: client.json("PUT", "/api/v1/leases", body=body, timeout_s=left), timeout_s)

    def priorities(self, timeout_s: float) -> Mapping[tuple[RepoId, str], str]:
        """The classes that people gave: by repository and ref, the empty ref standing for all."""
        answer = self._json("/api/v1/priorities", {}, timeout_s)
        return _checked(
            lambda: {
                (RepoId.from_canonical(row["repo"]), str(row["ref"] or "")): str(row["priority"])
                for row in answer["priorities"]
            }
        )

    def report_reads(
        self, node: str, reporter: str, sequence: int, rows: Sequence[Row], age_s: float, timeout_s: float
    ) -> None:
        """Tell the first registry that answers what was read here. None is started for it."""
        body = {"node": node, "reporter": reporter, "sequence": sequence, "age_s": age_s}
        body["rows"] = [{"repo": r.repo, "commit": r.commit, "reads": r.reads, "bytes": r.bytes} for r in rows]

        def tell(client: HttpClient, left: float) -> None:
            client.json("POST", "/api/v1/usage/reads", body=body, timeout_s=left)

        self._first(tell, timeout_s, revive=False)

    def _json(self, path: str, params: Mapping[str, str], timeout_s: float) -> Any:
        def ask(client: HttpClient, left: float) -> Any:
            data = client.bytes("GET", path, params=params, timeout_s=left, limit=MAX_NAMES)
            return _checked(lambda: msgspec.json.decode(data))

        return self._first(ask, timeout_s)

    def _first(self, call: Callable[[HttpClient, float], T], timeout_s: float, *, revive: bool = True) -> T:
        """The answer of the first registry that gives one; a "no such thing" is an answer."""
        deadline = Deadline.after(timeout_s)
        failure: Unavailable | None = None
        for number, client in enumerate(self._clients):
            try:
                return call(client, deadline.left() / (len(self._clients) - number))
            except Unavailable as error:
                failure = error
        if revive and self._revive is not None:
            self._revive()
        raise failure or Unavailable("no registry is configured")


def _refs(refs: Mapping[str, str]) -> dict[str, str]:
    for ref, commit in refs.items():
        check_ref(ref)
        if not is_commit(commit):
            raise InvalidInput(f"the ref {ref!r} names {commit!r}, which is no commit")
    return dict(refs)


def _checked(read: Callable[[], T]) -> T:
    try:
        return read()
    except (InvalidInput, KeyError, TypeError, AttributeError, ValueError, msgspec.ValidationError) as error:
        raise IntegrityError(f"the registry's answer is malformed: {error!r}") from error
