"""Tokens that a daemon accepts: the sha256 of each in a file, which may change while the daemon runs.

The registry has such files for tenants, administrators and nodes, the router for administrators and registrars.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from helios.errors import UsageError

log = logging.getLogger("helios.tokens")

LOOK_AGAIN_S: Final = 2.0
"""How often a file of tokens is looked at for changes, in seconds: a revoked token works no longer than that."""
MAX_TOKENS: Final = 10_000

_LINE = re.compile(r"([0-9a-f]{64})(?:\s+(\S.*))?\Z")


class Tokens:
    """The sha256 digests of accepted tokens, from a file that may change meanwhile. Threads may share it.

    A line is 64 hexadecimal digits and, if one likes, a label; empty lines and ``#`` are skipped. Tokens are random and
    long, so a plain digest can't be reversed; neither they nor the header they come in are ever logged.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UsageError for a file that can't be read or holds anything else."""
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._labels = _read(path)
        self._looked = clock()

    def label(self, token: str) -> str | None:
        """The label of a token that is in the file ("" for one without); None for any other."""
        self._look_again()
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for known, label in self._labels.items():
            # Every line is compared, each in constant time: how long it takes says nothing about what matched.
            if hmac.compare_digest(known, digest):
                found = label
        return found

    def _look_again(self) -> None:
        with self._lock:
            if self._clock() - self._looked < LOOK_AGAIN_S:
                return
            self._looked = self._clock()
            try:
                stamp = _stamp(self._path)
                if stamp != self._stamp:
                    self._labels, self._stamp = _read(self._path), stamp
            except UsageError as error:
                log.warning(
                    "a file of tokens can't be read; the tokens known so far count", extra={"error": str(error)}
                )


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UsageError(f"the file of tokens {path} can't be read: {error.strerror}") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file of tokens {path} can't be read: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise UsageError(
                f"{path}, line {number}: not the sha256 of a token",
                hint='Write what `printf %s "$TOKEN" | sha256sum` prints, 64 hexadecimal digits, then a label.',
            )
        found[match[1]] = match[2] or ""
    if len(found) > MAX_TOKENS:
        raise UsageError(f"{path} holds {len(found)} tokens; at most {MAX_TOKENS} are possible")
    return found
