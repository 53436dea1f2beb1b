"""What an upstream Hub is asked: what a revision holds, who may read it, and where a file's bytes are.

The user agent and the registry's own token are huggingface_hub's (0.36, 1.x and 2.x all work), imported on first use.
Requests go through our own blocking client: each has a deadline that holds, redirects are looked at before they are
followed, and one rate limit stands for all.

Everything blocks and is called from worker threads; every wait ends early when the caller's ``stop`` is set.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar
from urllib.parse import quote

from helios.errors import DeadlineExceeded, IntegrityError, Preparing, RateLimited, Unavailable
from helios.http.response import Response
from helios.names import RepoId, is_commit
from registry.pull import faults
from registry.pull.answers import MAX_FILES, MAX_JSON, Head, Info, Item, decode
from registry.pull.listing import RemoteFile, Snapshot, check
from registry.pull.origins import HOPS, REDIRECTS, Origins, Target
from registry.pull.retry import Bucket, Gate, Retry, Transient

log = logging.getLogger("helios.registry.pull")

TIMEOUT_S: Final = 20.0
"""Longest wait for an answer's head, or for the next bytes of one; then the attempt has failed."""
AGENT: Final = "helios"

NEXT: Final = re.compile(r'<([^<>]+)>\s*;[^,]*\brel="?next"?')

T = TypeVar("T")
Token = str | Literal[False] | None
"""A caller's token; False: none at all; None: the registry's own, if it has one."""


