"""When a request of a batch may begin: behind everybody else."""

from __future__ import annotations

from typing import cast

import pytest

from helios.config import AdmissionSettings, BatchSettings, QueueSettings, RouterSettings, WorkerSettings
from helios.metrics import RouterMetrics
from router.admission.admission import Admission, make
from router.batches.service import Room
from router.workers import Workers


class Admitting:
    """An admission where somebody waits for some models."""

    def __init__(self, *models: str) -> None:
        self._models = models

    def stands_for(self, model: str) -> str:
        return model

    def waits(self, model: str) -> bool:
        return model in self._models


@pytest.mark.parametrize(("queue", "most"), [(0, 3), (4, 2), (1, 1), (100, 3)])
def test_a_worker_has_room_while_it_has_little_to_do(queue: int, most: int) -> None:
    settings = RouterSettings(
        workers=[WorkerSettings(model="m", url="http://w:1")], aliases={"a": "m"},
        batches=BatchSettings(per_worker=3), admission=AdmissionSettings(queue=QueueSettings(per_worker=queue)),
    )  # fmt: skip
    workers = Workers(settings.workers, lambda: 0.0)
    room = Room(workers, make(settings, workers, RouterMetrics()), settings)
    leases = []
    while room("m"):
        assert room("a")
        leases.append(workers.lease(workers.of("m")[0]))
    assert len(leases) == most
    assert not room("a")
    leases.pop().end()
    assert room("a")


def test_nobody_is_overtaken_and_the_relay_says_why_nobody_serves() -> None:
    settings = RouterSettings(workers=[WorkerSettings(model=name, url=f"http://{name}:1") for name in ("m", "n")])
    room = Room(Workers(settings.workers, lambda: 0.0), cast(Admission, Admitting("n")), settings)
    assert room("m")
    assert not room("n")
    assert room("unknown")
