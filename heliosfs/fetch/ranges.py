"""Reading ranges of objects: one request, or several side by side; each chunk is taken as soon as it is here."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

from helios.errors import HeliosError, IntegrityError, NotFound, Unavailable
from helios.http.client import HttpClient, error_of
from helios.http.response import Response, Watch, read_together
from heliosfs.fetch.hosts import PIECE, Hosts
from heliosfs.fetch.source import Deliver
from heliosfs.store.placement import PlacedBlob, Segment

PASSING: Final = frozenset({408, 425, 429})
"""Answers below 500 that the same request may get over. A new placement may cure the others: deleted, moved, a
signature that expired, an address that never was one."""

MAX_ERROR: Final = 1 << 20
"""Longest error answer of an object store that is read, in bytes."""


class Ranges:
    """Of the objects of the source ``name``. Threads share it."""

    def __init__(self, name: str, hosts: Hosts) -> None:
        self._name, self._hosts = name, hosts

    def fetch(
        self,
        client: HttpClient,
        path: str,
        placed: PlacedBlob,
        segment: Segment,
        buffer: memoryview,
        take: Deliver,
        timeout_s: float,
        watch: Watch,
    ) -> None:
        """A segment's chunks, one after the other, each through the buffer. Raises HeliosError, what ``take`` does."""
        span = range(segment.offset, segment.offset + segment.length)
        headers = {"range": f"bytes={span.start}-{span.stop - 1}"}
        with self._hosts.send(client, path, timeout_s, headers=headers, watch=watch) as response:
            self._check(response, segment, span)
            for index in range(segment.first, segment.first + segment.count):
                view = buffer[: placed.locate(index).encoded_length]
                response.extend(timeout_s)
                _read(response, view)
                take(index, view)

    def fetch_pieces(
        self,
        client: HttpClient,
        path: str,
        placed: PlacedBlob,
        segment: Segment,
        pieces: int,
        buffer: memoryview,
        take: Deliver,
        timeout_s: float,
        watch: Watch,
    ) -> None:
        """What the buffer takes at a time, over several connections at once; each chunk as soon as it is here."""
        # No window takes more in the object than in the blob, where it fits.
        for window in placed.recipe.windows(range(segment.first, segment.first + segment.count)):
            [within] = placed.segments(window)
            at, size, index = within.offset, within.length, window.start
            step = max(PIECE, -(-size // pieces))
            spans = [range(at + low, at + min(low + step, size)) for low in range(0, size, step)]
            with ExitStack() as stack:
                answers = client.ranges(path, spans, timeout_s=timeout_s, watch=watch)
                for answer in answers:
                    stack.enter_context(answer)
                for answer, span in zip(answers, spans, strict=True):
                    self._check(answer, segment, span)
                views = [buffer[span.start - at : span.stop - at] for span in spans]
                for here in read_together(list(zip(answers, views, strict=True)), timeout_s):
                    while index < window.stop:
                        where = placed.locate(index)
                        low, high = where.offset - at, where.offset - at + where.encoded_length
                        if high > here:
                            break
                        take(index, buffer[low:high])
                        index += 1

    def _check(self, response: Response, segment: Segment, span: range) -> None:
        where = f"{self._name}: object {segment.object.key}"
        if 400 <= response.status < 500 and response.status not in PASSING:
            raise NotFound(f"{where}: status {response.status}")
        if response.status >= 400:
            raise not_final(error_of(response.status, response.read(MAX_ERROR), where))
        if response.status != 206 or response.headers.get("content-length") != str(len(span)):
            raise Unavailable(
                f"{where}: asked for {len(span)} bytes, it answers {response.status} with "
                f"{response.headers.get('content-length')}",
                hint="Whatever stands between must pass Range requests through.",
            )
        said, asked = response.headers.get("content-range"), f"bytes {span.start}-{span.stop - 1}"
        if said is not None and not said.startswith(f"{asked}/"):
            raise Unavailable(f"{where}: asked for {asked}, it answers with {said[:80]!r}")


def _read(response: Response, view: memoryview) -> None:
    """Fill the view; an answer that ends early is a broken connection, not a wrong byte."""
    try:
        response.read_into(view)
    except IntegrityError as error:
        raise Unavailable(str(error)) from None


def not_final(error: HeliosError) -> HeliosError:
    """A server that answers 5xx, or 429, may do better later, whatever it calls its trouble."""
    return error if isinstance(error, Unavailable) else Unavailable(error.message, hint=error.hint)
