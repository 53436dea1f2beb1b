"""Turns in the lives of Models and services that are seldom taken."""

from __future__ import annotations

import pytest

from helios.kube.kinds import DEPLOYMENT, NODE, PERSISTENT_VOLUME, POD
from helios.names import RepoId
from helios.node_labels import WHOLE, cached_key
from orchestrator.actions import Key, PatchStatus, Problem, Ref, RemoveFinalizer
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL
from orchestrator.reconcile.observed import Answer, Facts
from tests.support.reconciled import model, settle, turn
from tests.unit.orchestrator.reconcile import test_model as models
from tests.unit.orchestrator.reconcile.test_service import A, World

APART = {"prefill": {}, "decode": {}}


def test_a_service_that_changes_to_a_copy_with_the_same_commit_serves_the_copy():
    """A repository that was renamed, or mirrored under another name, keeps its commits."""
    world = World().settle()
    world.cluster.put(MODEL, model("copy", "org/copy"))
    world.known.answers["org/copy", "main"] = Answer(A, world.now)
    settle(world.cluster, world.models, "copy", world.now)
    world.cluster.change(INFERENCE_SERVICE, "chat", {"model": {"name": "copy"}})
    world.settle()
    (found,) = world.cluster.all(DEPLOYMENT)
    assert found["metadata"]["annotations"]["helios.dev/repo"] == "org/copy"
    assert "org/copy" in found["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("way", ["together", "apart"])
def test_roles_that_change_while_it_sleeps_leave_nothing_of_the_old_ones(way: str):
    before, after = (APART, {"aggregated": {}}) if way == "together" else ({"aggregated": {}}, APART)
    world = World(scaling={"minReplicas": 0}, **before).settle()
    world.wants(0, floor=0)
    world.settle()
    assert set(world.replicas.values()) == {0}
    one = world.cluster.objects[INFERENCE_SERVICE, "models", "chat"]
    world.cluster.put(
        INFERENCE_SERVICE, {**one, "spec": {"model": {"name": "llama"}, "scaling": {"minReplicas": 0}, **after}}
    )
    world.settle()
    world.wants(2)
    world.settle()
    assert {name.split("-")[0] for name in world.replicas} == ({"both"} if way == "together" else {"prefill", "decode"})
    assert world.condition("Ready")[:2] == ("True", "Serving")


def test_roles_that_change_in_the_middle_of_a_rollout_come_to_rest():
    world = World(rollout={"steps": [50, 100], "stepSeconds": 10, "minRequests": 0}).settle()
    world.names("b" * 40)
    world.settle(11)
    assert len(world.status["revisions"]) == 2
    one = world.cluster.objects[INFERENCE_SERVICE, "models", "chat"]
    world.cluster.put(
        INFERENCE_SERVICE, {**one, "spec": {"model": {"name": "llama"}, "rollout": one["spec"]["rollout"], **APART}}
    )
    for _ in range(20):
        world.settle(11)
    assert {one["commit"] for one in world.status["revisions"]} == {"b" * 40}
    assert {name.split("-")[0] for name in world.replicas} == {"prefill", "decode"}


def test_an_end_in_the_middle_of_a_rollout_leaves_nothing():
    world = World(rollout={"steps": [50, 100], "stepSeconds": 10, "minRequests": 0}).settle()
    world.names("b" * 40)
    world.settle(11)
    world.cluster.delete(INFERENCE_SERVICE, "chat")
    assert world.turn() is None
    assert {kind.kind for kind, _, _ in world.cluster.objects} == {"Model"}


def test_least_workers_that_are_raised_while_it_sleeps_come_up():
    world = World(scaling={"minReplicas": 0}).settle()
    world.wants(0, floor=0)
    assert set(world.settle().replicas.values()) == {0}
    world.cluster.change(INFERENCE_SERVICE, "chat", {"scaling": {"minReplicas": 2}})
    assert set(world.settle().replicas.values()) == {2}


def test_a_node_that_has_a_model_or_is_to_have_it_is_a_turn_for_it():
    world = models.World().names(A)
    world.node("n1")
    world.node("n2")

    def turns(name: str) -> list[Key]:
        node = world.cluster.get(NODE, "", name)
        assert node is not None
        return list(world.models.maps[NODE](world.cluster, node))

    assert turns("n1") == []
    world.node("n1", **{cached_key(RepoId.parse("org/llama"), A): WHOLE})
    assert turns("n1") == [Key("models", "llama")], "it is one more of those that have it"
    assert turns("n2") == []
    world.known.expected = 2
    world.settle()
    assert len(world.cluster.all(POD)) == 2
    assert turns("n2") == [Key("models", "llama")], "a node that was chosen for what is expected may go"


def test_what_keeps_a_model_from_going_is_told():
    world = models.World(storage={"volume": "Claim", "storageClassName": "models"}).names(A)
    world.cluster.delete(MODEL, "llama")
    (volume,) = world.cluster.all(PERSISTENT_VOLUME)
    said = "Delete of PersistentVolume x: 403 Forbidden: not yours"
    problem = Problem(Ref(PERSISTENT_VOLUME, "", volume["metadata"]["name"]), "Forbidden", said, 1.0)
    seen = world.models.observe(world.cluster, Key("models", "llama"), world.now, [problem])
    assert seen is not None
    actions = world.models.reconcile(seen).actions
    assert isinstance(actions[-1], RemoveFinalizer), "it goes as soon as that can be done"
    (status,) = [one.status for one in actions if isinstance(one, PatchStatus)]
    (ready,) = [one for one in status["conditions"] if one["type"] == "Ready"]
    assert (ready["status"], ready["reason"]) == ("False", "Forbidden")
    assert said in ready["message"]
    assert turn(world.cluster, world.models, "llama", world.now) is not None
    assert world.cluster.objects == {}


def test_an_approved_commit_that_there_is_not_is_told_and_does_not_count():
    world = models.World(revision={"policy": "Approve"}).names(A)
    world.spec(revision={"policy": "Approve", "approved": "e" * 40})
    assert world.status["commit"] == A, "the registry has not said yet whether there is one"
    assert world.condition("Resolved")[:2] == ("Unknown", "Resolving")
    world.known.of_commits["org/llama", "e" * 40] = Facts(0, None, "NotFound", "there is no such commit")
    world.spec(revision={"policy": "Approve", "approved": "e" * 40})
    assert world.status["commit"] == A, "what serves goes on"
    status, reason, message = world.condition("Resolved")
    assert (status, reason) == ("Unknown", "NotFound")
    assert message.startswith("spec.revision.approved: there is no such commit")
    world.known.of_commits["org/llama", "e" * 40] = Facts(0, None, "RegistryUnreachable", "down")
    assert world.settle().status["commit"] == "e" * 40, "nobody says that it isn't there"


def test_who_signed_it_can_t_be_asked_is_told_and_is_not_that_nobody_did():
    world = models.World(revision={"requireVerified": True})
    world.known.of_commits["org/llama", A] = Facts(0, None, "RegistryUnreachable", "http://r:8470 does not answer")
    world.names(A)
    assert world.condition("Ready")[:2] == ("False", "RegistryUnreachable")
    assert "http://r:8470 does not answer" in world.condition("Verified")[2]
    assert "sizeBytes" not in world.status
    world.known.of_commits["org/llama", A] = Facts(7, "me@example.com")
    assert world.settle().condition("Ready")[:2] == ("True", "Ready")
