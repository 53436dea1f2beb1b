"""A Model: which commit counts and when that changes, who vouches for it, where it is, and that it always can go."""

from __future__ import annotations

from typing import Any

import pytest

from helios.kube.kinds import NODE, PERSISTENT_VOLUME, PERSISTENT_VOLUME_CLAIM, POD
from helios.names import RepoId
from helios.node_labels import PART, WHOLE, cached_key
from orchestrator.actions import PatchStatus
from orchestrator.api.common import FINALIZER
from orchestrator.api.model import Prefetch
from orchestrator.reconcile.kinds import INFERENCE_SERVICE, MODEL
from orchestrator.reconcile.observed import Answer, Facts, NodeSeen
from orchestrator.reconcile.prefetch import orders
from orchestrator.reconcile.reconcilers import Models, Services
from orchestrator.reconcile.site import Site
from tests.support.kube_schemas import validate
from tests.support.reconciled import Cluster, Known, inference_service, model, settle, turn

A, B, C = "a" * 40, "b" * 40, "c" * 40
DOWN = Answer(None, 1000.0, "RegistryUnreachable", "http://registry:8470 does not answer", 1200.0)


class World:
    def __init__(self, **spec: Any) -> None:
        self.cluster, self.known, self.now = Cluster(), Known(), 1000.0
        self.cluster.check = validate
        self.models = Models(Site(), self.known, self.known)
        self.cluster.put(MODEL, model(**spec))

    def names(self, commit: str | Answer | None) -> World:
        self.now += 10
        answer = Answer(commit, self.now) if isinstance(commit, str) else commit
        if answer is None:
            self.known.answers.clear()
        else:
            self.known.answers["org/llama", "main"] = answer
        return self.settle()

    def settle(self) -> World:
        settle(self.cluster, self.models, "llama", self.now)
        return self

    def spec(self, **change: Any) -> World:
        self.cluster.change(MODEL, "llama", change)
        return self.settle()

    def node(self, name: str, **labels: str) -> None:
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        self.cluster.put(NODE, {"metadata": {"name": name, "labels": labels}, "status": ready})

    @property
    def status(self) -> dict[str, Any]:
        found = self.cluster.get(MODEL, "models", "llama")
        assert found is not None
        return found["status"]

    def condition(self, kind: str) -> tuple[str, str, str]:
        (one,) = [one for one in self.status["conditions"] if one["type"] == kind]
        return one["status"], one["reason"], one["message"]


def test_pinned_keeps_the_commit_that_the_revision_named_first():
    world = World().names(A).names(B)
    assert (world.status["commit"], world.status["candidate"], world.status["revision"]) == (A, B, "main")
    world.known.answers["org/llama", "v2"] = Answer(C, world.now)
    assert world.spec(revision={"revision": "v2"}).status["commit"] == C


def test_follow_goes_with_the_revision():
    world = World(revision={"policy": "Follow"}).names(A).names(B)
    assert world.status["commit"] == B
    assert "candidate" not in world.status
    resolved = [one.message for one in world.cluster.events if one.reason == "Resolved"]
    assert resolved == [f"commit {A} counts", f"commit {B} counts, before it {A[:10]}"]


def test_approve_shows_a_candidate_and_waits():
    world = World(revision={"policy": "Approve"}).names(A).names(B)
    assert (world.status["commit"], world.status["candidate"]) == (A, B)
    world.known.of_commits["org/llama", B] = Facts(7)
    world.spec(revision={"policy": "Approve", "approved": B})
    assert world.status["commit"] == B
    world.names(C)
    assert (world.status["commit"], world.status["candidate"]) == (B, C)


def test_a_revision_that_can_t_be_resolved_yet_keeps_what_counts():
    world = World().names(A)
    world.spec(revision={"revision": "v2"})
    assert world.status["commit"] == A
    assert world.condition("Resolved")[:2] == ("Unknown", "Resolving")


@pytest.mark.parametrize(("answer", "reason"), [(None, "Resolving"), (DOWN, "RegistryUnreachable")])
def test_without_a_commit_it_says_what_is_waited_for(answer: Answer | None, reason: str):
    world = World().names(answer)
    assert world.condition("Ready")[:2] == ("False", reason)
    if answer is not None:
        assert "does not answer; since 1970-01-01T00:20:00Z" in world.condition("Ready")[2]
        assert [one.reason for one in world.cluster.events] == [reason]


