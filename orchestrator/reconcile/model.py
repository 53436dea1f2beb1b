"""``Model`` -> which commit counts, where it is kept, and what is waited for. Pure.

A registry that can't be reached is a condition, not an error: the commit that counts goes on counting.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helios.errors import InvalidInput
from helios.kube.kinds import PERSISTENT_VOLUME, PERSISTENT_VOLUME_CLAIM, POD, Kind
from helios.names import RepoId
from orchestrator.actions import Action, Delete, Emit, Outcome, PatchStatus, RemoveFinalizer, SetFinalizer
from orchestrator.api.common import FINALIZER
from orchestrator.api.model import ModelSpec, ModelStatus, Source
from orchestrator.api.parse import model_status
from orchestrator.conditions import Condition, conditions, timestamp
from orchestrator.reconcile import prefetch
from orchestrator.reconcile.claims import claims
from orchestrator.reconcile.names import short
from orchestrator.reconcile.observed import Facts, ModelObserved, ModelSeen
from orchestrator.reconcile.site import Site

SHOWN: Final = 12
"""Digits of a commit that people are shown."""
NOWHERE: Final = Source(repo="unknown")
"""The source of a Model that can't be read: it has no commit, so nothing is made of it."""
ABSENT: Final = ("NotFound", "Retired")
"""What the registry says of commits that no node can get."""
OWNS: Final[tuple[Kind, ...]] = (PERSISTENT_VOLUME, PERSISTENT_VOLUME_CLAIM, POD)


class Choice(msgspec.Struct, frozen=True):
    """``commit`` counts, resolved from ``revision``; ``found`` is what the revision names; ``waits`` is one that would
    count if it were ``verified`` (None: not known yet)."""

    commit: str | None
    revision: str | None
    found: str | None = None
    waits: str | None = None
    verified: bool | None = True
    absent: Facts | None = None
    """Why what people have approved can't count."""


def before_of(seen: ModelObserved) -> ModelStatus:
    return model_status({"status": seen.object.status})


def reconcile(seen: ModelObserved, site: Site) -> Outcome:
    its = seen.object
    wrong = seen.wrong or _wrong_with(seen.spec)
    if its.deleting:
        return _deleted(seen)
    if wrong or seen.spec is None:
        return Outcome(_told(seen, before_of(seen), [Condition("Ready", "False", "Invalid", wrong)], []))
    ordered = {pod["metadata"].get("annotations", {}).get(prefetch.NODE, "") for _, pod in seen.children}
    asked = prefetch.asked(seen.nodes, seen.spec.prefetch, seen.expected, ordered)
    seen = msgspec.structs.replace(seen, spec=msgspec.structs.replace(seen.spec, prefetch=asked))
    assert seen.spec is not None
    before, choice = before_of(seen), choose(seen, seen.spec)
    actions: list[Action] = [] if FINALIZER in its.finalizers else [SetFinalizer(its.ref, FINALIZER)]
    model = ModelSeen(its.ref.name, seen.spec, choice.commit)
    wanted: list[prefetch.Order] = []
    have: set[str] = set()
    kept = sorted({*seen.in_use, *([choice.commit] if choice.commit else [])})
    if choice.commit is not None:
        repo = seen.spec.source.repo
        have = prefetch.cached(seen.nodes, repo, choice.commit)
        wanted = prefetch.orders(seen.nodes, seen.spec.prefetch, repo, choice.commit, ordered)
    held = claims(its.ref, model, kept, site) if seen.spec.storage.volume == "Claim" else []
    made, gone = prefetch.pods(its.ref, model, wanted, seen.children, site)
    names = {(one.ref.kind, one.ref.name) for one in held}
    known = choice.commit is not None or seen.answer is not None  # else one may count in a moment that is held already
    gone += [
        Delete(ref, one["metadata"].get("resourceVersion", ""))
        for ref, one in (seen.children if known else ())
        if ref.kind != POD and (ref.kind, ref.name) not in names and not one["metadata"].get("deletionTimestamp")
    ]
    actions += [*held, *made, *gone]
    facts = seen.facts.get(choice.commit or "")
    checked = before.checked_at
    candidate = choice.found if choice.found not in (None, choice.commit) else None
    if (choice.commit, candidate) != (before.commit, before.candidate) and seen.answer is not None:
        checked = timestamp(seen.answer.checked_at)
    status = ModelStatus(
        commit=choice.commit, short_commit=(choice.commit or "")[:SHOWN], candidate=candidate, revision=choice.revision,
        size_bytes=facts.size_bytes if facts and not facts.problem else None,
        nodes_cached=len(have), checked_at=checked,
    )  # fmt: skip
    actions += _told(seen, status, _conditions(seen, seen.spec, choice, wanted, have), _notes(before, status))
    return Outcome(actions)


