"""A data process's end of the dialogue with the owner of the index: questions, and the time they may take.

A request waits ``wait_s`` for its answer at most and goes on without one afterwards; nobody waits at all when it is
clear that there will be none. While the owner is silent (a question got no answer in time, and nothing else came
since it was asked) one request in ``PROBE_S`` is a probe that waits, and the others go on at once.

Synchronous but for the task that keeps the connection: whoever asks is called back, once, from the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import TYPE_CHECKING, Final

from router.kv.dialogue import QUESTION_MAX, Answer, Question, answers, encode
from router.kv.link import Link
from router.kv.tokens import PATHS, prompt_of

if TYPE_CHECKING:
    from helios.metrics import RouterMetrics
    from router.relay.intake import Intake
    from router.workers import Workers

log = logging.getLogger("helios.router")

MOST: Final = 256
"""Most questions without an answer."""
UNSENT: Final = 16 << 20
"""Bytes that the owner has not read, beyond which it is asked nothing."""
PROBE_S: Final = 0.1
PAUSES_S: Final = (0.05, 2.0)
"""Before the next try to connect, the first and the longest."""
BODY_MAX: Final = (QUESTION_MAX >> 1) - 4096
"""Longest body about which anything is asked, in bytes; packed, token ids take up to twice as much."""

Told = Callable[[Answer | None], None]


class Lookups:
    """The questions of one process. ``address``: the owner's socket; ``clock`` gives seconds."""

    def __init__(
        self, address: str | bytes, wait_s: float, workers: Workers, metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._address, self._wait_s, self._workers, self._clock = address, wait_s, workers, clock
        results = metrics.kv_lookups
        self._known, self._unknown, self._late, self._unasked = (
            results.labels(result) for result in ("known", "unknown", "late", "unasked")
        )
        self._numbers = count(1)
        self._waiting: dict[int, tuple[Told, asyncio.TimerHandle, int]] = {}
        """By number: who waits, the end of its patience, and what had come when it began to wait."""
        self._heard = 0
        """Pieces that came from the owner."""
        self._probe_at: float | None = None
        """While the owner is silent: when it may be asked again, by ``clock``."""
        self._link: _Link | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep a connection while the context lasts."""
        task = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait((task,))
            self.lost()

    def ask(self, path: str, model: str, intake: Intake, told: Told) -> bool:
        """Ask about a request; whether ``told`` will be called, later, with the answer or None."""
        link = self._link
        if path not in PATHS or intake.size > BODY_MAX or len(self._workers.of(model)) < 2:
            return False
        if link is None or not link.able or len(self._waiting) >= MOST or self._silent():
            self._unasked.inc()
            return False
        prompt = prompt_of(path, intake.content)
        if prompt is None:
            return False
        number, adapter = next(self._numbers), self._workers.adapter(model)
        frame = encode(Question(number, model, adapter, prompt.salt, prompt.tokens, prompt.question))
        timer = asyncio.get_running_loop().call_later(self._wait_s, self._give_up, number)
        self._waiting[number] = told, timer, self._heard
        link.send(frame)
        return True

    def answered(self, found: list[Answer]) -> None:
        """Something came."""
        self._heard += 1
        self._probe_at = None
        for answer in found:
            waiting = self._waiting.pop(answer.number, None)
            if waiting is None:
                continue  # too late
            told, timer, _ = waiting
            timer.cancel()
            (self._known if answer.length else self._unknown).inc()
            told(answer if answer.length else None)

    def lost(self) -> None:
        """There is no connection any more: nobody waits for it."""
        self._link = None
        waiting, self._waiting = self._waiting, {}
        for told, timer, _ in waiting.values():
            timer.cancel()
            self._late.inc()
            told(None)

    def _silent(self) -> bool:
        """Whether the owner answers nothing; one question is let through now and then to find that out."""
        if self._probe_at is None:
            return False
        now = self._clock()
        if now < self._probe_at:
            return True
        self._probe_at = now + PROBE_S
        return False

    def _give_up(self, number: int) -> None:
        told, _, heard = self._waiting.pop(number)
        if heard == self._heard and self._probe_at is None:
            self._probe_at = self._clock() + PROBE_S
        self._late.inc()
        told(None)

    async def _keep(self) -> None:
        """Connect, and again whenever the connection is lost."""
        pause = PAUSES_S[0]
        while True:
            try:
                link = await self._connect()
            except OSError as error:
                log.debug("the index of KV events can't be asked", extra={"reason": str(error)})
                pause = min(2 * pause, PAUSES_S[1])
            else:
                self._link, pause = link, PAUSES_S[0]
                try:
                    await link.over.wait()
                finally:
                    link.close()
            await asyncio.sleep(pause)

    async def _connect(self) -> _Link:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)
            sock.connect(self._address)  # at once, or not at all: it is a unix socket
            loop = asyncio.get_running_loop()
            _, link = await loop.create_unix_connection(lambda: _Link(self), sock=sock)
            stack.pop_all()
        return link


class _Link(Link[Answer]):
    """A connection to the owner."""

    def __init__(self, lookups: Lookups) -> None:
        super().__init__(answers(), UNSENT, "the owner of the index of KV events sent what is no answer")
        self._lookups = lookups
        self.over = asyncio.Event()

    def came(self, found: list[Answer]) -> None:
        self._lookups.answered(found)

    def ended(self) -> None:
        self.over.set()
        self._lookups.lost()
