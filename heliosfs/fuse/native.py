"""The native mode: a keeper holds the mount; this process serves it through the channel and may be replaced."""

from __future__ import annotations

import logging
import time
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
from heliosfs.fuse.portable import IDLE_TASKS, TASKS
from heliosfs.keeper.board import Board

log = logging.getLogger("heliosfs")

PULSE_S: Final = 0.5
"""How often the keeper is shown that this process lives, in seconds."""

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
    """A mount that a keeper made. ``patience_s`` is how long a request may take when nothing is wrong with us."""

    mode: Final = "native"
    reason: Final = "passthrough and a keeper"

    def __init__(
        self,
        mountpoint: Path,
        settings: MountSettings,
        attachment: Attachment,
        operations: HeliosOperations,
        metrics: MountMetrics,
        patience_s: float,
    ) -> None:
        self._mountpoint, self._settings, self._attachment = mountpoint, settings, attachment
        self._operations, self._metrics, self._patience_s = operations, metrics, patience_s
        self._over = trio.Event()
        self._error: BaseException | None = None
        self._nursery: trio.Nursery | None = None
        self.unmounted = False

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

        board = self._attachment.board
        board.limit_ns = int(self._patience_s * 1e9)
        ledger = Ledger(board, self._attachment.generation)
        inherited = frozenset(ledger.files())
        fd, operations = self._attachment.fuse_fd, self._operations
        channel = Channel(fd, ledger, operations.files, self._metrics, open_file, wait_for, closed, released, ended)
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
                    mounting.set_readahead(self._mountpoint, self._settings.readahead_kib)
                    task_status.started()
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
            board.channel_ns, board.oldest_ns = channel.alive_ns, channel.oldest_ns()
            await trio.sleep(PULSE_S)

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
            self._nursery.start_soon(self._operations.release, fh)

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


def _age_s(channel: Channel) -> float:
    oldest = channel.oldest_ns()
    return (time.monotonic_ns() - oldest) / 1e9 if oldest else 0.0
