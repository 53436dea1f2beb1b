"""What is expected is acted on: nodes get the model first, then workers come, and both before anybody asks."""

from __future__ import annotations

from typing import Any

from helios.kube.kinds import DEPLOYMENT, NODE, POD, Kind
from orchestrator.deciding.memory import Memory, encode
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL
from orchestrator.reconcile.names import PREFETCH
from orchestrator.reconcile.observed import Answer
from orchestrator.reconcile.reconcilers import Models, Services
from orchestrator.reconcile.site import Site
from orchestrator.scaling.forecast import Forecast
from orchestrator.scaling.settings import ForecastSettings
from tests.support.reconciled import Known, inference_service, settle
from tests.unit.orchestrator.scaling.test_forecast import DAY, HOUR, MONDAY, fed
from tests.unit.orchestrator.test_deciding import SCALING, Here

NINE = MONDAY + 7 * DAY + 9 * HOUR
"""When people begin to ask, on the Monday after the week that was seen."""


class Morning(Here):
    """A cluster with reconcilers that go by what is decided, and a service that has seen a week of office hours."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.now = NINE - 3 * HOUR
        self.another()
        registry = Known()
        registry.answers["org/llama", "main"] = Answer("a" * 40, self.now)
        self.models = Models(Site(), registry, self.deciding)
        self.services = Services(Site(), self.deciding)
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        for name in ("n1", "n2", "n3", "n4"):
            self.cluster.put(NODE, {"metadata": {"name": name, "labels": {}}, "status": ready})
        week = Forecast(ForecastSettings())
        assert fed(week, 7) == MONDAY + 7 * DAY
        quiet = Forecast.decode(week.encode(), ForecastSettings())
        for number in range(int(6 * HOUR / 300)):
            quiet.observe(MONDAY + 7 * DAY + 300.0 * (number + 1), 0, 0)
        text = encode(Memory({}, quiet.encode().decode(), {"both": 1.0}))
        spec = {"targets": {"inFlight": 2}, "forecast": {"mode": mode}}
        one = inference_service(scaling={**SCALING, **spec})
        self.cluster.put(INFERENCE_SERVICE, {**one, "status": {"scaling": text}})
        self.settle()

    def settle(self) -> None:
        self.say(**self.last)
        settle(self.cluster, self.models, "llama", self.now)
        settle(self.cluster, self.services, "chat", self.now)
        settle(self.cluster, self.models, "llama", self.now)

    def until_nine(self) -> list[tuple[int, int]]:
        """Nodes that are to have it and workers, each time one of the two is another number."""
        found: list[tuple[int, int]] = []
        while self.now < NINE - 60:
            self.turns.clear()
            self.after(30)
            if self.turns:
                self.settle()
            if not found or found[-1] != self.seen:
                found.append(self.seen)
        return found

    @property
    def seen(self) -> tuple[int, int]:
        kept = [one for one in self.cluster.all(POD) if PREFETCH in one["metadata"]["labels"]]
        return len(kept), sum(one["spec"]["replicas"] for one in self.cluster.all(DEPLOYMENT))

    last: dict[str, Any] = {}  # noqa: RUF012


def status(morning: Morning, kind: Kind, name: str) -> dict[str, Any]:
    found = morning.cluster.get(kind, "models", name)
    assert found is not None
    return found["status"]


def test_nodes_get_the_model_before_workers_and_workers_come_before_requests():
    morning = Morning("Act")
    assert morning.seen == (0, 0)
    found = morning.until_nine()
    assert found[-1][1] >= 1, "workers are there when people come"
    first = next(index for index, (nodes, _) in enumerate(found) if nodes)
    assert found[first][1] == 0, "nodes get it while no worker is asked for yet"
    fetched = next(one for one in status(morning, MODEL, "llama")["conditions"] if one["type"] == "Prefetched")
    assert fetched["reason"] == "Fetching"
    assert "forecast" in status(morning, INFERENCE_SERVICE, "chat")["roles"]["aggregated"]["reason"]


def test_where_people_say_how_many_there_are_nothing_is_expected():
    morning = Morning("Act")
    morning.until_nine()
    assert morning.seen[0] > 0
    morning.cluster.change(INFERENCE_SERVICE, "chat", {"replicas": 1})
    morning.settle()
    morning.settle()
    assert morning.seen == (0, 1)


def test_a_forecast_that_only_observes_shows_it_and_moves_nothing():
    morning = Morning("Observe")
    assert morning.until_nine() == [(0, 0)]
    shown = morning.deciding.wanted("models", "chat")["both"]
    assert (shown.replicas, bool(shown.forecast)) == (0, True)
