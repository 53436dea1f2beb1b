"""A service's workers as they are and as they should be: how many of each commit and role, and who moves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from helios import worker_labels
from helios.kube.kinds import DEPLOYMENT
from orchestrator.actions import Manifest, Ref, Scale
from orchestrator.api.parse import service_status
from orchestrator.api.service import Scaling, ServiceSpec
from orchestrator.reconcile import names
from orchestrator.reconcile.deployment import REPO
from orchestrator.reconcile.observed import Health, PodSeen, ServiceObserved
from orchestrator.reconcile.rollout import Seen, Step, carried, workers
from orchestrator.reconcile.site import Site

By = Literal["Operator", "HPA", "KEDA"]
CREATED: Final = 1
"""Replicas of a Deployment that is made without saying how many (Kubernetes' default)."""


class Fleet(msgspec.Struct, frozen=True):
    """``deployments``: by commit and role; ``desired``: workers of each role for all requests, 0 for all or none."""

    deployments: Mapping[tuple[str, str], tuple[Ref, Manifest]]
    pods: tuple[PodSeen, ...]
    desired: Mapping[str, int]

    @property
    def asleep(self) -> bool:
        return not any(self.desired.values())

    def replicas(self, commit: str, role: str) -> int | None:
        """What the cluster was asked for; None: there is no Deployment."""
        found = self.deployments.get((commit, role))
        return None if found is None else found[1].get("spec", {}).get("replicas", CREATED)

    def of_another(self, commit: str, role: str, repo: str) -> bool:
        """Whether its Deployment is of another repository: it was made for another Model."""
        found = self.deployments.get((commit, role))
        if found is None:
            return False
        said: str = (found[1]["metadata"].get("annotations") or {}).get(REPO, repo)
        return said != repo

    def ready(self, commit: str, role: str) -> int:
        return sum(one.ready for one in self.pods if (one.commit, one.role) == (commit, role))

    def there(self, role: str) -> int:
        """Pods of a role that are not ending."""
        return sum(not one.ending for one in self.pods if one.role == role)

    def seen(self, commit: str, health: Health | None) -> Seen:
        """The commit's workers as the rollout sees them."""
        ready, health = {role: self.ready(commit, role) for role in self.desired}, health or Health()
        pods = any(one.commit == commit for one in self.pods)
        asked = any(self.replicas(commit, role) for role in self.desired)
        return Seen(
            carried(ready, self.desired), all(ready.values()), pods or asked, health.in_flight, health.requests,
            health.error_percent, health.ttft_ms,
        )  # fmt: skip


def roles(spec: ServiceSpec) -> list[str]:
    """What its workers compute, as ``helios worker --role`` has it."""
    return [role for role, field in names.ROLES.items() if getattr(spec, field) is not None]


def answering(spec: ServiceSpec) -> str:
    """The role whose workers answer clients."""
    return "both" if spec.aggregated is not None else "decode"


def scaling(spec: ServiceSpec, role: str) -> Scaling:
    its = getattr(spec, names.ROLES[role])
    return (its and its.scaling) or spec.scaling


def moved_by(spec: ServiceSpec, role: str, site: Site, keda: bool) -> By:
    """Who moves replicas between 1 and the most: what isn't there can't."""
    by = "Operator" if spec.replicas is not None else scaling(spec, role).by
    if by == "KEDA" and keda and site.keda_scaler:
        return "KEDA"
    return "HPA" if by in ("Auto", "HPA") and site.external_metrics else "Operator"


def fleet_of(seen: ServiceObserved, spec: ServiceSpec) -> Fleet:
    """The present one. A role that nothing was decided for keeps what was wanted last, or gets its least."""
    before = service_status({"status": seen.object.status}).roles
    deployments = {}
    for ref, manifest in seen.children:
        labels = manifest["metadata"].get("labels") or {}
        if ref.kind == DEPLOYMENT and worker_labels.REVISION in labels:
            deployments[labels[worker_labels.REVISION], labels.get(worker_labels.ROLE, "")] = (ref, manifest)
    desired = {}
    for role in roles(spec):
        its, wanted = scaling(spec, role), seen.wanted.get(role)
        last = before.get(names.ROLES[role])
        count = wanted.replicas if wanted is not None else last.desired if last is not None else 0
        desired[role] = max(its.min_replicas, min(its.max_replicas, count))
    if spec.replicas is not None:  # by hand: the other role, if there is one, keeps what it has
        desired = {role: count if spec.replicas else 0 for role, count in desired.items()}
        desired[answering(spec)] = spec.replicas
    if any(desired.values()):  # a role that sleeps would keep the other one from working
        desired = {role: max(1, count) for role, count in desired.items()}
    return Fleet(deployments, seen.pods, desired)


def floor(step: Step, fleet: Fleet, commit: str, role: str, least: int) -> int:
    """What an autoscaler may not go below: while requests move between commits, what each of them needs for that."""
    share = step.capacity.get(commit, 0)
    alone = sum(1 for one in step.capacity.values() if one) == 1
    return workers(share, max(1, least) if alone else max(least, fleet.desired[role]))


def scales(step: Step, fleet: Fleet, movers: Mapping[str, By]) -> tuple[list[Scale], list[Scale]]:
    """Those that add workers, and those that take some away."""
    more: list[Scale] = []
    fewer: list[Scale] = []
    for (commit, role), (ref, _) in fleet.deployments.items():
        if role not in movers:
            continue
        there = fleet.replicas(commit, role) or 0
        wanted = workers(step.capacity.get(commit, 0), fleet.desired[role])
        if commit in step.hold:
            wanted = max(wanted, there)
        if wanted != there and (movers[role] == "Operator" or not (wanted and there)):
            (more if wanted > there else fewer).append(Scale(ref, wanted))
    return more, fewer
