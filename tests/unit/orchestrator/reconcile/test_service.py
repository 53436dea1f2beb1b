"""A service's life: it comes up, scales, sleeps and wakes, moves to another commit, says what is wrong, and goes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from helios.kube.kinds import AUTOSCALER, DEPLOYMENT, POD, SERVICE
from orchestrator.actions import Apply, Problem, Ref, Scale
from orchestrator.api.common import FINALIZER
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL, SCALED_OBJECT
from orchestrator.reconcile.observed import Answer, Health, Wanted
from orchestrator.reconcile.reconcilers import Models, Services
from orchestrator.reconcile.site import Site
from tests.support.reconciled import Cluster, Known, inference_service, model, settle, turn

A, B = "a" * 40, "b" * 40
APART: dict[str, Any] = {"prefill": {}, "decode": {}}
HPA = Site(external_metrics=True)


class World:
    """A cluster with a Model and a service of it."""

    def __init__(self, site: Site | None = None, **spec: Any) -> None:
        self.cluster, self.known, self.now = Cluster(), Known(), 1000.0
        site = site or Site()
        self.models, self.services = Models(site, self.known, self.known), Services(site, self.known)
        self.cluster.put(MODEL, model(revision={"policy": "Follow"}))
        self.names(A)
        self.wants(2)
        self.cluster.put(INFERENCE_SERVICE, inference_service(**spec))
        self.cluster.events.clear()

    def names(self, commit: str) -> None:
        """What the Model's revision names from now on."""
        self.known.answers["org/llama", "main"] = Answer(commit, self.now)
        settle(self.cluster, self.models, "llama", self.now)

    def wants(self, count: int, floor: int = 1) -> None:
        self.known.by_role = {role: Wanted(count, floor, "load") for role in ("both", "prefill", "decode")}

    def healthy(self, **commits: Health) -> None:
        self.known.by_commit = {{"a": A, "b": B}[name]: health for name, health in commits.items()}

    def settle(self, seconds: float = 0.0) -> World:
        self.now += seconds
        settle(self.cluster, self.services, "chat", self.now)
        return self

    def turn(self, **more: Any) -> Any:
        return turn(self.cluster, self.services, "chat", self.now, **more)

    @property
    def replicas(self) -> dict[str, int]:
        found = self.cluster.all(DEPLOYMENT)
        return {one["metadata"]["name"].removeprefix("chat-"): one["spec"]["replicas"] for one in found}

    @property
    def weights(self) -> dict[str, str]:
        labels = [one["metadata"]["labels"] for one in self.cluster.all(SERVICE)]
        return {
            f"{one['helios.dev/role']}-{one['helios.dev/revision'][:1]}": one["helios.dev/weight"]
            for one in labels
            if "helios.dev/weight" in one
        }

    @property
    def status(self) -> dict[str, Any]:
        found = self.cluster.get(INFERENCE_SERVICE, "models", "chat")
        assert found is not None
        return found["status"]

    def condition(self, kind: str) -> tuple[str, str, str]:
        (one,) = [one for one in self.status["conditions"] if one["type"] == kind]
        return one["status"], one["reason"], one["message"]


def test_it_comes_up_and_rests():
    world = World().settle()
    assert world.replicas == {f"both-{A[:10]}": 2}
    assert world.condition("Ready")[:2] == ("True", "Serving")
    assert (world.status["commit"], world.status["replicas"]) == (A, 2)
    assert world.status["selector"] == "helios.dev/role=both,helios.dev/service=chat"
    assert world.status["roles"]["aggregated"] == {"replicas": 2, "ready": 2, "desired": 2, "reason": "load"}
    outcome = world.turn()
    assert {type(one) for one in outcome.actions} == {Apply}, "what is so already is all that is said"
    assert outcome.requeue_after_s is None


def test_the_operator_scales_and_puts_back_what_others_change():
    world = World().settle()
    world.wants(4)
    assert world.settle().replicas == {f"both-{A[:10]}": 4}
    world.cluster.all(DEPLOYMENT)[0]["spec"]["replicas"] = 1
    assert world.settle().replicas == {f"both-{A[:10]}": 4}


