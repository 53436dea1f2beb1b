"""One question to the database for all requests that wait for its answer.

What is in memory is right if nobody has changed anything since. Where processes share the database, each request asks
before it is answered; requests that come while a question is under way share the next one. So an answer holds every
write that was acknowledged before the request came, at any process, and however many come, one question at a time is
asked. Where nobody shares the database there is nothing to ask.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from registry.catalog import Catalog
from registry.threads import heard


class Fresh:
    """Makes sure that the catalog's memory is as new as the moment of the call. Used on one event loop."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fresh")
        self._asking: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        """Raises what ``Catalog.confirm`` does."""
        if not self._catalog.database.kind.shared:
            return
        if self._next is None:
            self._next = asyncio.create_task(self._ask(self._asking))
            self._next.add_done_callback(heard)
        await asyncio.shield(self._next)  # a caller that leaves leaves the others' question alone

    async def _ask(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        # Whoever comes from here on may come after a write that this question does not see.
        self._asking, self._next = self._next, None
        await asyncio.get_running_loop().run_in_executor(self._thread, self._catalog.confirm)

    def close(self) -> None:
        self._thread.shutdown()
