"""Files that clients take over Xet alone, while they can't be served so yet.

huggingface_hub refuses a large file when the answer to its HEAD names no Xet hash, says to install what is installed,
and never comes for the bytes. So such a HEAD is answered 503: releases from 1.x on wait as long as ``Retry-After`` says
and ask again, five times; 0.x raises what ``X-Error-Message`` says. Whatever is missing is begun by the question.

How long a layout takes nobody can say for certain: other files may be before it, and the machine may have more urgent
work. So a client that asks again waits at least as long as has been waited for that layout by then, and the six
questions reach from 64 s to ten minutes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from helios.errors import HeliosError, Preparing
from heliosfs.store.manifest import FileEntry
from registry.hub.lookup import Found
from registry.mirror.brief import Brief
from registry.mirror.mirror import Mirror
from registry.pull.faults import again
from registry.pull.flight import Flight
from registry.xet.layouts import GB, Layouts

LAYOUT_START_S: Final = 4.0
"""Until the queue is looked at (``registry.xet.maker.POLL_S``) and hf-xet has been imported, in seconds."""
LAYOUT_BYTES_S: Final = 350_000_000
"""How fast a layout is made, for a guess when it will be there: 51.5 GB took 144 s."""
FETCH_BYTES_S: Final = 100_000_000
"""The same for a download of which nothing has come yet."""
LONGEST_S: Final = 120.0
"""Longest time until a client is to ask again, in seconds: it asks six times in all."""
REMEMBERED: Final = 256
REMEMBERED_S: Final = 600.0
"""Downloads and layouts of which it is remembered for how long, in seconds, that somebody asked for them."""


class Waits:
    """How long clients are told to wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` in seconds."""
        self._clock = clock
        self._since: Brief[tuple[str, str], float] = Brief(REMEMBERED, clock)

    def wait_s(self, file: tuple[str, str], size: int, left_s: float | None) -> float:
        """Seconds until a file of ``size`` bytes is worth asking for again; ``left_s``: until its bytes are here, None
        when they are."""
        layout_s = LAYOUT_START_S + size / LAYOUT_BYTES_S
        if left_s is not None:
            return min(left_s + layout_s, LONGEST_S)
        now = self._clock()
        waited_s = now - self._since.load(file, lambda: now, REMEMBERED_S)
        return min(max(layout_s, waited_s), LONGEST_S)


class Preparations:
    """Says what is still to be done for such a file, and begins it."""

    def __init__(self, mirror: Mirror, layouts: Layouts) -> None:
        self._mirror, self._layouts, self._waits = mirror, layouts, Waits()
        self._asked: Brief[tuple[str, str, str], Flight] = Brief(REMEMBERED)

    async def wait_for(self, found: Found, path: str, entry: FileEntry, authorization: str | None) -> None:
        """Raise Preparing for a file, not announced over Xet, that clients would refuse over plain HTTP.

        Raises also what its download failed with, once, and what hinders another one.
        """
        if self._layouts.needed(entry):
            raise await asyncio.to_thread(self._begin, found, path, entry, authorization)

    async def warning(self, found: Found, path: str, authorization: str | None) -> str | None:
        """The same words for somebody who asks about this one path and gets an answer; None for any other file."""
        entry = found.manifest.files.get(path)
        if entry is None or not self._layouts.needed(entry):
            return None
        try:
            return (await asyncio.to_thread(self._begin, found, path, entry, authorization)).message
        except HeliosError as error:
            return error.message

    def _begin(self, found: Found, path: str, entry: FileEntry, authorization: str | None) -> Preparing:
        """What to tell the client."""
        here, left_s = entry.size, 0.0
        if found.mirrored is not None:
            flight = self._download(found, path, authorization)
            if flight is not None:
                here, left_s = flight.outlook()
                left_s = min(left_s, entry.size / FETCH_BYTES_S) if not here else left_s
        if here < entry.size:
            doing = f"it is on its way from the upstream: {here / GB:.2f} of {entry.size / GB:.2f} GB are here"
        elif failures := self._layouts.failures(found.repo, entry.sha256):
            doing = f"laying it out failed, {failures} times so far, and is tried again: the registry's log says why"
        else:
            doing = "it is here, and being laid out"
        error = Preparing(f"{path} of {found.repo.id} is too large for plain HTTP. It is served over Xet soon: {doing}")
        asked = str(found.repo), entry.sha256
        error.retry_after_s = self._waits.wait_s(asked, entry.size, left_s if here < entry.size else None)
        return error

    def _download(self, found: Found, path: str, authorization: str | None) -> Flight | None:
        """The download of a mirrored file; None: it is here."""
        assert found.mirrored is not None
        key = str(found.repo), found.commit, path
        last = self._asked.get(key)
        if last is not None and last.error is not None:
            self._asked.drop(key)
            raise again(last.error)
        flight = self._mirror.bring(found.mirrored, path, authorization)
        if flight is not None:
            self._asked.put(key, flight, REMEMBERED_S)
            flight.expect(LONGEST_S)
        return flight
