"""The status of a service: what is the case, what is waited for and since when. No I/O.

| condition | True | else |
|---|---|---|
| ``ModelReady`` | its Model has a commit that counts | what the Model waits for |
| ``Scheduled`` | each pod has a node | no node with such a GPU; a quota is used up |
| ``Available`` | each role of the commit that most requests go to has a worker that takes them | why not |
| ``Progressing`` | requests are moving to another commit | how that ended, or what can't be done: by the API server, or
|  |  | by some of its pods while others serve |
| ``ScalingActive`` | what replicas go by is known | what isn't |
| ``Ready`` | it answers requests, or would as soon as it is woken | the first of the others that keeps it from that |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from orchestrator.actions import Emit
from orchestrator.api.parse import service_status
from orchestrator.api.service import RevisionStatus, RoleStatus, ServiceSpec, ServiceStatus
from orchestrator.conditions import Condition, conditions, timestamp
from orchestrator.reconcile import names
from orchestrator.reconcile.fleet import By, Fleet, answering, scaling
from orchestrator.reconcile.observed import PodSeen, ServiceObserved, moment
from orchestrator.reconcile.rollout import State, Step, Weighted

SHOWN: Final = 12
"""Digits of a commit that people are shown."""
IMAGE: Final = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
NODELESS: Final = ("Unschedulable", "SchedulingGated")
CRASH: Final = ("CrashLoopBackOff", "RunContainerError", "CreateContainerError", "StartError", "Failed", "Evicted")
STOPPED: Final = "it has no workers and no request wakes it: spec.replicas is 0; raise it, or take it out"
WORDS: Final = {
    "QuotaExceeded": "raise the ResourceQuota, or ask for less in the role",
    "Unschedulable": "is there a node with this accelerator, room for it, and are its taints tolerated?",
    "ImageMissing": "is spec.engine.image right, and may this namespace pull it?",
    "CrashLoop": "the log of the worker says why: kubectl logs --previous",
}
"""What to do."""


def state_of(status: Mapping[str, Any]) -> State:
    """The rollout as the status has it."""
    found = service_status({"status": status})
    revisions = tuple(Weighted(one.commit, one.weight, moment(one.since)) for one in found.revisions)
    if revisions and sum(one.weight for one in revisions) != 100:
        revisions = ()  # somebody else wrote it: begin with what counts now
    refused_at = moment(found.refused_at) if found.refused_at else 0.0
    return State(revisions, found.refused, refused_at, found.refused_why)


def wrong_status(seen: ServiceObserved, wrong: str) -> dict[str, Any]:
    """Of a service whose spec can't be. What serves is left alone, and so is what is said of it."""
    ready = [Condition("Ready", "False", "Invalid", wrong)]
    return _written(seen, msgspec.structs.replace(service_status({"status": seen.object.status}), conditions=[]), ready)


def status_of(
    seen: ServiceObserved, spec: ServiceSpec, fleet: Fleet, step: Step, movers: Mapping[str, By]
) -> dict[str, Any]:
    role = answering(spec)
    state = step.state
    found = ServiceStatus(
        observed_generation=seen.object.generation,
        commit=state.heaviest,
        short_commit=(state.heaviest or "")[:SHOWN],
        revisions=[
            RevisionStatus(
                commit=one.commit, weight=one.weight, ready=fleet.ready(one.commit, role), since=timestamp(one.since)
            )
            for one in state.revisions
        ],
        refused=state.refused,
        refused_at=timestamp(state.refused_at) if state.refused else "",
        refused_why=state.refused_why[:1024] if state.refused else "",
        roles={names.ROLES[one]: _role(seen, fleet, one) for one in fleet.desired},
        replicas=fleet.there(role),
        ready_replicas=sum(one.ready for one in fleet.pods if one.role == role),
        selector=",".join(
            f"{key}={value}" for key, value in sorted(names.selector(seen.object.ref.name, role).items())
        ),
        scaling=seen.scaling_state,
    )
    return _written(seen, found, _conditions(seen, spec, fleet, step, movers))


def _written(seen: ServiceObserved, status: ServiceStatus, wanted: list[Condition]) -> dict[str, Any]:
    its = seen.object
    found: dict[str, Any] = msgspec.to_builtins(status)
    found |= {"replicas": status.replicas, "readyReplicas": status.ready_replicas}  # people are shown 0 as well
    found["observedGeneration"] = its.generation
    found["conditions"] = conditions(its.status.get("conditions"), wanted, seen.now, its.generation)
    return found


