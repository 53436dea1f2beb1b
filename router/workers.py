"""The workers by model, and the count of requests at each.

Everything here is synchronous and runs in the event loop's thread, so a choice and its count are one step. The count
goes up when a lease is entered and down when it is left, whichever way; nothing else touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from helios.config import WorkerSettings
from helios.errors import UsageError
from router.health import Health, State

Role = Literal["both", "prefill", "decode"]


class Worker:
    """One vLLM server. A worker that serves several models (``--served-model-name a b``) is one worker."""

    __slots__ = ("cards", "dispatched_at", "health", "in_flight", "models", "role", "url")

    def __init__(self, url: str, role: Role, health: Health) -> None:
        self.url, self.role, self.health = url, role, health
        self.models: list[str] = []
        self.in_flight = 0
        """Requests dispatched to it whose answer has not ended."""
        self.dispatched_at = 0
        """Number of the last dispatch, counted over all workers."""
        self.cards: dict[str, dict[str, Any]] = {}
        """What the worker says of its models: the entries of its ``/v1/models``, by id."""

    def __repr__(self) -> str:
        return f"Worker({self.url}, {self.health.state.value}, {self.in_flight} in flight)"


class Lease:
    """A request at a worker: counted while the context lasts."""

    __slots__ = ("_worker",)

    def __init__(self, worker: Worker, number: int) -> None:
        self._worker = worker
        worker.dispatched_at = number

    def __enter__(self) -> Worker:
        self._worker.in_flight += 1
        return self._worker

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._worker.in_flight -= 1


class Workers:
    """The configured workers. Raises UsageError for a configuration under which a model could never answer."""

    def __init__(self, settings: Sequence[WorkerSettings], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_url: dict[str, Worker] = {}
        self._by_model: dict[str, list[Worker]] = {}
        self._dispatches = 0
        for one in settings:
            self._add(one)
        if not self._by_url:
            raise UsageError("no worker is configured", hint="Give --worker MODEL=URL, once for each worker.")
        for model, workers in self._by_model.items():
            if all(worker.role == "prefill" for worker in workers):
                raise UsageError(
                    f"every worker of {model!r} has role=prefill, so none would answer clients",
                    hint="Give it a worker with role=decode or without a role.",
                )

    def _add(self, settings: WorkerSettings) -> None:
        url = check_url(settings.url)
        if not settings.model:
            raise UsageError(f"the worker {url} has no model name")
        worker = self._by_url.get(url)
        if worker is None:
            worker = self._by_url[url] = Worker(url, settings.role, Health(self._clock))
        if worker.role != settings.role:
            raise UsageError(f"{url} is configured with two roles: {worker.role} and {settings.role}")
        if settings.model in worker.models:
            raise UsageError(f"{settings.model}={url} is configured twice")
        worker.models.append(settings.model)
        self._by_model.setdefault(settings.model, []).append(worker)

    @property
    def all(self) -> Collection[Worker]:
        return self._by_url.values()

    @property
    def models(self) -> list[str]:
        """The models' names, sorted."""
        return sorted(self._by_model)

    def of(self, model: str) -> list[Worker]:
        """Every worker of a model, of any role and state; empty for a model that is not known."""
        return self._by_model.get(model, [])

    def candidates(self, model: str, excluded: Collection[Worker]) -> list[Worker]:
        """The workers that may take a client's request: those that are up, or, when none is, those not checked yet."""
        able = [w for w in self.of(model) if w.role != "prefill" and w.health.usable and w not in excluded]
        up = [worker for worker in able if worker.health.state is State.UP]
        return up or able

    def lease(self, worker: Worker) -> Lease:
        """The guard under which a request is sent to the worker; enter it at once."""
        self._dispatches += 1
        return Lease(worker, self._dispatches)


def check_url(text: str) -> str:
    """A worker's base URL without a final slash; raises UsageError."""
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(f"{text!r} is not a worker's URL", hint="Write http://HOST:PORT.")
    if parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        raise UsageError(f"a worker's URL has no query, fragment or credentials: {parts.hostname}:{port}")
    path = parts.path.rstrip("/")
    if path == "/v1" or path.endswith("/v1"):
        raise UsageError(
            f"{text!r} ends with /v1, which the router adds itself", hint=f"Write {text.rstrip('/')[:-3]}."
        )
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def parse_worker(text: str) -> WorkerSettings:
    """Read ``MODEL=URL[,role=prefill|decode|both]`` from the command line; raises UsageError."""
    model, equals, rest = text.partition("=")
    url, *options = rest.split(",")
    if not equals or not model or not url:
        raise UsageError(f"{text!r} is not a worker", hint="Write MODEL=http://HOST:PORT[,role=prefill|decode].")
    role: Role = "both"
    for option in options:
        key, _, value = option.partition("=")
        if key != "role" or value not in ("both", "prefill", "decode"):
            raise UsageError(f"{option!r} is not an option of a worker", hint="Known: role=prefill, role=decode.")
        role = value  # type: ignore[assignment]
    return WorkerSettings(model=model, url=check_url(url), role=role)
