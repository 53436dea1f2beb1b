"""One file at the upstream: where its bytes are, with which token, and one range of it.

The place that the upstream redirects to is used for all ranges until it refuses: the upstream itself is asked once, not
once a range. Of several callers' tokens one may be refused where another is not.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Final

from helios.errors import Forbidden, HeliosError, NotFound
from helios.http.response import Response
from helios.names import RepoId
from registry.pull import faults, upstream
from registry.pull.blocks import Span
from registry.pull.listing import RemoteFile
from registry.pull.origins import Target
from registry.pull.retry import Transient
from registry.pull.upstream import Token, Upstream

FLUSH_S: Final = 0.05
"""What has come is written after so many seconds, full buffer or not."""
TOKENS: Final = 8
"""Callers' tokens that are remembered."""
XET_ONLY: Final = 50 * 1000**3
"""The Hub's CDN refuses larger files over plain HTTP; mirrors and other registries need not."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)\Z")

Write = Callable[[Span, memoryview, float], None]


class Relocated(Exception):
    """Ask once more, now: the place does not serve the file any more, or another token may do."""


class Remote:
    """Fetches ranges of one file. Threads may share it."""

    def __init__(self, client: Upstream, repo: RepoId, commit: str, file: RemoteFile) -> None:
        self.where = faults.Where(client.endpoint, repo, commit, file.path)
        self._client, self._file = client, file
        self._home = client.file_target(repo, commit, file.path)
        self._lock = threading.Lock()
        self._tokens: list[Token] = []
        self._location: Target | None = None

    def add_token(self, token: Token) -> None:
        """The bytes may be fetched with this token; the last one is used first."""
        with self._lock:
            if token not in self._tokens:
                self._tokens = [token, *self._tokens][:TOKENS]

    def move(self) -> None:
        """Forget where the upstream redirected to."""
        with self._lock:
            self._location = None

    @property
    def limited_s(self) -> float:
        """Seconds until a range may be asked for: where the upstream has sent us elsewhere its limits don't count."""
        with self._lock:
            return 0.0 if self._location is not None else self._client.gate.left()

    def fetch(self, span: Span, buffer: memoryview, write: Write, stop: threading.Event) -> None:
        """Bring a span's bytes through ``buffer`` to ``write``, until it is complete or ``stop`` is set.

        Raises Transient, Relocated, or what the upstream's refusal means; what was written until then counts.
        """
        with self._lock:
            known, token = self._location, self._tokens[0] if self._tokens else None
        partly = span.start > 0 or span.stop < self._file.size
        headers = {"range": f"bytes={span.start}-{span.stop - 1}"} if partly else {}
        target = known or self._home
        response, at = self._client.open(target, token, headers, upstream.TIMEOUT_S)
        with response:
            if response.status >= 400:
                self._refused(response, known, token)
            self._check_head(response, span, partly)
            with self._lock:
                self._location = None if self._client.origins.trusted(at.origin) else at
            receive(response, span, buffer, write, stop)
        if span.at < span.stop and not stop.is_set():
            raise Transient(
                f"{self.where}: the answer ended after {span.at - span.start} of {span.stop - span.start} bytes"
            )

    def _refused(self, response: Response, known: Target | None, token: Token) -> None:
        """Raises what an error status means."""
        status = response.status
        if known is not None and status not in faults.PASSING:
            with self._lock:
                if self._location == known:
                    self._location = None
            raise Relocated  # a signed URL ends after a while
        if status == 416:
            raise Transient(
                f"{self.where}: the upstream says that it has fewer bytes than the {self._file.size} it lists"
            )
        found = faults.of_status(status, response.headers, self.where, time.time())
        if isinstance(found, Forbidden | NotFound):
            with self._lock:
                if token in self._tokens and len(self._tokens) > 1:
                    self._tokens.remove(token)
                    raise Relocated  # another caller's token may do
        if self._file.size > XET_ONLY and isinstance(found, HeliosError):
            found.hint = "The Hub serves files over 50 GB through Xet alone, which is not supported yet."
        raise found

    def _check_head(self, response: Response, span: Span, partly: bool) -> None:
        """Raise Transient unless the body is what was asked for."""
        length = response.headers.get("content-length")
        wanted = str(span.stop - span.start)
        if length not in (None, wanted) and (response.status == 206 or not partly):
            raise Transient(f"{self.where}: the upstream sends {length} bytes, {wanted} were expected")
        if not partly:
            return
        if response.status != 206:
            raise Transient(f"{self.where}: the upstream ignores ranges (status {response.status})")
        found = _CONTENT_RANGE.match(response.headers.get("content-range") or "")
        if found is None or int(found[1]) != span.start or found[2] not in ("*", str(self._file.size)):
            raise Transient(f"{self.where}: the upstream answered another range than was asked for")


def receive(response: Response, span: Span, buffer: memoryview, write: Write, stop: threading.Event) -> None:
    """Bring what an answer has of a span through ``buffer`` to ``write``, until it ends or ``stop`` is set."""
    filled, since = 0, time.monotonic()
    try:
        while (room := min(len(buffer), span.stop - span.at)) and not stop.is_set():
            count = response.read_ready(buffer[filled:room])
            if not count:
                return
            filled += count
            now = time.monotonic()
            if filled == room or now - since > FLUSH_S:
                write(span, buffer[:filled], now)
                filled, since = 0, now
                response.extend(upstream.TIMEOUT_S)
    finally:
        if filled and not stop.is_set():
            write(span, buffer[:filled], time.monotonic())
