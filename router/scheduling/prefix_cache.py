"""Scorer ``prefix-cache``: the worker that will have the first token soonest, by what waits there to be computed and by
what of the prompt it has computed before.

For each worker the tokens are estimated that stand between the request and its first token: those of prompts that
were sent there and have no answer yet, those of this prompt that it has not seen (``marks``), and some for each
request in flight, which takes part of every step. The fewest win; among those that are within ``slack`` of them (a
share of the prompt) it is the owner of the prompt's beginning by rendezvous hashing, so that routers and processes that
don't know of each other choose alike. So a beginning is kept where it is until waiting there costs more than computing
it anew, and then it is in two places: llm-d's prefix and load scorers and SGLang's cache-aware balancing do the same
with weights and thresholds; here both are tokens, and there is nothing to weigh.

What was sent where is remembered (``homes``), not what is cached: a worker that has dropped it since costs one request
its guess. Of one that was down nothing is remembered when it is up again: most likely it was started anew, and would
draw all of its prompts away from those that have them now. All processes of a router remember the same, and see the
same tokens waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from router.scheduling.hashing import draw
from router.scheduling.homes import Homes
from router.scheduling.marks import Marks
from router.scheduling.request import BYTES_PER_TOKEN, Request
from router.worker import Worker

REQUEST_TOKENS: Final = 64
"""What a request in flight takes of a worker, in tokens to be computed: found with benchmarks/router_policies.py, where
16 is too few and 256 changes little."""


class PrefixCache:
    """``homes``: what is remembered; ``slack``: see above; ``now``: the clock, in seconds."""

    def __init__(self, homes: Homes, slack: float, now: Callable[[], float]) -> None:
        self._homes, self._slack, self._now = homes, slack, now
        self._last: tuple[Marks | None, dict[int, int]] = (None, {})
        """The marks that were looked up last, and what was found: a choice looks twice. Not the request itself, whose
        body may have many MiB: it would live on here where no worker is chosen after all."""

    def score(self, request: Request, candidates: Sequence[Worker]) -> Sequence[float]:
        held = self.held(request)
        return self.grade(request, candidates, [held.get(worker.home, 0) for worker in candidates])

    def grade(self, request: Request, candidates: Sequence[Worker], held: Sequence[int]) -> Sequence[float]:
        """The scores where the candidates have ``held`` tokens of the prompt."""
        prompt = request.prompt_tokens
        costs = []
        for worker, has in zip(candidates, held, strict=True):
            load = worker.load
            rest = prompt - has if has < prompt else 0
            costs.append((load.prefill + rest + REQUEST_TOKENS * load.requests) / worker.share)
        least = min(costs)
        near = [index for index, cost in enumerate(costs) if cost <= least + self._slack * prompt]
        scores = [(least + 1) / (cost + 1) for cost in costs]
        if len(near) > 1 and (marks := request.marks()) is not None and (key := marks.own):
            owner = max(near, key=lambda index: draw(key, candidates[index].seed))
            scores = [score * 0.999 for score in scores]
            scores[owner] = 1.0
        return scores

    def chosen(self, request: Request, worker: Worker) -> None:
        """The request goes there: remember it, and say how much of it has to be computed."""
        held = self.held(request).get(worker.home, 0)
        request.prefill = max(0, request.prompt_tokens - held)
        moment = int(self._now() * 1e6) or 1
        marks = request.marks()
        for mark, _ in () if marks is None else marks.found:
            self._homes.add(mark, worker.home, moment)
        self._last = (None, {})

    def held(self, request: Request) -> dict[int, int]:
        """The prompt's first tokens that workers have seen, by their homes."""
        marks = request.marks()
        last, found = self._last
        if last is marks:
            return found
        found = {}
        for mark, size in () if marks is None else marks.found:
            homes = self._homes.of(mark)
            if not homes:
                break  # nobody has more
            for home in homes:
                found[home] = size // BYTES_PER_TOKEN
        self._last = marks, found
        return found