def _role(seen: ServiceObserved, fleet: Fleet, role: str) -> RoleStatus:
    wanted = seen.wanted.get(role)
    fixed = "spec.replicas" if seen.spec is not None and seen.spec.replicas is not None else ""
    return RoleStatus(
        replicas=fleet.there(role),
        ready=sum(one.ready for one in fleet.pods if one.role == role),
        desired=fleet.desired[role],
        reason=fixed or (wanted.reason[:1024] if wanted is not None else ""),
        forecast=wanted.forecast if wanted is not None else None,
    )


def _conditions(
    seen: ServiceObserved, spec: ServiceSpec, fleet: Fleet, step: Step, movers: Mapping[str, By]
) -> list[Condition]:
    model, scheduled = _model(seen), _scheduled(seen, fleet)
    available = _available(seen, fleet, step, scheduled)
    moved = _scaling(seen, spec, fleet, movers)
    progressing = _progressing(seen, fleet, step, serves=available.status == "True")
    return [model, scheduled, available, progressing, moved, _ready(model, scheduled, available, progressing)]


def _ready(model: Condition, scheduled: Condition, available: Condition, progressing: Condition) -> Condition:
    if available.status == "True" or available.reason == "Asleep":
        return Condition("Ready", "True", available.reason, available.message)
    stuck = progressing.status == "False" and progressing.reason not in ("Complete", "Waiting", "RolledBack")
    first = next(
        (one for one in (model, progressing if stuck else model, scheduled) if one.status == "False"), available
    )
    return Condition("Ready", "False", first.reason, first.message)


def _model(seen: ServiceObserved) -> Condition:
    if seen.model is None:
        name = seen.spec.model.name if seen.spec is not None else ""
        return Condition("ModelReady", "False", "ModelNotFound", f"there is no Model {name} in this namespace")
    if seen.model.commit is None:
        return Condition("ModelReady", "False", seen.model.reason or "Unresolved", seen.model.message)
    return Condition("ModelReady", "True", "Resolved", f"{seen.model.spec.source.repo} at {seen.model.commit}")


def _scheduled(seen: ServiceObserved, fleet: Fleet) -> Condition:
    """A quota is seen where pods are refused: at the Deployment (its ReplicaFailure), or in what failed here."""
    for failure in _failures(fleet):
        quota = "exceeded quota" in failure
        reason = "QuotaExceeded" if quota else "PodsRefused"
        return Condition("Scheduled", "False", reason, _advised(failure, reason))
    quotas = [one for one in seen.problems if one.reason == "QuotaExceeded"]
    if quotas:
        return Condition("Scheduled", "False", "QuotaExceeded", _advised(quotas[0].message, "QuotaExceeded"))
    without = [one for one in fleet.pods if one.reason in NODELESS and not one.ending]
    if without:
        text = f"{len(without)} of {len(fleet.pods)} pods have no node; {without[0].name}: {without[0].message}"
        return Condition("Scheduled", "False", without[0].reason, _advised(text, without[0].reason))
    return Condition("Scheduled", "True", "Scheduled", f"{len(fleet.pods)} pods")


def _failures(fleet: Fleet) -> Iterable[str]:
    for _, (_, manifest) in sorted(fleet.deployments.items()):
        for one in (manifest.get("status") or {}).get("conditions") or ():
            if one.get("type") == "ReplicaFailure" and one.get("status") == "True":
                yield str(one.get("message") or one.get("reason") or "pods can't be made")


def _available(seen: ServiceObserved, fleet: Fleet, step: Step, scheduled: Condition) -> Condition:
    main = step.state.heaviest
    if main is None:
        return Condition("Available", "False", "NoCommit", step.message)
    missing = [role for role in fleet.desired if not fleet.ready(main, role)]
    if fleet.asleep and missing and seen.spec is not None and seen.spec.replicas == 0:
        return Condition("Available", "False", "Stopped", STOPPED)
    if fleet.asleep and missing:
        return Condition("Available", "False", "Asleep", "it has no workers; a request wakes it")
    if not missing:
        return Condition("Available", "True", "Serving", f"commit {main[: names.SHORT]} takes requests")
    pods = [one for one in fleet.pods if one.role in missing and not one.ending]
    trouble = _trouble(pods)
    if trouble is not None:
        return Condition("Available", "False", *trouble)
    if scheduled.status == "False":
        return Condition("Available", "False", scheduled.reason, scheduled.message)
    text = f"the workers of {', '.join(names.ROLES[role] for role in missing)} start"
    first = next((one for one in pods if one.doing), None)
    if first is not None:
        text += f"; {first.name}: {first.doing} (kubectl describe pod says more)"
    return Condition("Available", "False", "Starting", text)