def test_a_registry_that_goes_away_is_a_condition_and_what_counts_goes_on():
    world = World(revision={"policy": "Follow"}).names(A).names(DOWN)
    status, reason, message = world.condition("Resolved")
    assert (status, reason) == ("Unknown", "RegistryUnreachable")
    assert f"commit {A[:10]} counts on" in message
    assert world.condition("Ready")[:2] == ("True", "Ready")
    pinned = World().names(A).names(DOWN)
    assert pinned.condition("Resolved")[0] == "True", "it needs nobody"


def test_only_a_signed_commit_counts_where_that_is_required():
    world = World(revision={"policy": "Follow", "requireVerified": True})
    world.names(A)
    assert world.condition("Ready")[:2] == ("False", "Verifying")
    world.known.of_commits["org/llama", A] = Facts(10, "me@example.com")
    assert world.settle().status["commit"] == A
    assert world.condition("Verified")[:2] == ("True", "Signed")
    world.known.of_commits["org/llama", B] = Facts(10)
    world.names(B)
    assert world.status["commit"] == A
    assert world.condition("Verified")[:2] == ("False", "NotVerified")
    assert f"commit {A[:10]} counts on" in world.condition("Verified")[2]
    assert world.condition("Ready")[0] == "True"


def test_size_and_rest():
    world = World()
    world.known.of_commits["org/llama", A] = Facts(123)
    world.names(A)
    assert world.status["sizeBytes"] == 123
    world.known.answers["org/llama", "main"] = Answer(A, world.now + 60)
    outcome = turn(world.cluster, world.models, "llama", world.now + 60)
    assert outcome is not None
    assert list(outcome.actions) == [], "asked again, and nothing new"


def test_nodes_get_it_and_are_counted():
    world = World(prefetch={"nodes": 2, "selector": {"gpu": "h100"}})
    for number in range(4):
        world.node(f"n{number}", gpu="h100" if number else "a100")
    world.names(A)
    chosen = {pod["metadata"]["annotations"]["helios.dev/prefetch-node"] for pod in world.cluster.all(POD)}
    assert len(chosen) == 2
    assert "n0" not in chosen
    assert world.condition("Prefetched")[:2] == ("False", "Fetching")
    assert world.condition("Ready")[0] == "True", "pods need not wait for it"
    key = cached_key(RepoId.parse("org/llama"), A)
    first, second = sorted(chosen)
    world.node(first, gpu="h100", **{key: WHOLE})
    world.node(second, gpu="h100", **{key: PART})
    world.settle()
    assert world.condition("Prefetched")[2].startswith("1 of 2 nodes have it")
    world.node(second, gpu="h100", **{key: WHOLE})
    world.settle()
    assert world.condition("Prefetched")[:2] == ("True", "Prefetched")
    assert world.status["nodesCached"] == 2


def test_a_node_that_goes_is_replaced_and_one_that_comes_moves_nothing():
    world = World(prefetch={"nodes": 2})
    for number in range(3):
        world.node(f"n{number}")
    world.names(A)
    before = {pod["metadata"]["name"] for pod in world.cluster.all(POD)}
    world.node("new")
    world.settle()
    assert {pod["metadata"]["name"] for pod in world.cluster.all(POD)} == before
    gone = world.cluster.all(POD)[0]["metadata"]["annotations"]["helios.dev/prefetch-node"]
    del world.cluster.objects[NODE, "", gone]
    world.settle()
    after = {pod["metadata"]["name"] for pod in world.cluster.all(POD)}
    assert len(after) == 2
    assert len(after & before) == 1
    world.cluster.all(POD)[0]["status"] = {"phase": "Failed", "reason": "Evicted"}
    world.settle()
    assert {(pod.get("status") or {}).get("phase") for pod in world.cluster.all(POD)} == {None}