def test_an_autoscaler_is_left_alone_between_one_and_the_most_and_its_floor_is_raised():
    world = World(site=HPA).settle()
    world.cluster.all(DEPLOYMENT)[0]["spec"]["replicas"] = 3
    assert world.settle().replicas == {f"both-{A[:10]}": 3}
    world.wants(3, floor=2)
    world.settle()
    assert world.cluster.all(AUTOSCALER)[0]["spec"]["minReplicas"] == 2


@pytest.mark.parametrize("by", ["Operator", "HPA", "KEDA"])
def test_only_the_operator_wakes_and_puts_to_sleep(by: str):
    site = Site(external_metrics=True, keda_scaler="operator:9090")
    world = World(site=site, scaling={"minReplicas": 0, "by": by}, **APART)
    world.wants(0)
    assert world.settle().replicas == {}, "nothing was ever asked for: nothing is made to run"
    assert world.condition("Ready")[:2] == ("True", "Asleep")
    world.wants(3)
    assert set(world.settle().replicas.values()) == {3}
    world.wants(0, floor=0)
    world.settle()
    assert set(world.replicas.values()) == {0}
    if by == "KEDA":
        paused = world.cluster.all(SCALED_OBJECT)[0]["metadata"]["annotations"]
        assert paused == {"autoscaling.keda.sh/paused": "true"}
    world.wants(1)
    assert set(world.settle().replicas.values()) == {1}
    assert [one.reason for one in world.cluster.events if one.reason in ("Waking", "FallingAsleep")] == [
        "FallingAsleep", "Waking",
    ]  # fmt: skip


def test_a_role_that_sleeps_wakes_with_the_other_one():
    world = World(scaling={"minReplicas": 0}, **APART)
    world.known.by_role = {"prefill": Wanted(0, 0), "decode": Wanted(2)}
    assert sorted(world.settle().replicas.values()) == [1, 2]


def test_requests_move_to_a_new_commit_by_steps_and_the_old_one_goes():
    world = World(**APART, rollout={"stepSeconds": 60, "minRequests": 1}).settle()
    world.names(B)
    world.wants(4)
    world.healthy(a=Health(50, 0.0, 100.0), b=Health(50, 0.0, 100.0, 0))
    world.settle()
    assert world.weights == {"prefill-a": "22.5", "prefill-b": "5", "decode-a": "22.5", "decode-b": "5"}
    assert world.condition("Progressing")[:2] == ("True", "RollingOut")
    assert world.condition("Ready")[0] == "True"
    assert world.settle(61).weights["decode-b"] == "12.5", "four workers have a half, for what comes next"
    assert world.settle(61).weights["decode-b"] == "25"
    assert world.status["revisions"][-1]["weight"] == 100
    world.settle(130)
    assert world.weights == {"prefill-b": "1", "decode-b": "1"}
    assert world.replicas == {f"prefill-{B[:10]}": 4, f"decode-{B[:10]}": 4}
    assert world.condition("Progressing")[1] == "Complete"
    reasons = [one.reason for one in world.cluster.events if one.reason.startswith("Rollout")]
    assert reasons == ["RolloutStarted", "RolloutStep", "RolloutStep", "RolloutCompleted"]


def test_a_commit_that_fails_is_rolled_back_and_not_tried_again():
    world = World(rollout={"stepSeconds": 60, "minRequests": 1}).settle()
    world.names(B)
    world.healthy(a=Health(50, 0.0, 100.0), b=Health(50, 40.0, 100.0))
    world.settle()
    assert (world.status["refused"], world.status["commit"]) == (B, A)
    world.settle(130)
    assert world.replicas == {f"both-{A[:10]}": 2}
    status, reason, message = world.condition("Progressing")
    assert (status, reason) == ("False", "RolledBack")
    assert B[:10] in message
    assert world.condition("Ready")[0] == "True"


