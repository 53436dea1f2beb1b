"""A flight whose file another process of the registry brings: its readers get the bytes from there.

Only what readers want is fetched, in the ranges that they need, into the flight's own partial file, as if it came from
the upstream: one copy of it travels between two processes, however many clients wait. Whoever only waits for the file
to be stored hears how far it is. When it is stored, the rest of what readers want is read from the store. When the
other process is dead, or gives up, the flight goes on by itself with what is here.

Bytes of one attempt of one process belong together. Where either changes, everything that is here is thrown away: only
who has all of an attempt's bytes finds out that they are wrong. A process that can't be reached is waited for.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Final, Protocol

from helios.errors import HeliosError, NoSpace
from helios.http.response import Watch
from heliosfs.store.manifest import FileEntry
from registry.blobs import BlobReader
from registry.metadata.sharing import Owner
from registry.processes import TIMEOUT_S
from registry.pull.blocks import Span
from registry.pull.remote import Relocated, Write, receive
from registry.pull.sharing import Lead, unreachable

log = logging.getLogger("helios.registry.pull")

PATH: Final = "/api/v1/flights"
LOOK_S: Final = 0.5
"""How often it is looked how far the other process is, in seconds."""
ASK_S: Final = 3.0
"""Longest wait for an answer to that, in seconds."""
AGAIN_S: Final = 0.1
"""When bytes that did not come are asked for again, in seconds."""


class Ranges(Protocol):
    """Where a flight's workers get ranges from."""

    def fetch(self, span: Span, buffer: memoryview, write: Write, stop: threading.Event) -> None: ...


class Follower(Protocol):
    """What is needed of a flight."""

    def follow(self, source: Ranges | None) -> None:
        """Fetch from there what readers want; None: no more, and whoever fetches has ended."""

    def begin_again(self) -> None:
        """Throw away what is here."""

    def pause(self, seconds: float, here: int) -> None:
        """Wait; raises what ends the flight. ``here``: bytes that are there already."""


class Elsewhere:
    """What another process has of a file, and later the store. Workers fetch, the flight's thread sets where from."""

    def __init__(self, lead: Lead) -> None:
        self._lead = lead
        self._owner: Owner | None = None
        self._attempt = 0
        self._stored: FileEntry | None = None
        self._watch = Watch()

    def ask(self, owner: Owner) -> tuple[int, int] | None:
        """How many bytes a process has and at which attempt; None where it can't be reached.

        Raises HeliosError with a status below 500 where it does not bring the file.
        """
        if not owner.url:
            return None
        params = {"content": self._lead.content}
        headers = {"authorization": self._lead.authorization()}
        try:
            client = self._lead.processes.client(owner.url)
            with client.request("GET", PATH, params=params, headers=headers, timeout_s=ASK_S) as response:
                body = response.read(1 << 16)
        except HeliosError:
            return None
        if response.status >= 400:
            error = HeliosError(f"{owner.url} answers {response.status}")
            error.status = response.status
            if unreachable(error):
                return None
            raise error
        found = json.loads(body)
        return int(found["here"]), int(found["attempt"])

    @property
    def begun(self) -> bool:
        """Whether anything could be fetched yet."""
        return self._owner is not None

    def is_at(self, owner: Owner, attempt: int) -> bool:
        """Whether it is fetched from there, and this attempt."""
        return (self._owner, self._attempt) == (owner, attempt)

    def go_to(self, owner: Owner, attempt: int) -> None:
        """Fetch from there from here on."""
        self._owner, self._attempt, self._watch = owner, attempt, Watch()

    def cut(self) -> None:
        """End what is being fetched from another process: nothing more of it is wanted."""
        self._watch.cut()

    def landed(self, entry: FileEntry) -> None:
        """Read from the store from here on."""
        self._stored = entry

    def fetch(self, span: Span, buffer: memoryview, write: Write, stop: threading.Event) -> None:
        """See ``Remote.fetch``; whatever can't be had now is asked for again by ``Relocated``."""
        stored, owner, attempt, watch = self._stored, self._owner, self._attempt, self._watch
        try:
            if stored is not None:
                contents = self._lead.catalog.contents
                reader: BlobReader = contents.stored_blob(self._lead.domain, stored.sha256)
                for data in reader.iterate(span.start, span.stop - span.start):
                    write(span, data, time.monotonic())
                return
            if owner is not None and owner.url:
                self._fetch(owner, attempt, watch, span, buffer, write, stop)
        except NoSpace:
            raise
        except HeliosError as error:  # the other one is gone, or the file has landed: the flight's thread finds out
            log.debug("bytes did not come from another process", extra={"error": error.message})
        if span.at < span.stop:
            stop.wait(AGAIN_S)
            raise Relocated

    def _fetch(
        self,
        owner: Owner,
        attempt: int,
        watch: Watch,
        span: Span,
        buffer: memoryview,
        write: Write,
        stop: threading.Event,
    ) -> None:
        headers = {
            "authorization": self._lead.authorization(),
            "range": f"bytes={span.start}-{span.stop - 1}",
        }
        params = {"content": self._lead.content, "attempt": str(attempt)}
        client = self._lead.processes.client(owner.url)
        with client.request("GET", PATH, params=params, headers=headers, timeout_s=TIMEOUT_S, watch=watch) as response:
            if response.status == 206:
                receive(response, span, buffer, write, stop)


def follow(flight: Follower, lead: Lead) -> FileEntry | None:
    """Let another process bring the file, as long as one does; returns its entry, None when it is ours to bring.

    Raises what ends the flight. When an entry is returned, workers go on to fetch what readers want.
    """
    source = Elsewhere(lead)
    standing = lead.look()
    if standing.owner is not None:
        flight.follow(source)
    while (owner := standing.owner) is not None:
        gone, here = None, 0
        try:
            state = source.ask(owner)
        except HeliosError:
            gone = owner.process
        else:
            if state is not None:
                here, attempt = state
                if not source.is_at(owner, attempt):
                    source.cut()
                    flight.begin_again()  # also without what an earlier life has left, which nobody has verified
                    source.go_to(owner, attempt)
        if gone is None:
            flight.pause(LOOK_S, here)
        standing = lead.look(gone)
    source.cut()
    if standing.entry is None:
        flight.follow(None)
        return None
    if not source.begun:
        flight.begin_again()
    source.landed(standing.entry)
    flight.follow(source)
    return standing.entry
