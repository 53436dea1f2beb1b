"""The sources that the settings name, and what is asked of the registry: put together, and run by one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from helios.config import DiscoverySettings, RegistrySettings, WorkerSettings
from helios.errors import InvalidInput, UsageError
from helios.metrics import RouterMetrics
from helios.tokens import token_of
from router.discovery.availability import Availability, Waker
from router.discovery.file import FileSource
from router.discovery.kubernetes import KubernetesSource
from router.discovery.models import Models, Name
from router.discovery.progress import refusal
from router.discovery.registration import RegistrationSource
from router.discovery.registry import Registry
from router.discovery.source import Apply, Source, Teller
from router.errors import ApiError


class Discovery:
    """What one router discovers. Raises UsageError for settings that can't work; starts nothing before ``running``."""

    def __init__(
        self, settings: DiscoverySettings, registry: RegistrySettings, apply: Apply, serves: Callable[[str], bool],
        metrics: RouterMetrics, *, waker: Waker | None = None, environ: Mapping[str, str] = os.environ,
        resumes: bool = False,
    ) -> None:  # fmt: skip
        """``serves``: whether a worker takes requests of a model now; ``waker`` starts workers, if there is one;
        ``resumes``: another process did this before, and what it said counts while a file can't be used."""
        for name in ("file_poll_s", "resolve_ttl_s", "resolve_timeout_s"):
            if getattr(settings, name) <= 0:
                raise UsageError(f"router.discovery.{name} must be more than 0, not {getattr(settings, name)}")
        self._apply = apply
        self.registration = RegistrationSource(settings.max_lease_s, self._teller("registration", metrics))
        self._sources: list[Source] = [self.registration]
        self.names = {"registration"}
        """What the sources are called."""
        if settings.file:
            teller = self._teller("file", metrics)
            self._sources.append(FileSource(Path(settings.file), settings.file_poll_s, teller, resumes=resumes))
            self.names.add("file")
        if settings.kubernetes.slices or settings.kubernetes.pods:
            self._sources.append(KubernetesSource(settings.kubernetes, self._teller("kubernetes", metrics)))
            self.names.add("kubernetes")
        self._registry: Registry | None = None
        self.models: Models | None = None
        """What names stand for; None where the registry is not asked."""
        self.availability: Availability | None = None
        """Models that no worker serves; None where the registry is not asked."""
        if settings.resolve:
            token = token_of(registry.token_file, environ)
            asked = self._registry = Registry(registry.urls, token, settings.resolve_timeout_s)
            self.models = Models(asked.resolve, settings.resolve_ttl_s, settings.resolve_timeout_s, metrics)
            patterns = tuple(settings.fetch)
            self.availability = Availability(
                asked.where, asked.fetch, lambda name: _fits(name, patterns), serves, waker
            )
            metrics.models_awaited.set_function(lambda: len(self.awaited()))

    def _teller(self, name: str, metrics: RouterMetrics) -> Teller:
        return Teller(name, self._told, metrics)

    def _told(self, source: str, workers: Sequence[WorkerSettings]) -> None:
        self._apply(source, workers)
        if self.availability is not None:
            self.availability.look()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look at the sources while the context lasts; what they know is told before it is entered or soon after."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(source.run()) for source in self._sources]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                if self.availability is not None:
                    await self.availability.close()
                if self.models is not None:
                    await self.models.close()
                if self._registry is not None:
                    self._registry.close()

    def awaited(self) -> list[dict[str, object]]:
        """The models that are waited for, for people."""
        return [] if self.availability is None else self.availability.awaited

    def missing(self, model: str) -> ApiError | None:
        """What a client is told of a model that no worker serves, which is looked for; None: nothing is known of it."""
        if self.availability is None:
            return None
        try:
            return refusal(self.availability.want(model))
        except InvalidInput:  # no repository can be called so
            return None


def _fits(name: Name, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.repo.id, pattern) for pattern in patterns)
