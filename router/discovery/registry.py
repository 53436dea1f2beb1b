"""What the router asks a registry: the calls of docs/native-api.md, each in a thread, with a deadline.

Several addresses are tried in turn, from the one that answered last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from helios.errors import Unavailable, UsageError
from helios.http.client import HttpClient
from helios.registry_answers import Notice, Place
from helios.registry_client import RegistryClient
from helios.tokens import Token
from router.discovery.models import Name, Resolution

THREADS: Final = 8

T = TypeVar("T")


class Registry:
    """The registry of one router; ``close`` it. Raises UsageError without an address."""

    def __init__(self, urls: Sequence[str], token: Token, timeout_s: float) -> None:
        if not urls:
            raise UsageError(
                "router.discovery.resolve needs a registry", hint="Set registry.urls (HELIOS_REGISTRY__URLS)."
            )
        # All of them get their turn within the deadline of a question.
        each_s = timeout_s / len(urls)
        self._clients = [RegistryClient(HttpClient(url, timeout_s=each_s, token=token)) for url in urls]
        self._first = 0
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="registry")

    def close(self) -> None:
        """Give connections and threads up; a question under way ends by its deadline, and nobody waits for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients:
            client.close()

    async def resolve(self, name: Name) -> Resolution:
        """Raises what the registry answers, or Unavailable."""

        def asked(client: RegistryClient) -> Resolution:
            revision = client.resolve(name.repo, name.rev)
            return resolution(name, revision.commit, client.notices(name.repo))

        return await self._ask(asked)

    async def where(self, name: Name) -> Place:
        """Where it is; has no effect."""
        return await self._ask(lambda client: client.where(name.repo, name.rev))

    async def fetch(self, name: Name) -> Place:
        """The same, and have it fetched if it is not here."""
        return await self._ask(lambda client: client.fetch(name.repo, name.rev))

    async def _ask(self, call: Callable[[RegistryClient], T]) -> T:
        loop, count, first = asyncio.get_running_loop(), len(self._clients), self._first
        why: Unavailable | None = None
        for number in range(first, first + count):
            try:
                answer = await loop.run_in_executor(self._pool, call, self._clients[number % count])
            except Unavailable as error:
                why = why or error
                continue
            self._first = number % count
            return answer
        assert why is not None
        raise why


def resolution(name: Name, commit: str, notices: Sequence[Notice]) -> Resolution:
    """An answer with what is said of the commit, or else of all of the repository."""
    said = [one for one in notices if one.state == "deprecated" and one.commit in ("", commit)]
    if not said:
        return Resolution(name, commit)
    notice = max(said, key=lambda one: (one.commit != "", one.time))
    what = name.repo.id if notice.commit == "" else f"{name.repo.id}@{commit[:12]}"
    return Resolution(name, commit, f"{what} is deprecated: {notice.message}", notice.replacement)
