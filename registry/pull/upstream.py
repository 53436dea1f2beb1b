"""The upstream Hub, through huggingface_hub: its session, headers, tokens, URLs and errors; retries are ours.

huggingface_hub 0.36 (requests), 1.x (httpx) and 2.x (httpx2) all work. It is imported on first use. Its own downloader
is not used: it can't be cancelled, doesn't check that a resumed range starts where it should, refuses files over 50 GB
over plain HTTP even from a mirror that serves them, and waits out rate limits in every thread for itself.

Everything blocks and is called from worker threads; every wait ends early when the caller's ``stop`` is set.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

from helios.errors import Forbidden, IntegrityError, Unavailable
from helios.names import RepoId
from registry.pull import faults
from registry.pull.listing import RemoteFile, Snapshot, check
from registry.pull.retry import Gate, Retry, Transient, asked_wait
from registry.pull.spool import Appender, Partial

log = logging.getLogger("helios.registry.pull")

TIMEOUT_S: Final = 20.0
"""Longest wait for a connection or for the next bytes of an answer; then the attempt has failed."""
BLOCK: Final = 1 << 20
"""Bytes read and written at a time: what a killed registry loses of each running download, at most."""

XET_ONLY: Final = 50 * 1000**3
"""The Hub's CDN refuses larger files over plain HTTP; mirrors and other registries need not."""
AGENT: Final = "helios"

_TYPES: Final = {"models": "model", "datasets": "dataset"}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)\Z")

T = TypeVar("T")


class Stopped(Unavailable):
    """The caller's ``stop`` was set: another file of the pull failed, or the registry ends."""

    def __init__(self) -> None:
        super().__init__("the pull was stopped", hint="Pull again: what is here already is kept.")


