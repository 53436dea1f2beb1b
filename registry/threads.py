"""The threads of the registry's process, by how long what they do may take.

Most of a request is a look-up, some SQL and a small object, done in asyncio's default threads (``asyncio.to_thread``).
Nothing may be done there that waits for an upstream (registry/mirror/questions.py), reads whole blobs or waits for a
store's deletions: a few of those at a time would leave no thread for a look-up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

LOOKUPS: Final = 32
"""Look-ups at a time: as many as there are connections to a SQLite database (registry/metadata/sqlite.py). More would
wait for one of those; asyncio's own number, that of the cores and four, would have look-ups that wait for a disk or a
database's server keep others from a processor that is idle."""
LONG: Final = 8
"""Requests for something long at a time: a bundle's beginnings, damaged chunks, scans of pickled files."""
PIECES: Final = 16
"""Pieces of objects read from a cloud store at a time, of 4 MiB at most each (registry/stored.py)."""
UPKEEP: Final = 8
"""Upkeep at a time: each of the daemon's tasks does one thing after the other, so none waits for another one."""

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A number of threads for one kind of work. Close them at the end."""

    def __init__(self, name: str, most: int) -> None:
        self._executor = ThreadPoolExecutor(most, thread_name_prefix=name)

    async def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As ``asyncio.to_thread``, in one of these threads. Cancelled, it leaves one that has begun alone."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(call, *args, **kwargs))

    def close(self) -> None:
        """Wait for what is under way; what has not begun does not begin."""
        self._executor.shutdown(cancel_futures=True)


def look_up_with(loop: asyncio.AbstractEventLoop) -> None:
    """Set the size of the loop's default threads. The loop ends them when it is closed by ``asyncio.run``."""
    loop.set_default_executor(ThreadPoolExecutor(LOOKUPS, thread_name_prefix="look-up"))


def heard(future: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody may be left to hear: asyncio would log it, as one of ours."""
    if not future.cancelled():
        future.exception()
