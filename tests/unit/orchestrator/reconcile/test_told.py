"""What people are told of a service: in `kubectl get`, in conditions and events."""

from __future__ import annotations

from typing import Any

from helios.kube.kinds import POD, SERVICE
from orchestrator.actions import Problem, Ref
from orchestrator.reconcile.kinds import INFERENCE_SERVICE
from orchestrator.reconcile.observed import Health, Wanted
from tests.unit.orchestrator.reconcile.test_service import A, B, World


def pods(world: World, count: int, **status: Any) -> None:
    """So many of its pods are in this state."""
    for one in world.cluster.all(POD)[:count]:
        one["status"] = status
    world.turn()


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}, **more}]}


def test_a_service_that_was_stopped_by_hand_does_not_say_that_a_request_wakes_it():
    world = World(replicas=0).settle()
    status, reason, message = world.condition("Ready")
    assert (status, reason) == ("False", "Stopped")
    assert "spec.replicas is 0" in message
    assert (world.status["replicas"], world.status["readyReplicas"]) == (0, 0), "a column that is empty says nothing"
    world.cluster.change(INFERENCE_SERVICE, "chat", {"replicas": None, "scaling": {"minReplicas": 0}})
    world.wants(0, floor=0)
    assert world.settle().condition("Ready")[:2] == ("True", "Asleep")


def test_an_image_that_is_missing_is_told_while_others_serve():
    world = World().settle()
    gone = {"type": "Ready", "status": "False", "lastTransitionTime": "2026-12-01T12:00:00Z"}
    pods(world, 1, **waiting("ImagePullBackOff", "not found"), conditions=[gone])
    assert world.condition("Ready")[:2] == ("True", "Serving")
    status, reason, message = world.condition("Progressing")
    assert (status, reason) == ("False", "ImageMissing")
    assert "spec.engine.image" in message
    assert "since 2026-12-01T12:00:00Z" in message
    assert [one.reason for one in world.cluster.events].count("ImageMissing") == 1
    assert (world.status["replicas"], world.status["readyReplicas"]) == (2, 1)
    world.settle()
    assert world.condition("Progressing")[1] == "Complete"


def test_a_new_commit_whose_workers_crash_says_so_before_it_is_given_up():
    world = World().settle()
    world.cluster.dead.add(B)
    world.names(B)
    world.settle(1)
    for one in world.cluster.all(POD):
        if one["metadata"]["labels"]["helios.dev/revision"] == B:
            last = {"reason": "OOMKilled", "exitCode": 137, "message": "torch: out of memory\n"}
            one["status"] = waiting("CrashLoopBackOff", "back-off 5m0s", lastState={"terminated": last})
    world.turn()
    status, reason, message = world.condition("Progressing")
    assert (status, reason) == ("True", "RollingOut")
    for word in ("come up", "back-off 5m0s", "OOMKilled, exit code 137: torch: out of memory", "kubectl logs"):
        assert word in message


def test_what_was_wrong_with_a_commit_is_told_as_long_as_it_is_refused():
    world = World(rollout={"steps": [50, 100], "stepSeconds": 10, "minRequests": 5}).settle()
    world.names(B)
    world.settle(1)
    world.healthy(a=Health(100, 0.0), b=Health(100, 40.0))
    for _ in range(6):
        world.settle(11)
    status, reason, message = world.condition("Progressing")
    assert (status, reason) == ("False", "RolledBack")
    assert "40.0% of its requests fail" in message
    assert world.status["refusedWhy"]
    world.names(A)
    for _ in range(3):
        world.settle(11)
    assert "refusedWhy" not in world.status


def test_what_a_worker_that_starts_is_at_is_told_with_since_when():
    world = World()
    world.turn()
    world.cluster.controllers(ready=False)
    pods(world, 1, **waiting("ContainerCreating"), startTime="2026-12-01T12:00:00Z")
    message = world.condition("Ready")[2]
    assert "its volumes and its container, since 2026-12-01T12:00:00Z" in message
    assert "kubectl describe pod" in message
    pods(world, 1, containerStatuses=[{"state": {"running": {"startedAt": "2026-12-01T12:01:00Z"}}}])
    assert "its engine starts, since 2026-12-01T12:01:00Z" in world.condition("Ready")[2]


def test_who_else_answers_for_the_same_name_is_told():
    world = World().settle()
    world.known.by_role = {"both": Wanted(2, 1, "load", others=2)}
    status, _, message = world.settle().condition("ScalingActive")
    assert status == "True"
    assert "2 more answer for the same name" in message


def test_what_the_api_server_refused_is_named_once():
    world = World()
    said = "Apply of Service models/chat: 422 Invalid: spec.ports: Required value"
    world.turn(problems=[Problem(Ref(SERVICE, "models", "chat"), "Invalid", said, 1.0)])
    assert world.condition("Progressing")[2] == f"{said}, since 1970-01-01T00:00:01Z"
