"""``/v1/models``: the configured models, described as their workers describe them.

The configuration decides what exists: a model stays listed while its workers are down (a request then gets 503 with
Retry-After, not 404), and what a worker serves besides is not listed, since it can't be asked for.
"""

from __future__ import annotations

import time
from typing import Any

from router.health import State
from router.workers import Workers


class Catalog:
    """Lists the models of the workers."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._created = int(time.time())

    def list(self) -> dict[str, Any]:
        """OpenAI's list object."""
        return {"object": "list", "data": [self._card(model) for model in self._workers.models]}

    def get(self, model: str) -> dict[str, Any] | None:
        """One model's object, or None when it is not configured."""
        return self._card(model) if self._workers.of(model) else None

    def _card(self, model: str) -> dict[str, Any]:
        workers = sorted(self._workers.of(model), key=lambda w: w.health.state is not State.UP)
        for worker in workers:
            if model in worker.cards:
                return worker.cards[model]
        return {"id": model, "object": "model", "created": self._created, "owned_by": "helios"}
