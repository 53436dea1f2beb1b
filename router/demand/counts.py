"""What one process has counted of a model since it began, as it tells the control process."""

from __future__ import annotations

import msgspec


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """Requests that a revision ("": no worker) had last, and attempts there that were made again ``elsewhere``.
    ``times``: the histogram of first bytes of streams with 200, in ``helios.metrics.LATENCY_S``; ``sum`` in seconds."""

    revision: str
    ok: int
    failed: int
    refused: int
    elsewhere: int
    times: list[int]
    sum: float


class Queued(msgspec.Struct, frozen=True, array_like=True):
    """Requests that wait. ``since``: when the first of them came, by the machine's monotonic clock; ``waking``: no
    worker takes any."""

    requests: int
    tokens: int
    since: float
    waking: bool


class ModelCounts(msgspec.Struct, frozen=True, array_like=True):
    """Everything of one model. ``last_at``: when a request came last, in seconds of the machine's monotonic clock."""

    model: str
    requests: int
    last_at: float
    queued: Queued | None
    ended: list[Ended]
