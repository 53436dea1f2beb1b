"""Models and services in a real cluster: real API server, controllers, scheduler, kubelet, CSI driver, router, vLLM."""

from __future__ import annotations

import time

import httpx
import pytest

from tests.support.site import ENGINE, MINUTES, WORKER, Site, until

pytestmark = pytest.mark.timeout(1800)
SLEEPS = {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 10, "warmSeconds": 0, "downWindowSeconds": 0}
START_S = 6 * MINUTES
"""Longest start of vLLM on a busy machine."""


def test_a_request_wakes_a_model_which_sleeps_again_and_deletion_leaves_nothing(site: Site) -> None:
    commit = site.push(site.repo("sleeper"))
    site.model("sleeper", site.repo("sleeper"))
    site.service("sleeper", "sleeper", scaling=SLEEPS)
    until(lambda: site.condition("Model", "sleeper"), ("True", "Ready"))
    until(lambda: site.ready("sleeper"), ("True", "Asleep"))
    assert site.pods("sleeper") == []
    answer = site.ask("sleeper")
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
    (pod,) = site.pods("sleeper")
    (volume,) = [one["csi"] for one in pod["spec"]["volumes"] if "csi" in one]
    assert (volume["readOnly"], volume["volumeAttributes"]["revision"]) == (True, commit)
    (row,) = site.table("inferenceservices")
    assert (row["Name"], row["Ready"], row["Revision"]) == ("sleeper", "True", commit[:12])
    until(lambda: site.ready("sleeper"), ("True", "Asleep"), 3 * MINUTES)
    until(lambda: site.pods("sleeper"), [])
    site.delete("InferenceService", "sleeper")
    site.delete("Model", "sleeper")
    until(site.left, [], 3 * MINUTES)


def test_a_horizontal_pod_autoscaler_adds_workers_under_load_and_takes_them_back(site: Site) -> None:
    site.push(site.repo("busy"))
    site.model("busy", site.repo("busy"))
    scaling = {"by": "HPA", "minReplicas": 1, "maxReplicas": 2, "downWindowSeconds": 10, "targets": {"inFlight": 2}}
    site.service("busy", "busy", scaling=scaling)
    until(lambda: site.ready("busy"), ("True", "Serving"), START_S)

    def autoscaler() -> tuple[int, int]:
        """Replicas that it has, and that it wants."""
        (one,) = site.listed("apis/autoscaling/v2/horizontalpodautoscalers")
        status = one.get("status") or {}
        return status.get("currentReplicas", 0), status.get("desiredReplicas", 0)

    until(autoscaler, (1, 1))
    with site.asked("busy", clients=6, tokens=256) as statuses:
        until(autoscaler, (2, 2), START_S)
        until(lambda: len(site.pods("busy")), 2)
    assert set(statuses) == {httpx.codes.OK}
    until(autoscaler, (1, 1), 5 * MINUTES)
    until(lambda: len(site.pods("busy")), 1)


def test_a_new_commit_takes_over_and_a_bad_one_is_taken_back_while_requests_go_on(site: Site) -> None:
    first = site.push(site.repo("moving"))
    site.model("moving", site.repo("moving"), revision={"policy": "Follow", "checkSeconds": 5})
    rollout = {"steps": [50, 100], "stepSeconds": 10, "minRequests": 1, "progressDeadlineSeconds": 300}
    scaling = {"by": "Operator", "minReplicas": 1, "maxReplicas": 1}
    site.service("moving", "moving", engine={**ENGINE, "startTimeoutSeconds": 300}, rollout=rollout, scaling=scaling)
    until(lambda: site.ready("moving"), ("True", "Serving"), START_S)

    def serves() -> tuple[str | None, list[str]]:
        """The commit that counts, and those that have workers."""
        status = site.status("InferenceService", "moving")
        return status.get("commit"), [one["commit"] for one in status.get("revisions") or ()]

    assert serves() == (first, [first])
    with site.asked("moving", pause_s=1.0) as statuses:
        second = site.push(site.repo("moving"), seed=1)
        until(lambda: len(serves()[1]), 2)
        site.kill_operators()  # others go on where they were
        until(serves, (second, [second]), START_S + 2 * MINUTES)
        bad = site.push(site.repo("moving"), broken=True)
        until(lambda: site.status("InferenceService", "moving").get("refused"), bad, START_S + 5 * MINUTES)
        until(serves, (second, [second]), START_S)
    assert set(statuses) == {httpx.codes.OK}
    assert site.condition("InferenceService", "moving", "Progressing")[1] == "RolledBack"
    (row,) = site.table("inferenceservices")
    assert row["Revision"] == second[:12]


