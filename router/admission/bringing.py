"""Wakes models, in the control process: those without a worker are fetched and started as the registry knows them
(``Availability``), those whose workers are down are started by the operator's hook, where there is one."""

from __future__ import annotations

import asyncio
from typing import Final

from helios.errors import HeliosError
from router.admission.waking import Report, WakeFailed, Waker
from router.discovery.availability import Availability
from router.workers import Workers

AGAIN_S: Final = 1.0
"""One that was served and is wanted still is looked for again after so long, in seconds."""


class Bringing:
    """A ``Waker``. ``availability``: None where the registry is not asked; ``hook``: None where there is none."""

    def __init__(self, availability: Availability | None, workers: Workers, hook: Waker | None) -> None:
        self._availability, self._workers, self._hook = availability, workers, hook

    async def wake(self, model: str, report: Report) -> None:
        if self._hook is not None and (self._availability is None or self._workers.named(model)):
            await self._hook.wake(model, report)
        elif self._availability is None:
            raise WakeFailed("nobody can start it")
        else:
            while True:
                try:
                    await self._availability.bring(model, report)
                except HeliosError as error:
                    raise WakeFailed(error.message) from None
                await asyncio.sleep(AGAIN_S)