def test_a_commit_that_does_not_start_leaves_the_old_one_serving():
    world = World(rollout={"progressDeadlineSeconds": 900}).settle()
    world.cluster.dead.add(B)
    world.names(B)
    world.settle()
    assert world.weights == {"both-a": "50", "both-b": "0"}
    world.settle(901)
    world.settle(130)
    assert world.replicas == {f"both-{A[:10]}": 2}


def test_another_model_comes_as_another_commit_does_and_the_old_workers_stay_what_they_are():
    world = World(rollout={"stepSeconds": 60, "minRequests": 0}).settle()
    world.cluster.put(MODEL, model("other", "org/other"))
    world.known.answers["org/other", "main"] = Answer(B, 1000.0)
    settle(world.cluster, world.models, "other", world.now)
    world.cluster.change(INFERENCE_SERVICE, "chat", {"model": {"name": "other"}})
    world.settle()
    repos = {}
    for one in world.cluster.all(DEPLOYMENT):
        (volume,) = [one for one in one["spec"]["template"]["spec"]["volumes"] if one["name"] == "model"]
        repos[one["metadata"]["labels"]["helios.dev/revision"]] = volume["csi"]["volumeAttributes"]["model"]
    assert repos == {A: "org/llama", B: "org/other"}
    for _ in range(5):
        world.settle(61)
    assert world.replicas == {f"both-{B[:10]}": 2}


def test_an_operator_that_has_just_begun_keeps_what_was_wanted_last():
    world = World().settle()
    world.wants(3)
    world.settle()
    world.known.by_role = {}
    world.names(B)
    for _ in range(3):
        world.settle()
    assert world.status["roles"]["aggregated"]["desired"] == 3
    assert world.condition("ScalingActive")[:2] == ("Unknown", "Starting")


def test_a_split_stays():
    world = World(traffic=[{"commit": A, "weight": 75}, {"commit": B, "weight": 25}]).settle()
    assert [(one["commit"], one["weight"]) for one in world.status["revisions"]] == [(A, 75), (B, 25)]
    world.cluster.change(INFERENCE_SERVICE, "chat", {"traffic": [{"commit": A, "weight": 100}]})
    world.settle()
    world.settle(130)
    assert world.replicas == {f"both-{A[:10]}": 2}


def test_other_roles_take_over_before_the_old_ones_go():
    world = World().settle()
    spec = world.cluster.objects[INFERENCE_SERVICE, "models", "chat"]["spec"]
    del spec["aggregated"]
    world.cluster.change(INFERENCE_SERVICE, "chat", {"prefill": {}, "decode": {}})
    world.turn()
    assert set(world.replicas) == {f"{role}-{A[:10]}" for role in ("both", "prefill", "decode")}
    world.settle()
    assert set(world.replicas) == {f"{role}-{A[:10]}" for role in ("prefill", "decode")}


def pod(world: World, **status: Any) -> None:
    world.turn()
    world.cluster.controllers(ready=False)
    for one in world.cluster.all(POD):
        one["status"] = status


WAITING = "containerStatuses"