def _trouble(pods: Sequence[PodSeen]) -> tuple[str, str] | None:
    """What keeps pods from running that have a node, as reason and message; None: nothing."""
    for reasons, reason in ((IMAGE, "ImageMissing"), (CRASH, "CrashLoop")):
        for one in pods:
            if one.reason in reasons:
                text = f"{one.name}: {one.reason}{_since(one.since)}{': ' if one.message else ''}{one.message}"
                return reason, _advised(text, reason)
    for one in pods:
        if one.reason and one.reason not in NODELESS:
            return one.reason, f"{one.name}: {one.message or one.reason}"[:4096] + _since(one.since)
    return None


def _since(when: str) -> str:
    """A condition's own time is that of its status alone; this is the reason's."""
    return f", since {when}" if when else ""


def _progressing(seen: ServiceObserved, fleet: Fleet, step: Step, *, serves: bool) -> Condition:
    """``serves``: workers answer, so what is wrong with others (of a new commit, a new image) is said here."""
    others = [one for one in seen.problems if one.reason != "QuotaExceeded"]
    if others:
        one, its = others[0], str(others[0].ref)
        text = (one.message if its in one.message else f"{its}: {one.message}") + _since(timestamp(one.since))
        return Condition("Progressing", "False", one.reason, text)
    moving = step.phase in ("RollingOut", "RollingBack", "Splitting")
    trouble = _trouble([one for one in fleet.pods if not one.ending]) if serves else None
    if trouble is None:
        return Condition("Progressing", "True" if moving else "False", step.phase, step.message)
    if moving:
        return Condition("Progressing", "True", step.phase, f"{step.message}; {trouble[1]}")
    return Condition("Progressing", "False", *trouble)


def _scaling(seen: ServiceObserved, spec: ServiceSpec, fleet: Fleet, movers: Mapping[str, By]) -> Condition:
    if spec.replicas is not None:
        text = f"spec.replicas is {spec.replicas}: nothing is scaled until that field is taken out"
        return Condition("ScalingActive", "False", "Fixed", text)
    unknown = [names.ROLES[role] for role in fleet.desired if role not in seen.wanted]
    if unknown:
        return Condition("ScalingActive", "Unknown", "Starting", f"nothing was decided yet for {', '.join(unknown)}")
    deaf = [names.ROLES[role] for role in fleet.desired if not seen.wanted[role].signals]
    if deaf:
        text = f"routers and workers don't say what {', '.join(deaf)} has to do: nothing is taken away"
        return Condition("ScalingActive", "False", "NoSignals", text)
    by = sorted(set(movers.values()))
    text = ", ".join(f"{names.ROLES[role]} {count}" for role, count in fleet.desired.items())
    for role, its in movers.items():
        if (said := scaling(spec, role).by) not in ("Auto", its):
            text += f"; by {its}, because this cluster has not what spec.scaling.by: {said} needs"
    if others := max(seen.wanted[role].others for role in fleet.desired):
        text += f"; {others} more answer for the same name, and each is scaled by the requests of all (spec.servedName)"
    return Condition("ScalingActive", "True", f"By{by[0] if len(by) == 1 else 'Several'}", text)


def _advised(text: str, reason: str) -> str:
    """With what to do; messages of a condition have 32,768 characters at most."""
    advice = WORDS.get(reason, "")
    return f"{text[:4096]}; {advice}" if advice else text[:4096]


TOLD: Final = (*WORDS, "Invalid", "PodsRefused", "ModelNotFound", "NoSignals", "NotOwned")
"""Reasons about which somebody has to do something."""


def events(seen: ServiceObserved, status: Mapping[str, Any]) -> list[Emit]:
    """Of conditions that are False for another reason than before, where somebody has to do something about it."""
    before = {(one.get("type"), one.get("reason")) for one in seen.object.status.get("conditions") or ()}
    found: dict[str, Emit] = {}
    for one in status["conditions"]:
        if one["status"] == "False" and one["reason"] in TOLD and (one["type"], one["reason"]) not in before:
            found.setdefault(one["reason"], Emit("Warning", one["reason"], one["message"][:1024]))
    return list(found.values())
