"""A trio loop in a thread of its own, for callers in any other thread.

The thread is a daemon: a program that forgets to close ends without waiting for it, and loses nothing but what the
cache had not flushed in its last seconds. ``close`` ends the loop and waits.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Generic, TypeVar

import trio

from helios.errors import DeadlineExceeded, HeliosError
from heliosfs.client.values import Closed

log = logging.getLogger("heliosfs.client")

T = TypeVar("T")

CANCEL_S: Final = 10.0
"""How long an interrupted call may take to end, in seconds: until then it owns its caller's buffer."""

END_S: Final = 60.0
"""How long the loop may take to end, in seconds."""


class Call(Generic[T]):
    """One call: made by any thread, run on the loop, waited for by its caller."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._scope = trio.CancelScope()
        self._done = threading.Event()
        self._value: list[T] = []
        self._error: BaseException | None = None

    async def run(self) -> None:
        """On the loop."""
        try:
            with self._scope:
                self._value.append(await self._work())
                return
            self.fail(Closed("the call was given up"))
        except Exception as error:
            self.fail(error)
        except BaseException:
            self.fail(Closed("the store was closed meanwhile"))
            raise
        finally:
            self._done.set()

    def succeed(self, value: T) -> None:
        """End it with a value."""
        self._value.append(value)
        self._done.set()

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it has ended."""
        if not self._done.is_set():
            self._error = error
            self._done.set()

    def cancel(self) -> None:
        """On the loop: end it soon."""
        self._scope.cancel()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended by then."""
        return self._done.wait(timeout_s)

    def value(self) -> T:
        """What came out; call it once it has ended."""
        if self._error is not None:
            raise self._error
        return self._value[0]


class Portal:
    """The loop. ``make`` gives the context that it keeps open; ``call`` and ``submit`` come from any thread."""

    def __init__(self, name: str) -> None:
        self._name, self._pid = name, os.getpid()
        self._lock = threading.Lock()
        self._calls: set[Call[Any]] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._thread: threading.Thread | None = None

    def open(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> T:
        """Start the loop and return what the context gives. Raises what opening it raises."""
        opened: Call[T] = Call(_never)
        self._thread = threading.Thread(target=self._run, args=(make, opened), name=self._name, daemon=True)
        self._thread.start()
        try:
            opened.wait()
        except BaseException:
            self.abandon()
            raise
        return opened.value()

    def submit(self, work: Callable[[], Awaitable[T]]) -> Call[T]:
        """Start a call. Raises Closed."""
        if os.getpid() != self._pid:
            raise Closed("the store was opened in another process", hint="connect() again after a fork.")
        call = Call(work)
        with self._lock:
            try:
                if self._token is None:
                    raise trio.RunFinishedError
                self._token.run_sync_soon(self._start, call)
            except trio.RunFinishedError:
                raise Closed("the store is closed", hint="connect() opens another.") from None
            self._calls.add(call)
        return call

    def finish(self, call: Call[T]) -> T:
        """Wait for a call. An exception in the caller's thread (KeyboardInterrupt) cancels it."""
        try:
            call.wait()
        except BaseException:
            self.give_up(call)
            raise
        return call.value()

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something on the loop and wait for it."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("this would wait for itself: use the classes of heliosfs.client.aio on its loop")
        return self.finish(self.submit(work))

    def give_up(self, call: Call[Any]) -> None:
        """Cancel a call, and wait a moment for it to let go of its buffer."""
        self._soon(call.cancel)
        if not call.wait(CANCEL_S):
            log.warning("a call that was given up still runs")

    def abandon(self) -> None:
        """End the loop, without waiting. From any thread, at any time."""
        self._soon(self._end)

    def close(self) -> None:
        """End the loop and wait for it; calls under way raise Closed. Raises DeadlineExceeded if it does not end."""
        self.abandon()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join(END_S)
            if self._thread.is_alive():
                raise DeadlineExceeded(f"the client's loop has not ended within {END_S:g} s")

    # --- on the loop ---

    def _run(self, make: Callable[[], AbstractAsyncContextManager[T]], opened: Call[T]) -> None:
        reason: BaseException = Closed("the store was closed meanwhile")
        try:
            trio.run(self._main, make, opened)
        except BaseException as error:
            reason = error
            if opened.wait(0):  # else it is raised there
                log.exception("the client's loop failed")
                reason = HeliosError(f"the client's loop failed: {error!r}")
        finally:
            with self._lock:
                self._token = None
                left, self._calls = self._calls, set()
            for call in (opened, *left):
                call.fail(reason)

    async def _main(self, make: Callable[[], AbstractAsyncContextManager[T]], opened: Call[T]) -> None:
        with self._lock:
            self._token = trio.lowlevel.current_trio_token()
        async with make() as value, trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                opened.succeed(value)
                await self._stop.wait()
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()

    def _start(self, call: Call[Any]) -> None:
        if self._nursery is None:
            call.fail(Closed("the store was closed meanwhile"))
        else:
            self._nursery.start_soon(self._run_call, call)

    def _end(self) -> None:
        self._stop.set()

    async def _run_call(self, call: Call[Any]) -> None:
        try:
            await call.run()
        finally:
            with self._lock:
                self._calls.discard(call)

    def _soon(self, act: Callable[[], object]) -> None:
        """Do something on the loop, if there still is one."""
        with self._lock:
            token = self._token
        if token is not None:
            try:
                token.run_sync_soon(act)
            except trio.RunFinishedError:
                return  # it has ended by itself meanwhile


async def _never() -> Any:
    raise AssertionError("never run")
