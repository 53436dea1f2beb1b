"""Names that no worker serves as such, in a process that relays: what they stand for, and whether it is on its way.

``org/name@champion`` is what the registry says it is: the worker is found that runs that commit (it says so with its
``revision``, or serves the model under the name ``org/name@COMMIT``). Where there is none, the model is asked for, and
its requests are held (``discovery.hold``) or answered with how far it is.

``find`` is one synchronous step on what was told before (``Names``, ``Awaited``). Of a name that is new here nothing
was: its first requests ``wait`` for that, bounded in time and number, and nobody else ever does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from helios.config import DiscoverySettings
from helios.errors import InvalidInput, Retired
from router.discovery.models import Name, Resolution
from router.discovery.names import Names, Standing
from router.discovery.progress import Phase, Progress, refusal
from router.discovery.remote import Awaited
from router.errors import ApiError
from router.workers import Workers

MOST: Final = 1_000
"""Requests that wait for what a name stands for, at a time."""
BEYOND_S: Final = 0.5
"""They wait so much longer than the registry may take: its answer has a way of its own to go."""


@dataclass(frozen=True, slots=True)
class Found:
    """``model``: whose workers take the request; ``served``: the name that they are sent.

    ``headers``: what the registry has to say to the client.
    """

    model: str
    served: str
    headers: Collection[tuple[str, str]] = ()


Told = Callable[[Found | ApiError], None]


@dataclass(slots=True)
class _Waits:
    model: str
    until: float
    told: Told


class AtRegistry:
    """One process's. Everything is called in the event loop's thread; ``clock`` gives seconds."""

    def __init__(
        self, settings: DiscoverySettings, workers: Workers, resolve: Callable[[str], None],
        want: Callable[[str], None], clock: Callable[[], float],
    ) -> None:  # fmt: skip
        """``resolve`` and ``want`` send a name to the process that asks the registry."""
        self.holds = settings.hold
        self._workers, self._clock = workers, clock
        self._names, self._awaited = Names(resolve, clock), Awaited(want, clock)
        self._wait_s = settings.resolve_timeout_s + BEYOND_S
        self._waiting: dict[int, _Waits] = {}
        self._number = 0
        workers.awaited = self._coming

    # --- what is known ---

    def find(self, model: str) -> Found | ApiError | None:
        """What a name stands for that no worker serves as it is; None: nothing is known yet.

        A name that no repository can have stands for itself, as does a model whose workers are gone for a moment.
        """
        if self._workers.named(model):
            return Found(model, self._workers.own_name(model))
        try:
            name = Name.parse(model)
        except InvalidInput:
            return Found(model, model)
        pinned = "@" in model
        answer = self._names.known(name)
        if answer is None:
            return None
        if isinstance(answer, Retired):
            return refusal(Progress(model, Phase.RETIRED, reason=answer.message))
        wanted, headers = model, list[tuple[str, str]]()
        if isinstance(answer, Resolution):
            wanted, headers = answer.pinned if pinned else model, answer.headers
            if self._workers.named(answer.pinned):
                return Found(answer.pinned, self._workers.own_name(answer.pinned), headers)
        progress = self._awaited.want(wanted)
        if progress.phase is Phase.ASKED or (progress.phase is Phase.FETCHING and not progress.total):
            return None  # whether there is such a model at all
        if not progress.ended and self.holds and (isinstance(answer, Resolution) or not pinned):
            return Found(wanted, name.repo.id, headers)
        if progress.phase is Phase.NOWHERE and self._workers.known(model):
            return Found(model, model)
        return refusal(progress)

    def stands_for(self, model: str) -> str:
        """The name whose workers take a model's requests, as was told last; nobody is asked, and nothing wanted."""
        if self._workers.named(model):
            return model
        try:
            answer = self._names.now(Name.parse(model))
        except InvalidInput:
            return model
        if not isinstance(answer, Resolution):
            return model
        return answer.pinned if "@" in model or self._workers.named(answer.pinned) else model

    def missing(self, model: str) -> ApiError | None:
        """Why a request can't wait for a model that has no worker (any more), though admission let it in; None: it can,
        or there is nothing to be said."""
        try:
            progress = self._awaited.want(model)
        except InvalidInput:
            return None
        if self._coming(model):
            return None
        error = refusal(progress)
        gone = error.status == 404 and self._workers.known(model)
        return None if gone else error  # it had workers: those are waited for, whatever the registry has

    def _coming(self, model: str) -> bool:
        """Whether requests of the model are held because it is on its way."""
        progress = self._awaited.now(model)
        return self.holds and progress is not None and not progress.ended

    # --- who waits until something is known ---

    def wait(self, model: str, told: Told) -> Callable[[], None]:
        """Hear once, after ``find`` has found nothing; call what is returned to hear no more. Raises ApiError (503)."""
        if len(self._waiting) >= MOST:
            raise _not_known(model)
        self._number += 1
        number = self._number
        self._waiting[number] = _Waits(model, self._clock() + self._wait_s, told)

        def leave() -> None:
            self._waiting.pop(number, None)

        return leave

    def tick(self) -> None:
        """Time has passed. What was asked may have been lost with the process that was asked: it is asked again."""
        if not self._waiting:
            return
        self._look()
        now = self._clock()
        for number, one in [pair for pair in self._waiting.items() if pair[1].until <= now]:
            if self._waiting.pop(number, None) is not None:
                one.told(_not_known(one.model))

    def resolved(self, text: str, answer: Standing) -> None:
        """The other process says what a name stands for."""
        self._names.told(text, answer)
        self._look()

    def progressed(self, progress: Progress) -> None:
        """The other process says how far a model is."""
        self._awaited.told(progress)
        self._look()

    def _look(self) -> None:
        """Tell those of whose models something is known now."""
        found = {model: self.find(model) for model in {one.model for one in self._waiting.values()}}
        for number, one in list(self._waiting.items()):
            if (what := found.get(one.model)) is not None and self._waiting.pop(number, None) is not None:
                one.told(what)


def _not_known(model: str) -> ApiError:
    return refusal(Progress(model))
