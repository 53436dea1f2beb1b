"""The API keys that workers want (vLLM's ``--api-key``): the one way for all that asks a worker anything.

A key is in a file: the worker's own (``key_file``, in the configuration or in the file of workers), else
``router.worker_key_file``. Files are looked at now and then, and read again when they have changed. A key is sent to
its worker alone and never logged. Who registers a worker can't name a file: it would be sent to where he likes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from helios.config import RouterSettings
from helios.errors import UsageError
from helios.tokens import read_token
from helios.watched import WatchedFile
from router.relay.headers import Headers
from router.worker import Worker

log = logging.getLogger("helios.router")

CREDENTIALS: Final = (b"authorization", b"x-api-key")
"""Headers with which clients and workers' askers show who they are."""
AGAIN_S: Final = 2.0
"""A file that could not be read is tried again after so many seconds."""
MOST: Final = 4096
"""Files that are remembered."""


class WorkerKeys:
    """The keys of one process's workers. ``clock`` gives seconds."""

    def __init__(self, file: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """``file``: with the key of workers that have none of their own; empty: those have no key."""
        self._file, self._clock = file, clock
        self._files: dict[str, WatchedFile[bytes]] = {}
        self._failed: dict[str, float] = {}
        """Files that can't be read, and when they were tried."""

    def of(self, worker: Worker) -> bytes | None:
        """The key of this moment; None: the worker has none; empty: it has one, which can't be read."""
        file = worker.key_file or self._file
        if not file:
            return None
        found = self._files.get(file) or self._open(file)
        return b"" if found is None else found.get()

    def headers(self, worker: Worker) -> dict[str, str]:
        """What a question of our own to the worker needs."""
        key = self.of(worker)
        return {"authorization": f"Bearer {key.decode()}"} if key else {}

    def in_place(self, headers: Headers, worker: Worker, *, ours: bool) -> Headers:
        """The headers of a client's request as the worker gets them: its own key in place of what was sent.

        ``ours``: the credentials were for this router, so they end here in any case."""
        key = self.of(worker)
        if key is None and not ours:
            return headers
        rest = [pair for pair in headers if pair[0] not in CREDENTIALS]
        if key:
            rest.append((b"authorization", b"Bearer " + key))
        return rest

    def _open(self, file: str) -> WatchedFile[bytes] | None:
        now = self._clock()
        failed = self._failed.get(file)
        if failed is not None and now - failed < AGAIN_S:
            return None
        if len(self._files) + len(self._failed) >= MOST:
            self._files.clear()
            self._failed.clear()
        try:
            found = self._files[file] = _watched(file, self._clock)
        except UsageError as error:
            if failed is None:
                log.warning("the key of workers can't be read", extra={"reason": error.message})
            self._failed[file] = now
            return None
        self._failed.pop(file, None)
        return found


def check(settings: RouterSettings) -> None:
    """Raises UsageError where a file that the configuration names holds no key."""
    for file in {settings.worker_key_file, *(worker.key_file for worker in settings.workers)} - {""}:
        _watched(file, time.monotonic)


def _watched(file: str, clock: Callable[[], float]) -> WatchedFile[bytes]:
    return WatchedFile(Path(file), lambda path: read_token(path).encode(), "key file of workers", clock=clock)