class Upstream:
    """One Hub. Threads may share it; ``stall_s`` is how long failures may go on without progress, in seconds."""

    def __init__(self, endpoint: str, *, stall_s: float) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._stall_s = stall_s
        self._gate = Gate()

    def snapshot(self, repo: RepoId, revision: str, stop: threading.Event) -> Snapshot:
        """What the revision names now and which files it has, checked.

        Raises RepoNotFound, RevisionNotFound, Forbidden, IntegrityError (an answer that makes no sense), Unavailable or
        DeadlineExceeded.
        """
        info = self._call(lambda: self._info(repo, revision), faults.Where(self.endpoint, repo, revision), stop)
        files = [_from_sibling(sibling) for sibling in info.siblings or []]
        if not files or None in files or len(files) >= 1000:
            # Listings in the info may be cut, and some mirrors leave the sizes out: the tree has everything.
            files = list(self._tree(repo, info.sha or revision, stop))
        known = [file for file in files if file is not None]
        check(repo, info.sha, known, revision)
        base = getattr(getattr(info, "card_data", None), "base_model", None)
        bases = [base] if isinstance(base, str) else [b for b in base or [] if isinstance(b, str)]
        lineage = {"upstream": f"{self.endpoint}/{'' if repo.kind == 'models' else 'datasets/'}{repo.id}"}
        if bases:
            lineage["base_model"] = ",".join(bases)
        changed = getattr(info, "last_modified", None)
        seconds = None if changed is None else int(changed.timestamp())
        author = getattr(info, "author", None) or repo.org or repo.name
        return Snapshot(repo, info.sha or "", tuple(known), author, seconds, lineage)

    def download(
        self,
        repo: RepoId,
        commit: str,
        file: RemoteFile,
        partial: Partial,
        advance: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        """Bring the partial file to the file's full size, from where it is.

        ``advance`` hears how many bytes are here; nothing is verified. Raises as ``snapshot`` does, and NoSpace.
        """
        where = faults.Where(self.endpoint, repo, commit, file.path)
        retry = Retry(self._stall_s)
        with partial.append() as out:
            if out.size > file.size:
                out.restart()
            advance(out.size)

            def arrived() -> None:
                if stop.is_set():
                    raise Stopped
                retry.progress()
                advance(out.size)

            while out.size < file.size:
                try:
                    self._call(lambda: self._receive(repo, commit, file, out, arrived), where, stop, retry)
                except (Forbidden, Unavailable) as error:
                    if file.size > XET_ONLY and not isinstance(error, Stopped):
                        error.hint = "The Hub serves files over 50 GB through Xet alone, which is not supported yet."
                    raise

    def part(self, repo: RepoId, commit: str, path: str, start: int, end: int, stop: threading.Event) -> bytes:
        """Bytes ``start`` to ``end`` of a file; nothing is verified. Raises as ``snapshot`` does."""
        return self._call(
            lambda: self._part(repo, commit, path, start, end), faults.Where(self.endpoint, repo, commit, path), stop
        )

    def _part(self, repo: RepoId, commit: str, path: str, start: int, end: int) -> bytes:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        out = bytearray()
        with self._stream(self._file_url(repo, commit, path), headers) as (response, blocks):
            found = _CONTENT_RANGE.match(response.headers.get("content-range") or "")
            if response.status_code != 206 or found is None or int(found[1]) != start:
                raise IntegrityError(f"{self.endpoint} gives no ranges of {path}")
            for block in blocks:
                out += block
                if len(out) > end - start:
                    raise IntegrityError(f"{self.endpoint} sends more of {path} than was asked for")
        if len(out) < end - start:
            raise Transient(f"{path}: the upstream's answer ended after {len(out)} of {end - start} bytes")
        return bytes(out)

    def _receive(self, repo: RepoId, commit: str, file: RemoteFile, out: Appender, arrived: Callable[[], None]) -> None:
        """One request for the bytes still missing; ``arrived`` is called after each block."""
        headers = {"Accept-Encoding": "identity"}  # the Hub's edge compresses text, and then knows no ranges
        if out.size:
            headers["Range"] = f"bytes={out.size}-"
        with self._stream(self._file_url(repo, commit, file.path), headers) as (response, blocks):
            if response.status_code == 416:
                out.restart()
                raise Transient(f"{file.path}: the upstream has no byte {headers['Range'][6:-1]}; starting over")
            if response.status_code == 206:
                found = _CONTENT_RANGE.match(response.headers.get("content-range") or "")
                if found is None or int(found[1]) != out.size or found[2] not in ("*", str(file.size)):
                    out.restart()
                    raise Transient(f"{file.path}: the upstream answered another range than was asked for")
            elif out.size:
                out.restart()  # it ignored the range and sends everything
            for block in blocks:
                if out.size + len(block) > file.size:
                    out.restart()
                    raise Transient(f"{file.path}: the upstream sends more than the {file.size} bytes it lists")
                out.write(block)
                arrived()
        if out.size < file.size:
            raise Transient(f"{file.path}: the upstream's answer ended after {out.size} of {file.size} bytes")

    def _info(self, repo: RepoId, revision: str) -> Any:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, library_name=AGENT)
        try:
            return api.repo_info(
                repo.id, repo_type=_TYPES[repo.kind], revision=revision, files_metadata=True, timeout=TIMEOUT_S
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if faults.is_transport(error):
                raise
            raise IntegrityError(
                f"{self.endpoint} does not answer like a Hub: {error!r}", hint="Check registry.upstream or HF_ENDPOINT."
            ) from error

    def _tree(self, repo: RepoId, revision: str, stop: threading.Event) -> Iterator[RemoteFile]:
        where = faults.Where(self.endpoint, repo, revision)
        url: str | None = f"{self.endpoint}/api/{repo.kind}/{repo.id}/tree/{quote(revision, safe='')}?recursive=true"
        while url is not None:
            page = url
            items, url = self._call(lambda: self._page(page), where, stop)  # noqa: B023 called at once
            for item in items:
                if item.get("type") == "file":
                    yield _from_tree(item)

    def _page(self, url: str) -> tuple[list[dict[str, Any]], str | None]:
        utils = _hub_utils()
        response = utils.get_session().get(url, headers=_headers(utils), timeout=TIMEOUT_S)
        utils.hf_raise_for_status(response)
        following = response.links.get("next", {}).get("url")
        if following is not None and urlsplit(following)[:2] != urlsplit(self.endpoint)[:2]:
            raise IntegrityError(f"{self.endpoint} sends us to {following} for the rest of a listing")
        items = response.json()
        if not isinstance(items, list):
            raise IntegrityError(f"{self.endpoint} does not answer like a Hub: a listing is no list")
        return items, following

    def _file_url(self, repo: RepoId, commit: str, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(repo.id, path, repo_type=_TYPES[repo.kind], revision=commit, endpoint=self.endpoint)

    @contextmanager
    def _stream(self, url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
        """An answer and its body in blocks; redirects are followed and take no token to another origin."""
        utils = _hub_utils()
        session = utils.get_session()
        sent = {**_headers(utils), **headers}
        if callable(getattr(session, "stream", None)):  # httpx; in requests it is a flag
            opened = session.stream("GET", url, headers=sent, timeout=TIMEOUT_S, follow_redirects=True)
        else:
            opened = session.get(url, headers=sent, timeout=TIMEOUT_S, stream=True)
        with opened as response:
            if response.status_code != 416:
                utils.hf_raise_for_status(response)
            blocks = response.iter_bytes if hasattr(response, "iter_bytes") else response.iter_content
            yield response, blocks(BLOCK)

    def _call(self, call: Callable[[], T], where: faults.Where, stop: threading.Event, retry: Retry | None = None) -> T:
        """Make a call until it works or is not worth another try."""
        retry = retry or Retry(self._stall_s)
        while True:
            waited = self._gate.left()
            _sleep(waited, stop)
            retry.excuse(waited)
            try:
                return call()
            except Transient as error:
                problem = error
            except Exception as error:
                problem = faults.transient(error, where, lambda headers: asked_wait(headers, time.time()))
            delay = retry.failed(problem)
            if problem.wait_s is not None:
                self._gate.close_for(delay)
            log.warning("upstream trouble, trying again", extra={"problem": str(problem), "in_s": round(delay, 2)})
            _sleep(delay, stop)


def _sleep(seconds: float, stop: threading.Event) -> None:
    if stop.wait(seconds) if seconds > 0 else stop.is_set():
        raise Stopped


def _hub_utils() -> Any:
    """huggingface_hub's own session, headers and error mapping, which it documents but doesn't mark as exported."""
    import huggingface_hub.utils

    return huggingface_hub.utils


def _headers(utils: Any) -> dict[str, str]:
    """User agent and, where the user has one, the token."""
    headers: dict[str, str] = utils.build_hf_headers(library_name=AGENT)
    return headers


def _from_sibling(sibling: Any) -> RemoteFile | None:
    """A file of the info's list; None when it lacks its size or id."""
    size, oid, lfs = sibling.size, sibling.blob_id, sibling.lfs
    if size is None or oid is None:
        return None
    return RemoteFile(sibling.rfilename, size, oid, None if lfs is None else lfs.sha256)


def _from_tree(item: dict[str, Any]) -> RemoteFile:
    lfs = item.get("lfs")
    try:
        return RemoteFile(item["path"], int(item["size"]), item["oid"], None if lfs is None else lfs["oid"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the upstream's listing has a malformed entry: {item!r}"[:300]) from error
