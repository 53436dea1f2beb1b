"""What a scheduling policy is: filters narrow the candidates, scorers grade them, a picker takes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from router.scheduling.request import Request
from router.worker import Worker


class Policy(Protocol):
    """Chooses one of the workers that can take a request.

    Called synchronously between filtering and dispatch: nothing happens between the choice and the moment it is
    counted, so a policy may rely on ``Worker.load``.
    """

    def choose(self, request: Request, candidates: Sequence[Worker]) -> Worker:
        """One of ``candidates``, which is never empty."""
        ...


class Filter(Protocol):
    def keep(self, request: Request, candidates: Sequence[Worker]) -> Sequence[Worker]:
        """Those that should take the request; where that would be none, the least bad. Never empty."""
        ...


class Scorer(Protocol):
    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        """For each candidate how well it fits, from 0 to 1."""
        ...


class Learner(Protocol):
    """A scorer that wants to know what became of it."""

    def chosen(self, request: Request, worker: Worker) -> None:
        """The request goes to this worker."""


class Picker(Protocol):
    def pick(self, candidates: Sequence[Worker], scores: Sequence[float] | None) -> Worker:
        """One of the candidates; ``scores`` is None where nothing grades them."""
        ...


class Pipeline:
    """The policy that puts them together. A candidate's score is the sum of its scores by their weights."""

    def __init__(
        self, filters: Sequence[Filter], scorers: Sequence[tuple[float, Scorer]], picker: Picker,
        learners: Sequence[Learner] = (),
    ) -> None:  # fmt: skip
        """``learners``: those of the scorers that are told of each choice."""
        self._filters, self._scorers, self._picker, self._learners = filters, scorers, picker, learners

    def choose(self, request: Request, candidates: Sequence[Worker]) -> Worker:
        for one in self._filters:
            candidates = one.keep(request, candidates)
        if len(candidates) == 1:
            (worker,) = candidates
            if request.alone:
                return worker
        else:
            worker = self._picker.pick(candidates, self._scores(request, candidates))
        for learner in self._learners:
            learner.chosen(request, worker)
        return worker

    def _scores(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float] | None:
        if not self._scorers:
            return None
        (weight, first), *others = self._scorers
        scores = first.score(request, candidates)
        if not others:
            return scores
        total = [weight * score for score in scores]
        for weight, scorer in others:
            total = [
                sum_ + weight * score for sum_, score in zip(total, scorer.score(request, candidates), strict=True)
            ]
        return total
