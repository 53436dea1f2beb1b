"""The native mode: a keeper holds the mount; this process serves it through the channel and may be replaced."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import pyfuse3
import trio

from helios.config import MountSettings
from helios.metrics import MountMetrics
from heliosfs.fuse import mounting
from heliosfs.fuse.channel import Channel
from heliosfs.fuse.ledger import Ledger
from heliosfs.fuse.operations import HeliosOperations
from heliosfs.fuse.passthrough import Passthrough
from heliosfs.fuse.portable import IDLE_TASKS, TASKS
from heliosfs.keeper.board import Board

log = logging.getLogger("heliosfs")

PULSE_S: Final = 0.5
"""How often the keeper is shown that this process lives, in seconds."""

TRY_S: Final = 2.0
"""How long finding out what the kernel thinks of the tiers' filesystems may take, in seconds."""

DRAIN_S: Final = 2.0
"""How long requests under way may take when this worker is to end; what is left goes to the next one."""


class Attachment(Protocol):
    """The worker's end of the handshake with its keeper."""

    @property
    def fuse_fd(self) -> int: ...
    @property
    def board(self) -> Board: ...
    @property
    def generation(self) -> int: ...


class NativeMount:
    """A mount that a keeper made. ``patience_s`` is how long a request may take when nothing is wrong with us.

    ``tiers`` are the directories that whole files are in. ``changed`` is called when there is another ``reason``.
    """

    mode: Final = "native"

    def __init__(
        self,
        mountpoint: Path,
        settings: MountSettings,
        attachment: Attachment,
        operations: HeliosOperations,
        metrics: MountMetrics,
        patience_s: float,
        tiers: Sequence[Path],
        changed: Callable[[], None],
    ) -> None:
        self._mountpoint, self._settings, self._attachment = mountpoint, settings, attachment
        self._operations, self._metrics, self._patience_s = operations, metrics, patience_s
        self._tiers, self._changed, self._passthrough = tiers, changed, Passthrough()
        self._over = trio.Event()
        self._error: BaseException | None = None
        self._nursery: trio.Nursery | None = None
        self.unmounted = False

    @property
    def reason(self) -> str:
        """How files are read, and why not better."""
        return self._passthrough.reason

    async def serve(self, stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until ``stop`` or until the mount is gone; the mount itself stays. Started once it answers."""
        token = trio.lowlevel.current_trio_token()

        def open_file(unique: int, ino: int, flags: int) -> None:
            token.run_sync_soon(self._begin_open, channel, unique, ino, flags)

        def wait_for(unique: int, fh: int, offset: int, size: int) -> None:
            token.run_sync_soon(self._begin_read, channel, unique, fh, offset, size)

        def ended(error: BaseException | None) -> None:
            token.run_sync_soon(self._end, error)

        def closed(ino: int) -> None:
            if ino in inherited:
                token.run_sync_soon(self._begin_let_go, ino)

        def released(fh: int) -> None:
            token.run_sync_soon(self._begin_release, fh)

        def wait(unique: int, seconds: float) -> None:
            token.run_sync_soon(self._begin_wait, channel, unique, seconds)

        board = self._attachment.board
        board.limit_ns = int(self._patience_s * 1e9)
        ledger = Ledger(board, self._attachment.generation)
        inherited = frozenset(ledger.files())
        fd, operations = self._attachment.fuse_fd, self._operations
        files, metrics = operations.files, self._metrics
        passthrough = self._passthrough
        channel = Channel(fd, ledger, files, metrics, passthrough, open_file, wait_for, closed, released, ended, wait)
        self._metrics.oldest_request.set_function(lambda: _age_s(channel))
        try:
            pyfuse3.init(operations, f"/dev/fd/{channel.session_fd}", mounting.options(allow_other=True))
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._pulse, board, channel)
                    nursery.start_soon(pyfuse3.main, IDLE_TASKS, TASKS)
                    channel.start()
                    nursery.start_soon(operations.files.inherit, inherited)
                    await mounting.wait_until_it_answers(self._mountpoint)
                    await mounting.set_readahead(self._mountpoint, self._settings.readahead_kib)
                    channel.begin_trials()  # not before: a process that waits for its own mount can't end
                    with trio.move_on_after(TRY_S):  # a disk that hangs shows it when a file is opened
                        await trio.to_thread.run_sync(_try_out, channel, self._tiers, abandon_on_cancel=True)
                    told = self.reason
                    task_status.started()
                    nursery.start_soon(self._tell, told)
                    nursery.start_soon(self._end_with, stop)
                    await self._over.wait()
                    channel.stop()
                    with trio.move_on_after(DRAIN_S):
                        while channel.pending and not self.unmounted:  # noqa: ASYNC110 - threads empty it
                            await trio.sleep(0.01)
                    self._nursery = None
                    nursery.cancel_scope.cancel()
            finally:
                self._nursery = None
                pyfuse3.close(unmount=False)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(channel.close)
        if self._error is not None:
            raise self._error

    def _end(self, error: BaseException | None) -> None:
        """The channel ended: the mount is gone, or a thread failed."""
        if error is None:
            self.unmounted = True
        elif not self._over.is_set():  # else it is our own ending that it stumbled over
            self._error = error
        self._over.set()

    async def _end_with(self, stop: trio.Event) -> None:
        await stop.wait()
        self._over.set()

    async def _pulse(self, board: Board, channel: Channel) -> None:
        while True:
            board.loop_ns = time.monotonic_ns()
            board.channel_ns = channel.alive_ns
            board.oldest, board.oldest_ns = channel.oldest()
            channel.look()
            await trio.sleep(PULSE_S)

    async def _tell(self, told: str) -> None:
        """Have it known when the kernel refuses what it did not refuse before."""
        while True:
            await trio.sleep(PULSE_S)
            if self.reason != told:
                told = self.reason
                self._changed()

    def _begin_open(self, channel: Channel, unique: int, ino: int, flags: int) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._open, channel, unique, ino, flags)

    def _begin_read(self, channel: Channel, unique: int, fh: int, offset: int, size: int) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._read, channel, unique, fh, offset, size)

    def _begin_let_go(self, ino: int) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._operations.files.let_go, ino)

    def _begin_release(self, fh: int) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._release, fh)

    async def _release(self, fh: int) -> None:
        with suppress(pyfuse3.FUSEError):  # it was logged; nobody waits for the answer of a RELEASE
            await self._operations.release(fh)

    def _begin_wait(self, channel: Channel, unique: int, seconds: float) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._go_on, channel, unique, seconds)

    async def _go_on(self, channel: Channel, unique: int, seconds: float) -> None:
        """On the loop, so that a request that blocks it stays alone."""
        await trio.sleep(seconds)
        channel.enough(unique)

    async def _open(self, channel: Channel, unique: int, ino: int, flags: int) -> None:
        """An OPEN. One that is cancelled stays unanswered, as a READ does."""
        try:
            info = await self._operations.open(ino, flags, None)
        except pyfuse3.FUSEError as error:
            channel.fail(unique, error.errno)
        else:
            channel.opened(unique, ino, info.fh, keep=info.keep_cache)

    async def _read(self, channel: Channel, unique: int, fh: int, offset: int, size: int) -> None:
        """A READ that must wait for its bytes. One that is cancelled stays unanswered: the next worker gets it."""
        try:
            data = await self._operations.read(fh, offset, size)
        except pyfuse3.FUSEError as error:
            channel.fail(unique, error.errno)
        else:
            channel.answer(unique, data)


def _try_out(channel: Channel, tiers: Sequence[Path]) -> None:
    """A tier's lock is a file of its filesystem. In a thread."""
    for tier in tiers:
        with suppress(OSError):  # a tier that fails: it has no files to be opened
            fd = os.open(tier / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                channel.try_out(fd)
            finally:
                os.close(fd)


def _age_s(channel: Channel) -> float:
    _, oldest = channel.oldest()
    return (time.monotonic_ns() - oldest) / 1e9 if oldest else 0.0