@pytest.mark.parametrize(
    ("status", "kind", "reason", "words"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                             "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}]},
            "Scheduled", "Unschedulable", ("Insufficient nvidia.com/gpu", "accelerator"),
        ),
        (
            {WAITING: [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}}]},
            "Available", "ImageMissing", ("Back-off pulling", "spec.engine.image"),
        ),
        (
            {WAITING: [{"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "restarting failed"}}}]},
            "Available", "CrashLoop", ("restarting failed", "kubectl logs"),
        ),
        ({WAITING: [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, "Available", "Starting", ("start",)),
    ],
)  # fmt: skip
def test_what_keeps_pods_from_running_is_said(status: Any, kind: str, reason: str, words: tuple[str, ...]):
    world = World()
    pod(world, **status)
    world.turn()
    found = world.condition(kind)
    assert found[:2] == ("False", reason)
    for word in words:
        assert word in found[2]
    assert world.condition("Ready")[:2] == ("False", reason)
    told = [one.reason for one in world.cluster.events]
    assert told == ([] if reason == "Starting" else [reason])
    world.turn()
    assert [one.reason for one in world.cluster.events] == told, "told once"


def test_a_quota_that_is_used_up_is_said():
    world = World()
    world.turn()
    refused = 'pods "chat-x" is forbidden: exceeded quota: gpus, requested: 1, used: 8, limited: 8'
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": refused}
    world.cluster.all(DEPLOYMENT)[0]["status"] = {"conditions": [failure]}
    world.turn()
    assert world.condition("Ready")[:2] == ("False", "QuotaExceeded")
    assert "limited: 8" in world.condition("Scheduled")[2]


def test_what_can_t_be_done_is_said():
    world = World()
    problem = Problem(Ref(SERVICE, "models", "chat"), "NotOwned", "a Service of this name is somebody else's", 1.0)
    world.turn(problems=[problem])
    assert world.condition("Progressing")[1:] == (
        "NotOwned", "Service models/chat: a Service of this name is somebody else's, since 1970-01-01T00:00:01Z",
    )  # fmt: skip
    assert world.condition("Ready")[:2] == ("False", "NotOwned")


def test_a_model_that_is_not_there_or_has_no_commit_is_waited_for():
    world = World()
    del world.cluster.objects[MODEL, "models", "llama"]
    world.settle()
    assert world.condition("Ready")[:2] == ("False", "ModelNotFound")
    world.cluster.put(MODEL, model())
    world.known.answers.clear()
    settle(world.cluster, world.models, "llama", 1000.0)
    world.settle()
    assert world.condition("Ready")[:2] == ("False", "Resolving")
    assert world.cluster.all(DEPLOYMENT) == []
    world.names(A)
    assert world.settle().condition("Ready")[0] == "True"


def test_a_registry_that_is_down_stops_nothing():
    world = World().settle()
    down = Answer(None, 900.0, "RegistryUnreachable", "http://registry:8470 does not answer", 990.0)
    world.known.answers["org/llama", "main"] = down
    settle(world.cluster, world.models, "llama", 1000.0)
    assert world.settle().condition("Ready")[0] == "True"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"aggregated": {}, "prefill": {}}, "aggregated excludes prefill and decode"),
        ({"prefill": {}}, "prefill needs decode"),
        ({**APART, "engine": {"connector": "none"}}, "engine.connector is none"),
        ({**APART, "engine": {"connector": "shared-storage"}}, "engine.kvStorage is missing"),
        ({"aggregated": {"cpus": 3}}, "cpus"),
    ],
)
def test_a_spec_that_can_t_be_is_refused_with_its_field_and_what_serves_goes_on(spec: dict[str, Any], words: str):
    world = World().settle()
    found = world.cluster.objects[INFERENCE_SERVICE, "models", "chat"]
    world.cluster.put(INFERENCE_SERVICE, {**found, "spec": {"model": {"name": "llama"}, **spec}})
    world.settle()
    status, reason, message = world.condition("Ready")
    assert (status, reason) == ("False", "Invalid")
    assert words in message
    assert world.replicas == {f"both-{A[:10]}": 2}
    assert world.status["revisions"][0]["commit"] == A


def test_scaling_that_goes_by_nothing_is_said():
    world = World()
    world.known.by_role = {"both": Wanted(2, 1, signals=False)}
    assert world.settle().condition("ScalingActive")[:2] == ("False", "NoSignals")


def test_kubectl_scale_wins_over_everything_until_it_is_taken_back():
    world = World(site=HPA, **APART).settle()
    world.cluster.change(INFERENCE_SERVICE, "chat", {"replicas": 3})
    world.settle()
    assert world.replicas == {f"decode-{A[:10]}": 3, f"prefill-{A[:10]}": 2}
    assert world.cluster.all(AUTOSCALER) == []
    assert world.condition("ScalingActive")[:2] == ("False", "Fixed")
    world.cluster.change(INFERENCE_SERVICE, "chat", {"replicas": 0})
    world.wants(4)
    assert set(world.settle().replicas.values()) == {0}, "no request wakes it"
    world.cluster.change(INFERENCE_SERVICE, "chat", {"replicas": None})
    assert set(world.settle().replicas.values()) == {4}


