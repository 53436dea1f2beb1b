"""``InferenceService`` -> everything that serves it. Pure: the same that is seen gives the same that is to be done.

Order of what is done: policies and budgets, workers that are to come, weights, autoscalers; only then workers go, and
objects that nobody needs. Whatever it ends at, requests have workers, and the next turn goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from helios import worker_labels
from helios.kube.kinds import AUTOSCALER, DEPLOYMENT, DISRUPTION_BUDGET, NETWORK_POLICY, SERVICE, Kind
from orchestrator.actions import Action, Apply, Delete, Emit, Outcome, PatchStatus, Ref, RemoveFinalizer, Scale
from orchestrator.api.common import FINALIZER
from orchestrator.api.service import ServiceSpec
from orchestrator.reconcile import gateway, istio, network, pdb, services
from orchestrator.reconcile.deployment import deployment
from orchestrator.reconcile.fleet import By, Fleet, answering, fleet_of, floor, moved_by, roles, scales, scaling
from orchestrator.reconcile.hpa import autoscaler
from orchestrator.reconcile.keda import scaled_object
from orchestrator.reconcile.kinds import INFERENCE_POOL, ISTIO, SCALED_OBJECT
from orchestrator.reconcile.observed import ModelSeen, ServiceObserved
from orchestrator.reconcile.pod import Workers
from orchestrator.reconcile.rollout import Step, Wish, advance, workers
from orchestrator.reconcile.service_status import events, state_of, status_of, wrong_status
from orchestrator.reconcile.site import Site

OWNS: Final[tuple[Kind, ...]] = (
    DEPLOYMENT, SERVICE, DISRUPTION_BUDGET, AUTOSCALER, NETWORK_POLICY, *ISTIO, INFERENCE_POOL, SCALED_OBJECT,
)  # fmt: skip


def reconcile(seen: ServiceObserved, site: Site) -> Outcome:
    """What is to be done for the service. What it makes is its own and goes with it: nothing holds up its end."""
    its = seen.object
    if its.deleting:
        return Outcome([RemoveFinalizer(its.ref, FINALIZER)] if FINALIZER in its.finalizers else [])
    if seen.spec is None:
        return Outcome(_told(seen, wrong_status(seen, seen.wrong or "the spec can't be read"), []))
    spec, fleet = seen.spec, fleet_of(seen, seen.spec)
    state = state_of(its.status)
    known = {one.commit for one in state.revisions} | {weight.commit for weight in spec.traffic}
    target = seen.model.commit if seen.model is not None else None
    commits = known | ({target} if target else set())
    wish = Wish(
        target, spec.rollout, {one.commit: one.weight for one in spec.traffic}, fleet.asleep,
        float(spec.engine.drain_seconds),
    )  # fmt: skip
    now = float(int(seen.now))
    step = advance(state, wish, {commit: fleet.seen(commit, seen.health.get(commit)) for commit in commits}, now)
    movers = {role: moved_by(spec, role, site, seen.capabilities.keda) for role in roles(spec)}
    actions: list[Action] = []
    if seen.model is not None:
        actions = _actions(seen, spec, seen.model, site, fleet, step, movers)
    status = status_of(seen, spec, fleet, step, movers)
    notes = [Emit(note.type, note.reason, note.message) for note in step.notes]
    return Outcome([*actions, *_told(seen, status, notes)], step.again_s)


def _told(seen: ServiceObserved, status: dict[str, object], notes: list[Emit]) -> list[Action]:
    found: list[Action] = [*notes, *events(seen, status)]
    if status != seen.object.status:
        found.append(PatchStatus(seen.object.ref, status))
    return found


def _actions(
    seen: ServiceObserved, spec: ServiceSpec, model: ModelSeen, site: Site, fleet: Fleet, step: Step,
    movers: Mapping[str, By],
) -> list[Action]:  # fmt: skip
    owner, its_roles = seen.object.ref, roles(spec)
    around = _around(seen, owner, site, spec, step)
    made, weights, movers_made, new = [], [], [], []
    alone = len(step.state.revisions) == 1
    for one in step.state.revisions:
        for role in its_roles:
            its = Workers(owner, spec, model, one.commit, role, site)
            ready = fleet.ready(one.commit, role)
            weight = "1" if alone and one.weight else services.weight_of(one.weight, ready)
            weights.append(services.headless(its, weight))
            wanted, there = workers(step.capacity[one.commit], fleet.desired[role]), fleet.replicas(one.commit, role)
            if not step.capacity[one.commit] or (there is None and not wanted):
                continue
            if one.commit != model.commit and fleet.of_another(one.commit, role, its.repo):
                continue  # of the Model that the service had before: it stays as it is until its requests are gone
            made.append(deployment(its))
            if there is None and wanted != 1:
                new.append(Scale(made[-1].ref, wanted))
            least = seen.wanted[role].floor if role in seen.wanted else scaling(spec, role).min_replicas
            low = floor(step, fleet, one.commit, role, least)
            if movers[role] == "HPA":
                movers_made.append(autoscaler(its, scaling(spec, role), low))
            elif movers[role] == "KEDA":
                asleep = not (wanted and (there is None or there))
                movers_made.append(scaled_object(its, scaling(spec, role), low, paused=asleep))
    more, fewer = scales(step, fleet, movers)
    applied = [*around, *made, *weights, *movers_made]
    deletes = _unwanted(seen, fleet, step, applied)
    movers_gone = [one for one in deletes if one.ref.kind in (AUTOSCALER, SCALED_OBJECT)]
    others_gone = [one for one in deletes if one not in movers_gone]
    return [
        *around,
        *made,
        *new,
        *more,
        *weights,
        *movers_made,
        *movers_gone,
        *fewer,
        *others_gone,
        *_moves(fleet, more, fewer),
    ]


def _around(seen: ServiceObserved, owner: Ref, site: Site, spec: ServiceSpec, step: Step) -> list[Apply]:
    """What there is once for the service, or once for a role."""
    its_roles, role = roles(spec), answering(spec)
    found = [network.policy(owner, site, apart=len(its_roles) > 1)] if site.network_policies else []
    found += [pdb.budget(owner, one) for one in its_roles]
    found.append(services.whole(owner, role))
    if seen.capabilities.istio and site.mesh != "off":
        found += istio.rules(owner, site, role, {one.commit: one.weight for one in step.state.revisions})
    if seen.capabilities.inference_pool and site.picker_service:
        found.append(gateway.pool(owner, site, role))
    return found


def _unwanted(seen: ServiceObserved, fleet: Fleet, step: Step, applied: Sequence[Apply]) -> list[Delete]:
    """What it owns and nobody needs: of commits that are gone, of roles that were taken out (as soon as others take
    their requests), of parts of the cluster that are gone."""
    wanted = {(one.ref.kind, one.ref.name) for one in applied}
    states = {one.commit for one in step.state.revisions}
    main = step.state.heaviest
    taken = fleet.asleep or all(fleet.ready(main or "", role) for role in fleet.desired)
    found = []
    for ref, manifest in seen.children:
        if (ref.kind, ref.name) in wanted:
            continue
        labels: Mapping[str, str] = manifest["metadata"].get("labels") or {}
        commit, role = labels.get(worker_labels.REVISION), labels.get(worker_labels.ROLE)
        if ref.kind in (DEPLOYMENT, SERVICE) and commit is not None:
            retiring = commit in states and role in fleet.desired
            if retiring or (role not in fleet.desired and not taken):
                continue
        found.append(Delete(ref, manifest["metadata"].get("resourceVersion", "")))
    return found


def _moves(fleet: Fleet, more: Sequence[Scale], fewer: Sequence[Scale]) -> list[Emit]:
    """From 0 and to 0 is told; other numbers are in the status."""
    none = not any(fleet.replicas(commit, role) for commit, role in fleet.deployments)
    if none and more:
        text = ", ".join(f"{one.ref.name} {one.replicas}" for one in more)
        return [Emit("Normal", "Waking", f"it wakes, with workers: {text}")]
    if fleet.asleep and fewer:
        return [Emit("Normal", "FallingAsleep", "nothing is asked for: its workers go")]
    return []
