"""``/v1/models``: the configured models, described as their workers describe them.

The configuration decides what exists: a model stays listed while its workers are down (a request then gets 503 with
Retry-After, not 404), and what a worker serves besides is not listed, since it can't be asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from router.health import State
from router.workers import Workers

if TYPE_CHECKING:
    from router.admission.admission import Admission
    from router.relay.headers import Headers


class Catalog:
    """Lists the models of the workers."""

    def __init__(self, workers: Workers, aliases: Mapping[str, str]) -> None:
        self._workers, self._aliases = workers, aliases
        self._created = int(time.time())

    def visible(self, headers: Headers, admission: Admission | None) -> Sequence[str]:
        """The names that the sender of these headers (names in lower case) may use. Raises ApiError."""
        return self._workers.models if admission is None else admission.visible(admission.identify(headers))

    def list(self, names: Sequence[str]) -> dict[str, Any]:
        """OpenAI's list object of these models and aliases."""
        return {"object": "list", "data": [self.get(name) for name in names]}

    def get(self, name: str) -> dict[str, Any]:
        """One model's object; an alias is described as its model."""
        model = self._aliases.get(name)
        return self._card(name) if model is None else {**self._card(model), "id": name}

    def _card(self, model: str) -> dict[str, Any]:
        workers = sorted(self._workers.of(model), key=lambda w: w.health.state is not State.UP)
        for worker in workers:
            if model in worker.cards:
                return worker.cards[model]
        return {"id": model, "object": "model", "created": self._created, "owned_by": "helios"}