def _wrong_with(spec: ModelSpec | None) -> str:
    if spec is None:
        return "the spec can't be read"
    try:
        RepoId.parse(spec.source.repo)
    except InvalidInput as error:
        return f"spec.source.repo: {error.message}"
    return ""


def choose(seen: ModelObserved, spec: ModelSpec) -> Choice:
    """Which commit counts."""
    before, policy, answer = before_of(seen), spec.revision, seen.answer
    found = answer.commit if answer is not None else None
    same = before.commit is not None and before.revision == policy.revision
    if policy.policy == "Approve" and policy.approved is not None:
        next_one: str | None = policy.approved
    elif policy.policy == "Follow" or not same:
        next_one = found
    else:
        next_one = before.commit
    if next_one is None or next_one == before.commit:
        revision = policy.revision if next_one is not None else before.revision
        return _kept(Choice(before.commit, revision, found), seen, spec)
    facts = seen.facts.get(next_one)
    if next_one == policy.approved and (facts is None or facts.problem in ABSENT):
        asked = Facts(0, None, "Resolving", f"the registry is asked for commit {short(next_one)}")
        return Choice(before.commit, before.revision, found, absent=facts or asked)
    if policy.require_verified and (signed := _signed(facts)) is not True:
        return Choice(before.commit, before.revision, found, next_one, signed)
    return Choice(next_one, policy.revision, found)


def _kept(choice: Choice, seen: ModelObserved, spec: ModelSpec) -> Choice:
    """What counts already is kept, also when nobody vouches for it any more; that is shown."""
    if not spec.revision.require_verified or choice.commit is None:
        return choice
    facts = seen.facts.get(choice.commit)
    return msgspec.structs.replace(choice, verified=_signed(facts))


def _signed(facts: Facts | None) -> bool | None:
    """None: nobody knows yet."""
    return None if facts is None or facts.problem else facts.signer is not None


def _deleted(seen: ModelObserved) -> Outcome:
    """It stays while services use it, as a volume does that pods have (least surprise: nothing that serves breaks);
    then it goes, whatever the registry or nodes say."""
    its = seen.object
    if FINALIZER not in its.finalizers:
        return Outcome()
    if seen.users:
        text = f"it is used by InferenceService {', '.join(seen.users)}: delete that, or have it use another Model"
        return Outcome(_told(seen, before_of(seen), [Condition("Ready", "False", "InUse", text)], []))
    deletes = [
        Delete(ref, one["metadata"].get("resourceVersion", ""))
        for ref, one in seen.children
        if not one["metadata"].get("deletionTimestamp")
    ]
    told: list[Action] = []
    if seen.problems:
        one = seen.problems[0]
        told = _told(seen, before_of(seen), [Condition("Ready", "False", one.reason, f"it ends: {one.message}")], [])
    claims_it = seen.spec is not None and seen.spec.storage.volume == "Claim"
    held = claims_it or any(ref.kind == PERSISTENT_VOLUME for ref, _ in seen.children)
    return Outcome([*told, *deletes, RemoveFinalizer(its.ref, FINALIZER, PERSISTENT_VOLUME if held else None)])


def _conditions(
    seen: ModelObserved, spec: ModelSpec, choice: Choice, wanted: list[prefetch.Order], have: set[str]
) -> list[Condition]:
    resolved, verified = _resolved(seen, spec, choice), _verified(seen, spec, choice)
    fetched = _prefetched(spec, choice, wanted, have)
    if choice.commit is not None:
        ready = Condition("Ready", "True", "Ready", f"commit {choice.commit} counts")
    elif choice.waits is not None:
        ready = Condition("Ready", "False", verified.reason, verified.message)
    else:
        ready = Condition("Ready", "False", resolved.reason, resolved.message)
    if seen.problems:
        one = seen.problems[0]
        ready = Condition("Ready", ready.status, one.reason, f"{one.ref}: {one.message}")
    return [resolved, verified, fetched, ready]