def test_who_scales_is_said_and_what_isn_t_there_can_t():
    assert World(site=HPA).settle().condition("ScalingActive")[1] == "ByHPA"
    world = World(scaling={"by": "KEDA"}).settle()
    assert world.condition("ScalingActive")[1] == "ByOperator"
    assert "spec.scaling.by: KEDA" in world.condition("ScalingActive")[2]


def test_a_status_that_makes_no_sense_begins_anew():
    world = World().settle()
    world.cluster.objects[INFERENCE_SERVICE, "models", "chat"]["status"] = {"revisions": "none", "conditions": []}
    world.settle()
    assert world.status["revisions"][0]["weight"] == 100


def test_its_end_leaves_nothing_also_with_the_finalizer_of_another_version():
    world = World(**APART).settle()
    world.cluster.objects[INFERENCE_SERVICE, "models", "chat"]["metadata"]["finalizers"] = [FINALIZER]
    world.cluster.delete(INFERENCE_SERVICE, "chat")
    world.turn()
    world.cluster.controllers()
    assert {kind for kind, _, _ in world.cluster.objects} == {MODEL}
    world = World(**APART).settle()
    world.cluster.delete(INFERENCE_SERVICE, "chat")
    world.cluster.controllers()
    assert {kind for kind, _, _ in world.cluster.objects} == {MODEL}


def test_workers_come_before_weights_change_and_go_behind_that():
    world = World(rollout={"stepSeconds": 1, "minRequests": 0}).settle()
    world.wants(4)
    world.settle()
    world.names(B)
    world.healthy(a=Health(50, 0.0, 100.0), b=Health(50, 0.0, 100.0))
    seen = set()
    for _ in range(20):
        world.now += 11
        before = {f"chat-{name}": count for name, count in world.replicas.items()}
        actions = world.turn().actions
        world.cluster.controllers()
        weights = [at for at, one in enumerate(actions) if isinstance(one, Apply) and one.kind == SERVICE]
        for at, one in enumerate(actions):
            if isinstance(one, Scale):
                more = one.replicas > before.get(one.ref.name, 0)
                seen.add(more)
                assert at < weights[-1] if more else at > weights[-1]
    assert seen == {True, False}
    assert world.replicas == {f"both-{B[:10]}": 4}


@settings(max_examples=8, deadline=None, phases=(Phase.reuse, Phase.generate))
@given(cuts=st.lists(st.integers(0, 20), max_size=25), apart=st.booleans(), bad=st.booleans())
def test_killed_at_any_action_the_next_one_ends_where_this_one_would(cuts: list[int], apart: bool, bad: bool):
    """Everything but times is the same as without kills."""
    ends = []
    for kills in ([], cuts):
        spec = {"rollout": {"stepSeconds": 60, "minRequests": 1}, **(APART if apart else {})}
        world = World(**spec)
        steps = iter(kills)
        for phase in range(3):
            if phase == 1:
                world.names(B)
                world.healthy(a=Health(50, 0.0, 100.0), b=Health(50, 40.0 if bad else 0.0, 100.0))
            for cut in [cut for _, cut in zip(range(8), steps, strict=False)]:
                world.turn(most=cut)
                world.cluster.controllers()
            for _ in range(6):
                world.settle(130)
        objects = {
            place: (one.get("spec"), one["metadata"].get("labels"))
            for place, one in world.cluster.objects.items()
            if place[0] not in (POD, MODEL)
        }
        ends.append((objects, world.status["commit"], world.status.get("refused"), world.replicas))
    assert ends[0] == ends[1]


def test_scale_is_only_said_where_it_changes_something():
    world = World().settle()
    assert not [one for one in world.turn().actions if isinstance(one, Scale)]