class Stopped(Unavailable):
    """The caller's ``stop`` was set: another file of the pull failed, or the registry ends."""

    def __init__(self) -> None:
        super().__init__("the pull was stopped", hint="Pull again: what is here already is kept.")


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers and body of a request without a long body; ``target`` is where it came from."""

    status: int
    headers: Any
    body: bytes
    target: Target


class Upstream:
    """One Hub. Threads may share it. ``stall_s`` is how long failures may go on without progress, in seconds."""

    def __init__(self, endpoint: str, *, stall_s: float, redirects: Sequence[str] = (), offline: bool = False) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.stall_s, self.offline = stall_s, offline
        self.gate = Gate()
        self.origins = Origins(self.endpoint, redirects, timeout_s=TIMEOUT_S)

    def close(self) -> None:
        self.origins.close()

    def snapshot(
        self, repo: RepoId, revision: str, stop: threading.Event, *, token: Token = None, retry: Retry | None = None
    ) -> Snapshot:
        """What the revision names now and which files it has, checked.

        Raises RepoNotFound, RevisionNotFound, Retired, Forbidden, IntegrityError (an answer that makes no sense),
        Unavailable or DeadlineExceeded.
        """
        info, _ = self._info(repo, revision, "?blobs=true", Info, stop, token, retry)
        commit, siblings = info.sha, info.siblings or []
        known = [file for file in (sibling.file() for sibling in siblings) if file is not None]
        if not siblings or len(known) < len(siblings) or len(siblings) >= 1000:
            # Listings in the info may be cut, and some mirrors leave the sizes out: the tree has everything.
            known = list(self._tree(repo, commit or revision, stop, token, retry))
        check(repo, commit, known, revision)
        lineage = {"upstream": self.lineage(repo), **info.lineage}
        author = info.author or repo.org or repo.name
        return Snapshot(repo, str(commit), tuple(known), author, info.seconds, lineage, info.restricted, info.card)

    def lineage(self, repo: RepoId) -> str:
        """The repository's address at the upstream, as commits name it."""
        return f"{self.endpoint}/{'' if repo.kind == 'models' else 'datasets/'}{repo.id}"

    def commit_of(
        self, repo: RepoId, revision: str, stop: threading.Event, *, token: Token, retry: Retry
    ) -> tuple[str, bool]:
        """The commit that the revision names now, and whether the repository is restricted; raises as ``snapshot``."""
        info, _ = self._info(repo, revision, "", Head, stop, token, retry)
        if info.sha is None or not is_commit(info.sha):
            raise IntegrityError(f"the upstream gives {info.sha!r} as commit of {repo.id}@{revision}"[:300])
        return info.sha, info.restricted

    def check_access(
        self, repo: RepoId, commit: str, path: str, stop: threading.Event, *, token: Token, retry: Retry
    ) -> None:
        """Raises what the upstream says to somebody with this token who wants the file; nothing when it lets them."""
        where = faults.Where(self.endpoint, repo, commit, path)
        target = self.file_target(repo, commit, path)

        def ask() -> None:
            answer = self._send("HEAD", target, token, "files", follow=False)
            if answer.headers.get("x-error-code") == Preparing.code:
                return  # another registry, which will serve it to them
            if answer.status >= 400:
                raise faults.of_status(answer.status, answer.headers, where, time.time())

        self.call(ask, where, stop, retry)

    def ask(
        self,
        repo: RepoId,
        call: str,
        kind: type[T],
        stop: threading.Event,
        *,
        form: bytes | None = None,
        token: Token = None,
        retry: Retry | None = None,
    ) -> tuple[T, Answer]:
        """What another call about the repository answers, ``call`` being what follows its id (``/refs``), read as a
        ``kind``, and the answer's head; with ``form`` a POST. Raises as ``snapshot``."""
        target = self._target(f"/api/{repo.kind}/{repo.id}{call}")
        return self._json(target, faults.Where(self.endpoint, repo, "main"), kind, stop, token, retry, form)

    def file_target(self, repo: RepoId, commit: str, path: str) -> Target:
        """Where the upstream has a file."""
        kind = "" if repo.kind == "models" else f"{repo.kind}/"
        return self._target(f"/{kind}{repo.id}/resolve/{commit}/{quote(path)}")

    def open(
        self, target: Target, token: Token, headers: dict[str, str], timeout_s: float = TIMEOUT_S
    ) -> tuple[Response, Target]:
        """A GET whose redirects have been followed, and where they led; close the answer.

        Raises HeliosErrors of the client's for a connection that fails, IntegrityError for a redirect that is refused.
        """
        for _ in range(HOPS + 1):
            sent = {**headers, **self.headers(token if self.origins.trusted(target.origin) else False)}
            response = self.origins.client(target.origin).request("GET", target.path, headers=sent, timeout_s=timeout_s)
            self._heed(response, target, "files")
            if response.status not in REDIRECTS:
                return response, target
            with response:
                response.read(1 << 16)
            target = self.origins.follow(target, response.headers.get("location"))
        raise IntegrityError(f"{target.origin} redirects more than {HOPS} times")

    def part(self, repo: RepoId, commit: str, path: str, start: int, end: int, stop: threading.Event) -> bytes:
        """Bytes ``start`` to ``end`` of a file; nothing is verified. Raises as ``snapshot`` does."""
        where = faults.Where(self.endpoint, repo, commit, path)
        target = self.file_target(repo, commit, path)

        def ask() -> bytes:
            response, _ = self.open(target, None, {"range": f"bytes={start}-{end - 1}"})
            with response:
                if response.status >= 400:
                    raise faults.of_status(response.status, response.headers, where, time.time())
                told = response.headers.get("content-range") or ""
                if response.status != 206 or not told.startswith(f"bytes {start}-{end - 1}/"):
                    raise IntegrityError(f"{self.endpoint} does not give bytes {start} to {end} of {path} when asked")
                return response.read(end - start)

        return self.call(ask, where, stop)

    def call(
        self,
        call: Callable[[], T],
        where: faults.Where,
        stop: threading.Event,
        retry: Retry | None = None,
        bucket: Bucket = "files",
    ) -> T:
        """Make a call until it works or is not worth another try."""
        try:
            return self._call(call, where, stop, retry or Retry(self.stall_s), bucket)
        except RateLimited as error:
            error.quota = self.gate.quota
            raise

    def _heed(self, response: Response, target: Target, bucket: Bucket) -> None:
        """Hold requests back where the upstream says that there was none left but this one. Its 429 the caller sees."""
        if response.status != 429 and self.origins.trusted(target.origin):
            self.gate.heed(response.headers, bucket)

    def _call(
        self, call: Callable[[], T], where: faults.Where, stop: threading.Event, retry: Retry, bucket: Bucket
    ) -> T:
        while True:
            waited = self.gate.left(bucket)
            retry.excuse(waited)
            sleep(waited, stop)
            try:
                return call()
            except Transient as error:
                problem = error
            except (Unavailable, DeadlineExceeded) as error:
                if type(error) not in (Unavailable, DeadlineExceeded) or error.hint is not None:
                    raise
                problem = faults.of_transport(error, where)
            if problem.wait_s is not None:
                self.gate.close_for(problem.wait_s, problem.quota)
            delay = retry.failed(problem)
            log.warning("upstream trouble, trying again", extra={"problem": str(problem), "in_s": round(delay, 2)})
            sleep(delay, stop)

    @property
    def has_token(self) -> bool:
        """Whether the registry has a token of its own."""
        return "authorization" in self.headers(None)

    def headers(self, token: Token) -> dict[str, str]:
        """User agent and, where there is one, the token."""
        if self.offline:
            raise Unavailable(
                f"{self.endpoint} is not asked: the registry is offline",
                hint="Unset registry.offline, and HF_HUB_OFFLINE in the registry's environment.",
            )
        import huggingface_hub.utils

        utils: Any = huggingface_hub.utils  # documented, but not marked as exported
        # The Hub's edge compresses text, and then knows no ranges.
        return {"accept-encoding": "identity", **utils.build_hf_headers(token=token, library_name=AGENT)}

    def _info(
        self,
        repo: RepoId,
        revision: str,
        query: str,
        kind: type[T],
        stop: threading.Event,
        token: Token,
        retry: Retry | None,
    ) -> tuple[T, Answer]:
        target = self._target(f"/api/{repo.kind}/{repo.id}/revision/{quote(revision, safe='')}{query}")
        return self._json(target, faults.Where(self.endpoint, repo, revision), kind, stop, token, retry)

    def _tree(
        self, repo: RepoId, revision: str, stop: threading.Event, token: Token, retry: Retry | None
    ) -> Iterator[RemoteFile]:
        where = faults.Where(self.endpoint, repo, revision)
        target = self._target(f"/api/{repo.kind}/{repo.id}/tree/{quote(revision, safe='')}?recursive=true")
        pages = count = 0
        while True:
            items, answer = self._json(target, where, list[Item], stop, token, retry)
            pages, count = pages + 1, count + len(items)
            if max(pages * 100, count) > MAX_FILES:
                raise IntegrityError(f"{where}: a listing of more than {MAX_FILES} files, or without an end")
            yield from (item.file() for item in items if item.type == "file")
            following = NEXT.search(answer.headers.get("link") or "")
            if following is None:
                return
            target = self.origins.follow(answer.target, following[1])
            if target.origin != answer.target.origin:
                raise IntegrityError(f"{self.endpoint} sends us to {target.origin} for the rest of a listing")

    def _json(
        self,
        target: Target,
        where: faults.Where,
        kind: type[T],
        stop: threading.Event,
        token: Token,
        retry: Retry | None,
        form: bytes | None = None,
    ) -> tuple[T, Answer]:
        def ask() -> tuple[T, Answer]:
            method = "GET" if form is None else "POST"
            answer = self._send(method, target, token, "api", follow=form is None, form=form)
            if answer.status >= 400:
                raise faults.of_status(answer.status, answer.headers, where, time.time())
            return decode(self.endpoint, answer.body, kind), replace(answer, body=b"")

        return self.call(ask, where, stop, retry, "api")

    def _send(
        self, method: str, target: Target, token: Token, bucket: Bucket, *, follow: bool, form: bytes | None = None
    ) -> Answer:
        """One short request; redirects within the upstream are followed, and others too where ``follow`` is set."""
        for _ in range(HOPS + 1):
            sent = self.headers(token if self.origins.trusted(target.origin) else False)
            if form is not None:
                sent["content-type"] = "application/x-www-form-urlencoded"
            with self.origins.client(target.origin).request(
                method, target.path, headers=sent, body=form, timeout_s=TIMEOUT_S
            ) as response:
                self._heed(response, target, bucket)
                body = response.read(MAX_JSON)
            if response.status not in REDIRECTS:
                return Answer(response.status, response.headers, body, target)
            following = self.origins.follow(target, response.headers.get("location"))
            if not follow and following.origin != target.origin:
                return Answer(response.status, response.headers, body, target)
            target = following
        raise IntegrityError(f"{target.origin} redirects more than {HOPS} times")

    def _target(self, path: str) -> Target:
        home = self.origins.home
        return Target(home.origin, home.path.rstrip("/") + path)


def sleep(seconds: float, stop: threading.Event) -> None:
    """Wait; raises Stopped as soon as ``stop`` is set."""
    if stop.wait(seconds) if seconds > 0 else stop.is_set():
        raise Stopped
