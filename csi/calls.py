"""Blocking calls from the event loop: bounded in number, each with a deadline, and none that the process waits for.

A call into a filesystem that nobody serves may never return, and a thread in one can't be ended. So the threads are
daemons, a call that is late is left behind with its place in the bound, and whoever asked gets an error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from helios.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")

MOST: Final = 48
"""Calls at a time."""


class Calls:
    """All methods are called on one event loop."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._places = most, asyncio.Semaphore(most)
        self._late = 0

    @property
    def stuck(self) -> int:
        """Calls that did not come back in time, and have not since."""
        return self._late

    @property
    def exhausted(self) -> bool:
        """Whether every place has a call that did not come back in time: nothing can be done any more."""
        return self._late >= self._most

    async def run(self, what: str, function: Callable[[], T], timeout_s: float) -> T:
        """What ``function`` returns or raises. Raises DeadlineExceeded, naming ``what``, when it does not return in
        time; then it goes on, and what it returns is dropped. Unavailable: no place became free."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        try:
            await asyncio.wait_for(self._places.acquire(), timeout_s)
        except TimeoutError:
            raise Unavailable(
                f"{what}: {self._most} calls to filesystems are under way and none came back",
                hint="Look whether the mount answers: `helios status` on the node.",
            ) from None
        future: asyncio.Future[T] = loop.create_future()
        late = False

        def done(result: T | None, error: BaseException | None) -> None:
            self._places.release()
            if late:
                self._late -= 1
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            result, error = None, None
            try:
                result = function()
            except BaseException as caught:  # it is raised where it is waited for
                error = caught
            try:
                loop.call_soon_threadsafe(done, result, error)
            except RuntimeError:
                return  # the loop has ended, and nobody waits any more

        threading.Thread(target=work, name=f"csi {what}"[:40], daemon=True).start()
        try:
            return await asyncio.wait_for(future, max(0.0, end - loop.time()))
        except TimeoutError:
            if not future.cancelled():
                raise  # the function's own
            late = True
            self._late += 1
            raise DeadlineExceeded(f"{what} took longer than {timeout_s:.0f} s") from None
