"""What became of requests, by route, model, status and by the revision of the worker that had them last.

One look for each request that ends: an account has the counter and the histograms of its kind, and what the metrics
show, and what ``GET /demand`` says of a revision, are sums of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Final

from helios.metrics import RouterMetrics
from helios.series import Count, Time

MOST: Final = 4096
"""From so many accounts on, those of revisions that no worker runs any more are put together."""

Key = tuple[str, str, int, str, bool, bool]
"""Route, model, status, revision ("": no worker), whether a stream was asked for, whether it was broken off."""


class Account:
    """Requests of a kind."""

    __slots__ = ("count", "duration", "first_byte")

    def __init__(self, count: Count, first_byte: Time, duration: Time) -> None:
        self.count, self.first_byte, self.duration = count, first_byte, duration


class Accounts:
    """Those of one process."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._known: dict[Key, Account] = {}
        self._fold_at = MOST
        self.elsewhere: Counter[tuple[str, str]] = Counter()
        """Attempts, by model and revision, that failed and were made again elsewhere."""

    def of(self, key: Key) -> Account | None:
        return self._known.get(key)

    def made(self, key: Key, running: Collection[str]) -> Account:
        """A new one. ``running``: the revisions that workers run."""
        if len(self._known) >= self._fold_at:
            self._fold(running)
            self._fold_at = max(MOST, 2 * len(self._known))
        return self._make(key)

    def all(self) -> Iterator[tuple[Key, Account]]:
        return iter(self._known.items())

    def _make(self, key: Key) -> Account:
        metrics, (path, model, status, _, _, _) = self._metrics, key
        account = self._known[key] = Account(
            metrics.requests.another(path, model, str(status)), metrics.first_byte.another(model),
            metrics.duration.another(model),
        )  # fmt: skip
        return account

    def _fold(self, running: Collection[str]) -> None:
        metrics = self._metrics
        for key, account in list(self._known.items()):
            path, model, status, revision, streamed, cut = key
            if not revision or revision in running:
                continue
            other = path, model, status, "", streamed, cut
            into = self._known.get(other) or self._make(other)
            metrics.requests.fold(account.count, into.count, path, model, str(status))
            metrics.first_byte.fold(account.first_byte, into.first_byte, model)
            metrics.duration.fold(account.duration, into.duration, model)
            del self._known[key]
        for model, revision in [pair for pair in self.elsewhere if pair[1] not in running]:
            del self.elsewhere[model, revision]
