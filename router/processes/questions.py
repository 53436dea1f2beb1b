"""What a process asks of all others: what they have counted, and with that, whether they heard what it said before.

Messages to a process arrive in the order in which they were sent, through the supervisor too; so an answer to a
question says that what was told before it has been heard (router/processes/hub.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Final

from router.processes.messages import Collect, Collected

GATHER_S: Final = 5.0
"""Longest wait for the supervisor's sums, which takes a second when a process is silent."""


class Questions:
    """Those of one process. ``send``: to the supervisor."""

    def __init__(self, send: Callable[[Collect], None]) -> None:
        self._send = send
        self._open: dict[int, asyncio.Future[Collected]] = {}
        self._numbers = count(1)

    def answered(self, message: Collected) -> None:
        """The supervisor's answer; one that nobody waits for any more is dropped."""
        question = self._open.get(message.number)
        if question is not None and not question.done():
            question.set_result(message)

    async def gather(self) -> bytes | None:
        """What all processes have counted, in Prometheus' text form; None when the supervisor does not say."""
        answer = await self._ask()
        return None if answer is None else answer.text

    async def heard(self) -> bool:
        """Whether all processes that serve have heard what this one said until now."""
        answer = await self._ask()
        return answer is not None and not answer.silent

    async def _ask(self) -> Collected | None:
        number = next(self._numbers)
        answer: asyncio.Future[Collected] = asyncio.get_running_loop().create_future()
        self._open[number] = answer
        try:
            self._send(Collect(number))
            async with asyncio.timeout(GATHER_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._open[number]