def _resolved(seen: ModelObserved, spec: ModelSpec, choice: Choice) -> Condition:
    answer, name = seen.answer, f"{spec.source.repo}@{spec.revision.revision}"
    if choice.absent is not None:
        text = f"spec.revision.approved: {choice.absent.message}" + _goes_on(choice)
        return Condition("Resolved", "Unknown" if choice.commit else "False", choice.absent.problem, text)
    settled = (
        spec.revision.policy == "Pinned" and choice.commit is not None and choice.revision == spec.revision.revision
    )
    if settled or (answer is not None and answer.commit is not None and not answer.problem):
        return Condition("Resolved", "True", "Resolved", f"{name} is commit {choice.found or choice.commit}")
    if answer is None:
        text = f"the registry is asked what {name} is"
        return Condition("Resolved", "Unknown" if choice.commit else "False", "Resolving", text)
    text = f"{name}: {answer.message or answer.problem}"
    if answer.since:
        text += f"; since {timestamp(answer.since)}"
    text += _goes_on(choice)
    return Condition("Resolved", "Unknown" if choice.commit else "False", answer.problem or "Resolving", text)


def _goes_on(choice: Choice) -> str:
    return "" if choice.commit is None else f"; commit {short(choice.commit)} counts on"


def _verified(seen: ModelObserved, spec: ModelSpec, choice: Choice) -> Condition:
    if not spec.revision.require_verified:
        return Condition("Verified", "True", "NotRequired", "spec.revision.requireVerified is false")
    which = choice.waits or choice.commit
    facts = seen.facts.get(which or "")
    if facts is not None and facts.problem:
        text = f"the registry can't be asked who signed commit {short(which or '')}: {facts.message}"
        return Condition("Verified", "Unknown", facts.problem, text)
    if which is None or choice.verified is None:
        return Condition("Verified", "Unknown", "Verifying", "the registry is asked who signed the commit")
    if choice.verified:
        return Condition("Verified", "True", "Signed", f"commit {short(which)} is signed by whom the registry trusts")
    text = f"commit {short(which)} has no signature that the registry accepted (docs/registry-admission.md)"
    if choice.commit is not None and choice.waits is not None:
        text += f"; commit {short(choice.commit)} counts on"
    return Condition("Verified", "False", "NotVerified", text)


def _prefetched(spec: ModelSpec, choice: Choice, wanted: list[prefetch.Order], have: set[str]) -> Condition:
    if not spec.prefetch.nodes:
        return Condition("Prefetched", "True", "NotRequired", "spec.prefetch.nodes is 0")
    if choice.commit is None:
        return Condition("Prefetched", "False", "Unresolved", "no commit counts yet")
    done = sum(one.node in have for one in wanted)
    if len(wanted) < spec.prefetch.nodes:
        text = f"{len(wanted)} of {spec.prefetch.nodes} nodes are there with these labels; {done} have it"
        return Condition("Prefetched", "False", "TooFewNodes", text)
    if done < spec.prefetch.nodes:
        missing = ", ".join(one.node for one in wanted if one.node not in have)
        text = f"{done} of {spec.prefetch.nodes} nodes have it; {missing[:500]} fetch it"
        return Condition("Prefetched", "False", "Fetching", text)
    return Condition("Prefetched", "True", "Prefetched", f"{done} nodes have it")


def _notes(before: ModelStatus, status: ModelStatus) -> list[Emit]:
    found = []
    if status.commit != before.commit and status.commit is not None:
        text = f"commit {status.commit} counts" + (f", before it {short(before.commit)}" if before.commit else "")
        found.append(Emit("Normal", "Resolved", text))
    if status.candidate != before.candidate and status.candidate is not None:
        found.append(Emit("Normal", "CandidateFound", f"the revision names commit {status.candidate} now"))
    return found


TOLD: Final = (
    "NotVerified",
    "NotFound",
    "Forbidden",
    "Retired",
    "RegistryUnreachable",
    "UpstreamUnreachable",
    "Invalid",
    "TooFewNodes",
    "InUse",
)


def _told(seen: ModelObserved, status: ModelStatus, wanted: list[Condition], notes: list[Emit]) -> list[Action]:
    its = seen.object
    found: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(status, conditions=[], observed_generation=0))
    found |= {"observedGeneration": its.generation, "nodesCached": status.nodes_cached}  # people are shown 0 as well
    found["conditions"] = conditions(its.status.get("conditions"), wanted, seen.now, its.generation)
    before = {(one.get("type"), one.get("reason")) for one in its.status.get("conditions") or ()}
    told: dict[str, Emit] = {}
    for one in wanted:
        if one.status != "True" and one.reason in TOLD and (one.type, one.reason) not in before:
            told.setdefault(one.reason, Emit("Warning", one.reason, one.message[:1024]))
    actions: list[Action] = [*notes, *told.values()]
    if found != its.status:
        actions.append(PatchStatus(its.ref, found))
    return actions