def test_expected_workers_have_nodes_get_it_and_nobody_knowing_takes_none_away():
    world = World()
    for number in range(4):
        world.node(f"n{number}")
    world.names(A)
    assert world.cluster.all(POD) == []
    world.known.expected = 2
    world.settle()
    chosen = [pod["metadata"]["name"] for pod in world.cluster.all(POD)]
    assert len(chosen) == 2
    world.known.expected = None
    world.settle()
    assert [pod["metadata"]["name"] for pod in world.cluster.all(POD)] == chosen
    world.known.expected = 9
    world.settle()
    assert len(world.cluster.all(POD)) == 4, "no more than there are nodes"
    world.known.expected = 0
    world.settle()
    assert world.cluster.all(POD) == []


def test_too_few_nodes_are_said():
    world = World(prefetch={"nodes": 2})
    world.node("one")
    assert world.names(A).condition("Prefetched")[:2] == ("False", "TooFewNodes")


def test_orders_spread_models_over_nodes():
    nodes = [NodeSeen(f"n{number}", {}) for number in range(10)]
    found = [orders(nodes, Prefetch(nodes=1), "org/m", f"{number:040x}")[0].node for number in range(40)]
    assert len(set(found)) > 5
    assert orders([NodeSeen("n", {}, usable=False)], Prefetch(nodes=1), "org/m", A) == []


def test_claims_are_made_for_each_commit_in_use_and_go_with_it():
    world = World(revision={"policy": "Follow"}, storage={"volume": "Claim", "storageClassName": "models"}).names(A)
    world.cluster.put(INFERENCE_SERVICE, inference_service())
    services = Services(Site(), world.known)
    settle(world.cluster, services, "chat", world.now)
    world.names(B)
    names = [one["metadata"]["name"] for one in world.cluster.all(PERSISTENT_VOLUME_CLAIM)]
    assert [name[:16] for name in names] == [f"llama-{A[:10]}", f"llama-{B[:10]}"], "the service still runs the first"
    world.cluster.delete(INFERENCE_SERVICE, "chat")
    world.settle()
    assert [one["metadata"]["name"] for one in world.cluster.all(PERSISTENT_VOLUME_CLAIM)] == [names[1]]
    assert len(world.cluster.all(PERSISTENT_VOLUME)) == 1


def test_what_can_t_be_changed_in_a_volume_makes_another_one():
    world = World(storage={"volume": "Claim", "storageClassName": "models"}, prefetch={"nodes": 1})
    world.node("one")
    world.names(A)
    kinds = (PERSISTENT_VOLUME, PERSISTENT_VOLUME_CLAIM, POD)
    before = [world.cluster.all(kind)[0]["metadata"]["name"] for kind in kinds]
    world.spec(priority="scratch")
    after = [[one["metadata"]["name"] for one in world.cluster.all(kind)] for kind in kinds]
    assert [len(names) for names in after] == [1, 1, 1]
    assert not set(before) & {name for names in after for name in names}


def test_it_stays_while_services_use_it_and_goes_then_whatever_the_registry_says():
    world = World(storage={"volume": "Claim", "storageClassName": "models"}).names(A)
    assert world.cluster.all(MODEL)[0]["metadata"]["finalizers"] == [FINALIZER]
    world.cluster.put(INFERENCE_SERVICE, inference_service())
    world.cluster.delete(MODEL, "llama")
    world.known.answers["org/llama", "main"] = DOWN
    world.settle()
    status, reason, message = world.condition("Ready")
    assert (status, reason) == ("False", "InUse")
    assert "InferenceService chat" in message
    assert world.status["commit"] == A, "what serves goes on"
    world.cluster.delete(INFERENCE_SERVICE, "chat")
    turn(world.cluster, world.models, "llama", world.now)
    assert world.cluster.objects == {}


def test_a_model_that_makes_no_sense_says_so_and_can_be_deleted():
    world = World()
    world.cluster.change(MODEL, "llama", {"source": {"repo": "a/b/c"}})
    world.settle()
    assert world.condition("Ready")[:2] == ("False", "Invalid")
    assert "spec.source.repo" in world.condition("Ready")[2]
    world.cluster.delete(MODEL, "llama")
    assert world.cluster.all(MODEL) == []


def test_a_status_is_written_once():
    world = World().names(A)
    outcome = turn(world.cluster, world.models, "llama", world.now + 1000)
    assert outcome is not None
    assert not [one for one in outcome.actions if isinstance(one, PatchStatus)]
