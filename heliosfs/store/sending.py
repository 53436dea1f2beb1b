"""Files of a push to a registry far away: only the chunks that it lacks travel.

A file is read once to know its recipe, which is offered; the registry names the chunks that it lacks, those are sent,
and the file is offered again until it is stored. So whatever has arrived is not sent again, after a broken connection
or in another push, and a chunk that has gone meanwhile is simply named once more. A file of which hardly anything is
there goes as a whole, which the registry stores in one piece; if that breaks, the rest goes by chunks. Of a large file
a few chunks are asked about first: one of which they are all unknown is new, and is sent without reading it twice.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Final

from helios.errors import HeliosError, InvalidInput, Unavailable
from helios.publish import LocalFile, OpenPush, Share, send_whole
from helios.registry_answers import Offered
from heliosfs.store.batch import MAX_RECIPE, batches, encode_head
from heliosfs.store.cutting import recipe_of, sample_of
from heliosfs.store.recipe import Recipe

SMALL: Final = 64 << 10
"""Files of fewer bytes are sent as they are: asking first would take longer."""
SAMPLE: Final = 16
"""Chunks of a file that are asked about before it is read: if all of them are new, so is nearly everything..."""
MANY: Final = 8 * SAMPLE
"""...of a file of at least so many: a smaller one is read as soon."""
TRIES: Final = 4
"""Tries of a request that breaks off, if nothing arrives meanwhile."""
PAUSE_S: Final = 0.5
"""Pause before the second try, in seconds; each further one is twice as long."""
ROUNDS: Final = 8
"""How often one file's missing chunks are sent before its push is given up: once, unless they go again."""


class ByChunks:
    """A ``Sender`` for one push. Chunks that another file of it is just sending are waited for, not sent twice."""

    def __init__(self) -> None:
        self._flying = _Flying()

    def __call__(self, push: OpenPush, file: LocalFile) -> None:
        if file.size < SMALL:
            send_whole(push, file)
            return
        before = _stamp(file)
        share = Share(push.tally, file.size)
        try:
            if not self._sent_as_new(push, file, share):
                recipe = recipe_of(file.local, file.path, file.size, share.read)
                _Sending(push, file, share, recipe, self._flying).run()
        except HeliosError:
            _check_unchanged(file, before)  # that explains every refusal better
            raise
        _check_unchanged(file, before)
        share.finish()

    def _sent_as_new(self, push: OpenPush, file: LocalFile, share: Share) -> bool:
        """Send a file of which nothing seems to be there as a whole; returns whether it is stored."""
        sample = sample_of(file.local, file.path, file.size, SAMPLE, MANY)
        while sample and not push.stopped.is_set():
            with self._flying.turn({id_ for id_, _ in sample}, push.stopped) as ours:
                if not ours:  # another file has brought some of them
                    continue
                share.sent_besides(len(encode_head(sample)))
                try:
                    if push.client.known_chunks(push.id, file.path, encode_head(sample)):
                        return False
                    push.client.put_file(push.id, file.path, file.local, file.size, share.sent)
                except Unavailable:
                    return False  # what has arrived is found by its recipe
                return True
        return False


class _Sending:
    """One file on its way."""

    def __init__(self, push: OpenPush, file: LocalFile, share: Share, recipe: Recipe, flying: _Flying) -> None:
        self._push, self._file, self._share, self._recipe, self._flying = push, file, share, recipe, flying
        self._failed = self._rounds = 0
        self._whole = True

    def run(self) -> None:
        record = self._recipe.encode()
        if len(record) > MAX_RECIPE:
            self._send_whole()
            return
        while True:
            try:
                self._share.sent_besides(len(record))
                offered = self._push.client.offer(self._push.id, self._file.path, record, self._file.size)
                if offered.missing is None or self._send(offered):
                    return
            except Unavailable:
                self._failed += 1
                if self._failed == TRIES or self._push.stopped.wait(PAUSE_S * 2 ** (self._failed - 1)):
                    raise

    def _send(self, offered: Offered) -> bool:
        """Send what is missing; returns whether the file is stored then."""
        missing = [number for first, count in offered.missing or () for number in range(first, first + count)]
        if not missing or missing[-1] >= len(self._recipe):
            raise Unavailable(f"{self._file.path}: the registry asks for chunks that the file does not have")
        whole = offered.whole and self._whole
        wanted = range(len(self._recipe)) if whole else missing
        with self._flying.turn({self._recipe.id(number) for number in wanted}, self._push.stopped) as ours:
            if not ours:  # other files brought some of them meanwhile
                return False
            if whole:
                self._whole = False
                self._send_whole()
                return True
            self._rounds += 1
            if self._rounds > ROUNDS:
                raise Unavailable(
                    f"{self._file.path}: the registry loses chunks as fast as they come", hint="Look at its log."
                )
            lengths = [end - start for start, end in map(self._recipe.span, missing)]
            for batch in batches(missing, lengths):
                with _ChunkBody(self._file, self._recipe, batch, self._share) as body:
                    self._push.client.put_chunks(self._push.id, self._file.path, body, body.length)
                self._failed = 0
        return False

    def _send_whole(self) -> None:
        file = self._file
        stored = self._push.client.put_file(self._push.id, file.path, file.local, file.size, self._share.sent)
        if stored.sha256 != self._recipe.blob:
            raise _changed(file)


class _Flying:
    """Chunks that files of one push are sending right now, by their ids."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ids: set[bytes] = set()

    @contextlib.contextmanager
    def turn(self, ids: set[bytes], stopped: threading.Event) -> Iterator[bool]:
        """Yields whether they are all ours to send now; if not, those that were on their way have ended."""
        with self._changed:
            ours = not self._ids & ids
            while not ours and self._ids & ids and not stopped.is_set():
                self._changed.wait(0.5)
            if ours:
                self._ids |= ids
        try:
            yield ours
        finally:
            if ours:
                with self._changed:
                    self._ids -= ids
                    self._changed.notify_all()


class _ChunkBody:
    """A batch of a file's chunks as a request's body."""

    def __init__(self, file: LocalFile, recipe: Recipe, numbers: list[int], share: Share) -> None:
        self._file, self._share = file, share
        self._spans = [recipe.span(number) for number in numbers]
        lengths = [end - start for start, end in self._spans]
        self._head = encode_head([(recipe.id(n), length) for n, length in zip(numbers, lengths, strict=True)])
        self.length = len(self._head) + sum(lengths)
        self._spans.reverse()

    def __enter__(self) -> _ChunkBody:
        try:
            self._fd = os.open(self._file.local, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidInput(f"{self._file.path}: can't be read: {error.strerror}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def read(self, count: int = -1) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            self._share.sent_besides(len(head))
            return head
        if not self._spans:
            return b""
        start, end = self._spans[-1]
        data = os.pread(self._fd, min(count, end - start) if count >= 0 else end - start, start)
        if not data:
            raise _changed(self._file)
        self._spans[-1] = (start + len(data), end)
        if start + len(data) == end:
            self._spans.pop()
        self._share.sent(len(data))
        return data


def _stamp(file: LocalFile) -> tuple[int, int, int]:
    """What differs after a file was written or replaced."""
    try:
        status = file.local.stat()
    except OSError as error:
        raise InvalidInput(f"{file.path}: can't be read: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_unchanged(file: LocalFile, before: tuple[int, int, int]) -> None:
    if _stamp(file) != before:
        raise _changed(file)


def _changed(file: LocalFile) -> InvalidInput:
    return InvalidInput(f"{file.path}: changed while it was published; publish again when nobody writes it")
