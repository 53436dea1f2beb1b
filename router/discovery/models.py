"""Which commit a model's name stands for, as the registry says: remembered, renewed behind the answers, bounded.

A name is ``org/name`` or ``org/name@revision``; the revision is a ref (a branch, a tag, an alias such as ``champion``)
or a commit. Answers are those of docs/native-api.md.

- **Fresh** for ``ttl_s``: no question is asked.
- **Stale** afterwards: the answer is what is known, at once, and the registry is asked behind it, once for all who want
  to know (stale-while-revalidate, RFC 5861). If it is down, what is known counts for as long as it is: a name that was
  resolved yesterday is better than none. Failures are asked for again after ``RETRY_S``.
- **Not known**: the caller waits for the one question that is under way, up to its deadline.
- Names that the registry does not know are remembered apart, in another bounded table and for a shorter time: clients
  that make names up push no name out that is in use.

``known`` is one synchronous step, for the path of requests; ``resolve`` waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from helios.errors import HeliosError, InvalidInput, NotFound, Retired, Unavailable
from helios.metrics import RouterMetrics
from helios.names import RepoId, split_spec

RETRY_S: Final = 5.0
"""After a question that failed the registry is asked again, in seconds."""
UNKNOWN_S: Final = 10.0
"""How long the registry's "no" counts, in seconds."""
MOST: Final = 10_000
"""Names that are remembered..."""
MOST_UNKNOWN: Final = 1_000
"""...and names that the registry does not know."""
MOST_ASKED: Final = 64
"""Questions under way at a time."""
MAX_WARNING: Final = 500
MAX_NAME: Final = 512
"""Longest name that is asked for, in characters."""


@dataclass(frozen=True, slots=True)
class Name:
    """A model's name, read; raises InvalidInput for what no repository can be called."""

    repo: RepoId
    rev: str

    @classmethod
    def parse(cls, text: str) -> Name:
        if len(text) > MAX_NAME:
            raise InvalidInput(f"a model's name has at most {MAX_NAME} characters")
        return cls(*split_spec(text, "main", "models"))

    def __str__(self) -> str:
        return f"{self.repo.id}@{self.rev}"


@dataclass(frozen=True, slots=True)
class Resolution:
    """What the registry says of a name."""

    name: Name
    commit: str
    """40 hexadecimal digits: what requests are answered with, wherever the name points later."""
    warning: str | None = None
    """What a client should be told: the model, or this commit, is deprecated."""
    replacement: str | None = None

    @property
    def pinned(self) -> str:
        """``org/name@commit``."""
        return f"{self.name.repo.id}@{self.commit}"

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Headers of an answer: where there is something to be told, ``x-helios-warning`` has it."""
        if self.warning is None:
            return []
        text = self.warning + (f" Use {self.replacement}." if self.replacement else "")
        return [("x-helios-warning", "".join(c if " " <= c <= "~" else "?" for c in text)[:MAX_WARNING])]


Ask = Callable[[Name], Awaitable[Resolution]]
"""Asks the registry. Raises NotFound, Retired, or another HeliosError where it has no answer."""


@dataclass(slots=True)
class _Entry:
    answer: Resolution | HeliosError
    until: float
    """When it is stale."""


class Models:
    """The names of one router. Its tasks end with ``close``."""

    def __init__(
        self, ask: Ask, ttl_s: float, timeout_s: float, metrics: RouterMetrics, *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._ask, self._ttl_s, self._timeout_s, self._clock = ask, ttl_s, timeout_s, clock
        self._metrics = metrics
        self._known: OrderedDict[Name, _Entry] = OrderedDict()
        self._unknown: OrderedDict[Name, _Entry] = OrderedDict()
        self._asked: dict[Name, asyncio.Task[None]] = {}
        self.changed: Callable[[Name, Resolution | HeliosError], None] = lambda name, answer: None
        """Hears what each question has brought, in the event loop's thread; it must not raise."""

    async def close(self) -> None:
        tasks = list(self._asked.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def known(self, name: Name) -> Resolution | HeliosError | None:
        """What is known of a name now, fresh or stale; None: nothing. Has the registry asked where it should be.

        A HeliosError is the registry's answer (NotFound, Retired) or why there is none (Unavailable).
        """
        entry = self._find(name)
        stale = entry is None or entry.until <= self._clock()
        if stale:
            self._renew(name)
        if entry is None:
            return None
        self._count("stale" if stale else "fresh")
        return entry.answer

    async def resolve(self, name: Name) -> Resolution:
        """What the name stands for. Raises NotFound, Retired or Unavailable; waits no longer than ``timeout_s``."""
        answer = self.known(name)
        if answer is None or isinstance(answer, Unavailable):
            task = self._asked.get(name)
            if task is not None:
                await asyncio.wait([task], timeout=self._timeout_s)
            entry = self._find(name)
            answer = Unavailable(f"the registry gave no answer for {name}") if entry is None else entry.answer
        if isinstance(answer, HeliosError):
            raise answer
        return answer

    def _find(self, name: Name) -> _Entry | None:
        for table in (self._known, self._unknown):
            if name in table:
                table.move_to_end(name)
                return table[name]
        return None

    def _renew(self, name: Name) -> None:
        """Have the registry asked, unless it is being asked, or too much is."""
        if name in self._asked:
            return
        if len(self._asked) >= MOST_ASKED:
            self._count("unavailable")
            return
        task = self._asked[name] = asyncio.get_running_loop().create_task(self._renewed(name))
        task.add_done_callback(lambda _: self._asked.pop(name, None))

    async def _renewed(self, name: Name) -> None:
        answer: Resolution | HeliosError
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._ask(name)
            self._count("asked")
        except TimeoutError:
            answer = Unavailable(f"the registry gave no answer for {name} within {self._timeout_s:g} s")
        except HeliosError as error:
            answer = error
        self._take(name, answer)

    def _take(self, name: Name, answer: Resolution | HeliosError) -> None:
        now, before = self._clock(), self._find(name)
        if isinstance(answer, Resolution):
            self._put(self._known, MOST, name, _Entry(answer, now + self._ttl_s))
            self._unknown.pop(name, None)
        elif isinstance(answer, Retired | NotFound):
            self._count("retired" if isinstance(answer, Retired) else "unknown")
            self._known.pop(name, None)
            self._put(self._unknown, MOST_UNKNOWN, name, _Entry(answer, now + UNKNOWN_S))
        else:
            self._count("unavailable")
            if before is not None and not isinstance(before.answer, Unavailable):
                before.until = now + RETRY_S  # what was known counts
            else:
                self._put(self._unknown, MOST_UNKNOWN, name, _Entry(_unavailable(name, answer), now + RETRY_S))
        if (entry := self._find(name)) is not None:
            self.changed(name, entry.answer)

    def _put(self, table: OrderedDict[Name, _Entry], most: int, name: Name, entry: _Entry) -> None:
        table[name] = entry
        table.move_to_end(name)
        if len(table) > most:
            table.popitem(last=False)

    def _count(self, result: str) -> None:
        self._metrics.resolutions.labels(result).inc()


def _unavailable(name: Name, error: HeliosError) -> Unavailable:
    return error if isinstance(error, Unavailable) else Unavailable(f"{name} can't be resolved: {error.message}")
