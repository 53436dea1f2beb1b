"""The threads in which an upstream is asked, and one question for all who want the same answer at a time.

An upstream may be slow, so it is asked in no other threads: what the registry holds is looked up in those it keeps for
that (registry/threads.py), however many wait here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from helios.errors import HeliosError
from registry.mirror.asking import NO_S, unavailable
from registry.mirror.brief import Brief
from registry.threads import heard

log = logging.getLogger("helios.registry.mirror")

ANSWER_S: Final = 8.0
"""Longest wait for the upstream, in seconds: clients give up on a HEAD after 10."""
RENEW_S: Final = 3.0
"""Longest wait for news of a ref that is known already; then it is served as it is."""
THREADS: Final = 16
"""Questions to the upstream at a time."""

T = TypeVar("T")
Key = tuple[str, ...]


@dataclass(slots=True)
class _Question:
    """One that was asked and has no answer yet, and how many wait for it."""

    future: Future[Any]
    waiting: int = 0


class Questions:
    """To one upstream. Close it at shutdown."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="mirror")
        self._lock = threading.RLock()  # what cancels a question hears of its end within
        self._open: dict[Key, _Question] = {}
        self._stale: Brief[Key, str] = Brief(4096)

    def begin(self, work: Callable[[], object]) -> None:
        """Do something in the background that nobody waits for."""
        self._threads.submit(work)

    async def ask(self, key: Key, work: Callable[[], T], deadline_s: float) -> T:
        """Have a thread do the work, once for all who want it now, and return what it says.

        One that is under way goes on when those who waited have left; one that waits for a thread does not begin then,
        so no more wait here than there are clients. Raises what the work does, UpstreamUnavailable after the deadline.
        """
        with self._lock:
            question = self._open.get(key)
            if question is None:
                question = self._open[key] = _Question(self._threads.submit(work))
                question.future.add_done_callback(partial(self._answered, key))
            question.waiting += 1
        try:
            async with asyncio.timeout(deadline_s):
                answer: asyncio.Future[T] = asyncio.wrap_future(question.future)
                answer.add_done_callback(heard)
                return await asyncio.shield(answer)
        except TimeoutError:
            raise unavailable(self._endpoint, f"no answer within {deadline_s:g} s") from None
        finally:
            self._left(question)

    async def attempt(self, key: Key, work: Callable[[], object], otherwise: str) -> str | None:
        """Ask for what is nice to know; what goes wrong is a warning, and is believed for a while."""
        warning = self._stale.get(key)
        if warning is None:
            try:
                await self.ask(key, work, RENEW_S)
            except HeliosError as error:
                warning = f"{otherwise}: {error.message}"
                self._stale.put(key, warning, NO_S)
                log.warning("the upstream could not be asked", extra={"about": list(key), "error": error.message})
        return warning

    def close(self) -> None:
        """Take no more. What is under way ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _answered(self, key: Key, future: Future[Any]) -> None:
        """Whoever asks from here on asks anew."""
        with self._lock:
            question = self._open.get(key)
            if question is not None and question.future is future:
                del self._open[key]

    def _left(self, question: _Question) -> None:
        with self._lock:
            question.waiting -= 1
            if not question.waiting:
                question.future.cancel()  # does nothing to one that has begun