def test_what_cannot_be_is_said_in_kubectl_get_within_moments(site: Site) -> None:
    site.push(site.repo("fine"))
    site.model("fine", site.repo("fine"))
    site.model("unsigned", site.repo("fine"), revision={"requireVerified": True})
    site.model("unknown", site.repo("unknown"), source={"repo": site.repo("unknown"), "pull": "Never"})
    until(lambda: site.condition("Model", "fine"), ("True", "Ready"))
    one = {"scaling": {"minReplicas": 1, "maxReplicas": 1}}
    site.service("orphan", "nobody", **one)
    site.service("no-gpu", "fine", aggregated={**WORKER, "accelerator": {"count": 1}}, **one)
    site.service("no-image", "fine", engine={**ENGINE, "image": "registry.invalid/nothing:1"}, **one)
    site.service("bad-flag", "fine", engine={"args": ["--no-such-flag"]}, **one)

    def reasons(plural: str) -> dict[str, str]:
        return {row["Name"]: row["Reason"] for row in site.table(plural)}

    nowhere = ("NotFound", "UpstreamUnreachable")  # as the registry has an upstream or not
    until(lambda: reasons("models")["unknown"] in nowhere, seconds=30)
    until(lambda: (reasons("models")["fine"], reasons("models")["unsigned"]), ("Ready", "NotVerified"), 30)
    soon = {"orphan": "ModelNotFound", "no-gpu": "Unschedulable", "no-image": "ImageMissing"}
    until(lambda: {name: why for name, why in reasons("inferenceservices").items() if name in soon}, soon, 60)
    until(lambda: reasons("inferenceservices")["bad-flag"], "CrashLoop", 3 * MINUTES)
    site.core.create_namespaced_resource_quota(
        site.namespace, {"metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}}
    )
    try:
        site.service("too-many", "fine", **one)
        until(lambda: reasons("inferenceservices")["too-many"], "QuotaExceeded", 30)
    finally:
        site.core.delete_namespaced_resource_quota("few", site.namespace)


def test_prefill_and_decode_of_one_commit_are_woken_together_and_share_a_request(site: Site) -> None:
    site.push(site.repo("apart"))
    site.model("apart", site.repo("apart"))
    roles = {"aggregated": None, "prefill": WORKER, "decode": WORKER}
    site.service("apart", "apart", scaling={**SLEEPS, "idleSeconds": 120}, **roles)
    until(lambda: site.ready("apart"), ("True", "Asleep"))
    prompt = "the river runs down to the sea and the wind is in the trees " * 50
    assert site.ask("apart", prompt=prompt).status_code == httpx.codes.OK
    desired = {name: one["desired"] for name, one in site.status("InferenceService", "apart")["roles"].items()}
    assert desired == {"prefill": 1, "decode": 1}

    def computed_elsewhere() -> bool:
        """Once the two have met."""
        assert site.ask("apart", prompt=f"{time.monotonic()} {prompt}").status_code == httpx.codes.OK
        return site.router_counts("helios_router_prefills_total", model="apart", result="remote") > 0

    until(computed_elsewhere, seconds=3 * MINUTES)
