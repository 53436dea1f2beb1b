"""How far a model is that no worker serves, and what a client is told of it who does not wait."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from router.errors import ApiError


class Phase(Enum):
    ASKED = "asked"
    """The registry has not answered yet."""
    FETCHING = "fetching"
    WAKING = "waking"
    """All of it is at the registry; a worker is awaited."""
    SERVED = "served"
    FAILED = "failed"
    NOWHERE = "nowhere"
    """The registry can't get it, or may not."""
    RETIRED = "retired"
    """It must not be used any more."""


ENDED: Final = frozenset({Phase.SERVED, Phase.FAILED, Phase.NOWHERE, Phase.RETIRED})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a model is; ``done`` of ``total`` bytes are at the registry (0: not known)."""

    model: str
    phase: Phase = Phase.ASKED
    done: int = 0
    total: int = 0
    reason: str | None = None
    retry_after_s: int = 1

    @property
    def ended(self) -> bool:
        """Whether it is over, well or not."""
        return self.phase in ENDED

    @property
    def text(self) -> str:
        """In words, for a client."""
        if self.phase is Phase.ASKED:
            return "no worker serves it; it is being looked for"
        if self.phase is Phase.FETCHING:
            if not self.total:
                return "it is being fetched"
            share = f"{self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB, {self.done * 100 // self.total}%"
            return f"it is being fetched ({share}{f'; {self.reason}' if self.reason else ''})"
        if self.phase is Phase.WAKING:
            return "a worker for it is being started" + (f" ({self.reason})" if self.reason else "")
        return self.reason or self.phase.value


def refusal(progress: Progress) -> ApiError:
    """What a client is told who does not wait: 503 with Retry-After, 404, or 410."""
    model, kind = progress.model[:200], "service_unavailable_error"
    if progress.phase is Phase.NOWHERE:
        return ApiError(
            404, "model_not_found", f"The model {model!r} does not exist: {progress.text}.", param="model"
        )  # fmt: skip
    if progress.phase is Phase.RETIRED:
        return ApiError(410, "model_retired", f"The model {model!r} is retired: {progress.text}.", param="model")
    code = "model_unavailable" if progress.phase is Phase.FAILED else "model_not_ready"
    message = f"The model {model!r} can't answer yet: {progress.text}."
    return ApiError(503, code, message, kind, param="model", retry_after_s=progress.retry_after_s)
