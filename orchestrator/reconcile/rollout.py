"""How requests move from one commit to another: a state machine without I/O and without a clock.

Its whole state is in the resource's status (weights, since when, what was refused), so whoever goes on with it decides
the same. Each call makes at most one move, and these things hold after each:

- weights add up to 100, and a commit gets more only if its ready workers carry that (``Seen.supports``), unless
  nothing is needed (asleep), there is nobody else, or a way back has taken ``step_seconds``;
- a commit keeps its workers as long as it has weight, and afterwards until its requests are done (``Step.hold``);
- prefill and decode workers of a commit have one weight: ``supports`` is the least of its roles.

The steps are those of a canary as Argo Rollouts has it (``setWeight``, ``dynamicStableScale``): the next share of
workers comes up while the present one is judged, the old ones go as their requests do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from orchestrator.api.service import Rollout

HEARD_S: Final = 10.0
"""After so long, in seconds, every router has heard of a weight."""

Phase = Literal["Complete", "RollingOut", "RollingBack", "RolledBack", "Splitting", "Waiting"]


class Weighted(msgspec.Struct, frozen=True):
    """A commit, its share of requests in percent, and since when it has that, in Unix seconds."""

    commit: str
    weight: int
    since: float


class State(msgspec.Struct, frozen=True):
    """``revisions``: the older ones first."""

    revisions: tuple[Weighted, ...] = ()
    refused: str | None = None
    refused_at: float = 0.0
    refused_why: str = ""

    def weight(self, commit: str) -> int:
        return next((one.weight for one in self.revisions if one.commit == commit), 0)

    @property
    def heaviest(self) -> str | None:
        """The commit that most requests go to; of several the oldest."""
        return max(self.revisions, key=lambda one: one.weight).commit if self.revisions else None


class Seen(msgspec.Struct, frozen=True):
    """What is known of a commit's workers. ``supports``: the share, in percent, of what the service needs that its
    ready ones carry; ``pods``: whether there is any, also one that is ending; ``in_flight``, ``error_percent`` and
    ``ttft_ms`` (median) are None where nobody knows; ``requests`` of the present weight."""

    supports: int = 0
    ready: bool = False
    pods: bool = False
    in_flight: int | None = None
    requests: int = 0
    error_percent: float | None = None
    ttft_ms: float | None = None


class Wish(msgspec.Struct, frozen=True):
    """What is wanted. ``split`` wins over ``target``; ``asleep``: no worker is needed; ``drain_s``: how long requests
    of a commit that gets no more may take."""

    target: str | None
    rollout: Rollout
    split: Mapping[str, int] = {}
    asleep: bool = False
    drain_s: float = 120.0


class Note(msgspec.Struct, frozen=True):
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


class Step(msgspec.Struct, frozen=True):
    """``capacity``: for each commit the share, in percent of what is needed, for which it is to have workers;
    ``hold``: commits that keep what they have, too, for now."""

    state: State
    phase: Phase
    message: str
    capacity: Mapping[str, int]
    hold: frozenset[str] = frozenset()
    notes: tuple[Note, ...] = ()
    again_s: float | None = None


def normalised(split: Mapping[str, int]) -> dict[str, int]:
    """Weights as whole percents that add up to 100 (largest remainder), without those that have none."""
    whole = sum(split.values())
    found = {commit: weight * 100 // whole for commit, weight in split.items() if weight}
    rest = sorted(found, key=lambda commit: (-(split[commit] * 100 % whole), commit))
    for commit in rest[: 100 - sum(found.values())]:
        found[commit] += 1
    return {commit: weight for commit, weight in found.items() if weight}


def workers(share: int, needed: int) -> int:
    """How many workers carry a share, in percent, of what ``needed`` ones carry."""
    return -(-share * needed // 100)


def carried(ready: Mapping[str, int], needed: Mapping[str, int]) -> int:
    """The share, in percent, that the ready workers of a commit carry: the least of its roles."""
    return min((min(100, ready.get(role, 0) * 100 // count) if count else 100 for role, count in needed.items()))


def worse(new: Seen, old: Seen, rollout: Rollout) -> str:
    """Why the new commit is worse than the old one; empty: it isn't, or nobody knows yet."""
    if new.requests < rollout.min_requests:
        return ""
    if new.error_percent is not None and new.error_percent - (old.error_percent or 0) > rollout.max_error_percent:
        return f"{new.error_percent:.1f}% of its requests fail, {old.error_percent or 0:.1f}% of the old commit's"
    if new.ttft_ms and old.ttft_ms and new.ttft_ms * 100 > old.ttft_ms * rollout.max_ttft_percent:
        return f"its time to first token is {new.ttft_ms:.0f} ms, the old commit's {old.ttft_ms:.0f} ms"
    return ""


def advance(state: State, wish: Wish, seen: Mapping[str, Seen], now: float) -> Step:
    """The next state, and what workers it needs. ``now`` in Unix seconds."""
    if not state.revisions:
        first = normalised(wish.split) or ({wish.target: 100} if wish.target else {})
        if not first:
            return Step(state, "Waiting", "no commit is known yet", {})
        begun = replace(state, revisions=tuple(Weighted(commit, weight, now) for commit, weight in first.items()))
        return _settled(begun, wish, seen, now, "Complete", f"the first commit is {_short(begun.heaviest)}")
    split = normalised(wish.split)
    if split:
        return _split(state, wish, split, seen, now)
    if wish.target is None:
        return _settled(state, wish, seen, now, "Waiting", "no commit is known")
    wanted = _wanted(state, wish.target)
    if wish.rollout.strategy == "Recreate":
        return _recreate(state, wish, wanted, seen, now)
    return _shift(state, wish, wanted, seen, now)


def _wanted(state: State, target: str) -> str:
    """The target, unless it was refused and there is another one."""
    if target != state.refused:
        return target
    others = [one for one in state.revisions if one.commit != target]
    return max(others, key=lambda one: (one.weight, one.since)).commit if others else target


def _shift(state: State, wish: Wish, wanted: str, seen: Mapping[str, Seen], now: float) -> Step:
    weights = {one.commit: one.weight for one in state.revisions if one.weight and one.commit != wanted}
    if not weights:
        return _complete(state, wish, wanted, seen, now)
    main = max(weights, key=lambda commit: weights[commit])
    back = wish.target == state.refused
    order = [one.commit for one in state.revisions]
    if len(weights) > 1 or back or (wanted in order and order.index(wanted) < order.index(main)):
        return _back(state, wish, wanted if back or len(weights) == 1 else main, wanted, seen, now)
    if wanted not in order:
        state = replace(state, revisions=(*state.revisions, Weighted(wanted, 0, now)))
        note = Note("Normal", "RolloutStarted", f"from commit {_short(main)} to {_short(wanted)}")
        return _prepare(state, wish, wanted, main, seen, now, (note,))
    return _prepare(state, wish, wanted, main, seen, now, ())


def _prepare(
    state: State, wish: Wish, wanted: str, main: str, seen: Mapping[str, Seen], now: float, notes: tuple[Note, ...]
) -> Step:
    """One step of a canary: judge, wait, or go on."""
    its, rollout = next(one for one in state.revisions if one.commit == wanted), wish.rollout
    its_seen, waited = seen.get(wanted, Seen()), now - its.since
    following = 100 if wish.asleep else next((step for step in sorted(rollout.steps) if step > its.weight), 100)
    wrong = worse(its_seen, seen.get(main, Seen()), rollout) if its.weight else ""
    ready = wish.asleep or its_seen.supports >= following
    if not wrong and not ready and waited >= rollout.progress_deadline_seconds:
        wrong = f"its workers for {following}% are not ready after {rollout.progress_deadline_seconds} s"
    if wrong:
        refused = replace(state, refused=wanted, refused_at=now, refused_why=wrong)
        note = Note("Warning", "RolledBack", f"commit {_short(wanted)}: {wrong}")
        step = _back(refused, wish, main, main, seen, now)
        return replace(step, notes=(*notes, note, *step.notes))
    known = its_seen.requests >= rollout.min_requests or waited >= rollout.progress_deadline_seconds
    timely = not its.weight or wish.asleep or (waited >= rollout.step_seconds and known)
    if ready and timely:
        moved = _weigh(state, {wanted: following, main: 100 - following}, now)
        told = Note("Normal", "RolloutStep", f"commit {_short(wanted)} gets {following}% of the requests")
        if following == 100:
            return replace(_complete(moved, wish, wanted, seen, now), notes=(*notes, _completed(wanted)))
        text = f"{following}% of the requests go to commit {_short(wanted)}"
        return _settled(moved, wish, seen, now, "RollingOut", text, notes=(*notes, told), again=rollout.step_seconds)
    text = f"{its.weight}% of the requests go to commit {_short(wanted)}; "
    if not ready:
        text += f"its workers for {following}% come up"
        due = rollout.progress_deadline_seconds - waited
    elif waited < rollout.step_seconds:
        text, due = text + f"{following}% follow after {rollout.step_seconds} s", rollout.step_seconds - waited
    else:
        text += f"{its_seen.requests} of {rollout.min_requests} requests have been seen"
        due = rollout.progress_deadline_seconds - waited
    return _settled(state, wish, seen, now, "RollingOut", text, {wanted: following}, notes=notes, again=max(1.0, due))


def _back(state: State, wish: Wish, to: str, wanted: str, seen: Mapping[str, Seen], now: float) -> Step:
    """Requests go back to ``to`` as far as its workers carry them, and at last in any case; what ``wanted`` has, if
    that is another one, it keeps."""
    kept = state.weight(wanted) if wanted != to else 0
    goal = 100 - kept
    leaving = [one for one in state.revisions if one.weight and one.commit not in (to, wanted)]
    began = state.refused_at if wish.target == state.refused else max((one.since for one in leaving), default=now)
    forced = wish.asleep or now - began >= wish.rollout.step_seconds
    present = state.weight(to)
    reached = goal if forced else max(present, min(goal, seen.get(to, Seen()).supports))
    weights = {to: reached, **({wanted: kept} if wanted != to else {})}
    left = goal - reached
    for one in sorted(leaving, key=lambda one: -one.weight):
        weights[one.commit] = min(one.weight, left)
        left -= weights[one.commit]
    moved = _weigh(state, weights, now)
    text = f"{reached}% of the requests go to commit {_short(to)}"
    phase: Phase = "RollingOut" if wish.target != state.refused else "RollingBack" if reached < goal else "RolledBack"
    if phase == "RolledBack":
        text = _taken_back(state)
    again = None if reached == goal and wanted == to else max(1.0, wish.rollout.step_seconds - (now - began))
    return _settled(moved, wish, seen, now, phase, text, {to: goal}, again=again)


def _complete(state: State, wish: Wish, wanted: str, seen: Mapping[str, Seen], now: float) -> Step:
    """``wanted`` has everything."""
    back = wish.target == state.refused and wanted != state.refused
    if not back:
        if wanted != state.refused:
            state = replace(state, refused=None, refused_at=0.0, refused_why="")
        return _settled(state, wish, seen, now, "Complete", f"all requests go to commit {_short(wanted)}")
    return _settled(state, wish, seen, now, "RolledBack", _taken_back(state))


def _recreate(state: State, wish: Wish, wanted: str, seen: Mapping[str, Seen], now: float) -> Step:
    """The old workers go, then the new ones come; the old commit is remembered until they are ready."""
    if state.weight(wanted) < 100:
        if all(one.commit != wanted for one in state.revisions):
            state = replace(state, revisions=(*state.revisions, Weighted(wanted, 0, now)))
        state = _weigh(state, {wanted: 100}, now)
        begun = Note("Normal", "RolloutStarted", f"to commit {_short(wanted)}; the workers of the old one go first")
        notes: tuple[Note, ...] = (begun,)
    else:
        notes = ()
    its = next(one for one in state.revisions if one.commit == wanted)
    others = [one for one in state.revisions if one.commit != wanted]
    late = now - its.since >= wish.rollout.progress_deadline_seconds
    failed = late and not wish.asleep and not seen.get(wanted, Seen()).ready
    if others and failed and wish.target != state.refused:
        wrong = f"no worker of it is ready after {wish.rollout.progress_deadline_seconds} s"
        state = replace(state, refused=wanted, refused_at=now, refused_why=wrong)
        state = _weigh(state, {max(others, key=lambda one: one.since).commit: 100}, now)
        notes = (*notes, Note("Warning", "RolledBack", f"commit {_short(wanted)}: {wrong}"))
        wanted = state.heaviest or wanted
    done = seen.get(wanted, Seen()).ready or wish.asleep
    if done or not others:
        step = _complete(state, wish, wanted, seen, now)
        done_now = bool(others) and step.phase == "Complete"
        return replace(step, notes=(*notes, *((_completed(wanted),) if done_now else ())))
    gone = not any(seen.get(one.commit, Seen()).pods for one in state.revisions if one.commit != wanted)
    capacity = {one.commit: 0 for one in state.revisions} | {wanted: 100 if gone else 0}
    text = f"the workers of commit {_short(wanted)} come up" if gone else "the workers of the old commit end"
    phase: Phase = "RollingBack" if wish.target == state.refused else "RollingOut"
    again = max(1.0, its.since + wish.rollout.progress_deadline_seconds - now)
    return Step(state, phase, text, capacity, notes=notes, again_s=again)


def _split(state: State, wish: Wish, split: Mapping[str, int], seen: Mapping[str, Seen], now: float) -> Step:
    """Each commit gets its share when its workers carry it; until then others keep it."""
    there = {one.commit for one in state.revisions}
    new = tuple(Weighted(commit, 0, now) for commit in split if commit not in there)
    state = replace(state, revisions=(*state.revisions, *new))
    weights = {one.commit: one.weight for one in state.revisions}
    for commit, goal in split.items():
        if goal > weights[commit] and (wish.asleep or seen.get(commit, Seen()).supports >= goal):
            missing = goal - weights[commit]
            for other in sorted(weights, key=lambda one: (split.get(one, 0) - weights[one], one)):
                taken = max(0, min(missing, weights[other] - split.get(other, 0)))
                weights[other] -= taken
                missing -= taken
            weights[commit] = goal - missing
    moved = _weigh(state, weights, now)
    waiting = [commit for commit, goal in split.items() if moved.weight(commit) < goal]
    if not waiting:
        return _settled(moved, wish, seen, now, "Complete", "requests are split as spec.traffic says", split)
    text = f"the workers of commit {', '.join(map(_short, waiting))} come up"
    return _settled(moved, wish, seen, now, "Splitting", text, split)


def _taken_back(state: State) -> str:
    why = f": {state.refused_why}" if state.refused_why else ""
    return (
        f"commit {_short(state.refused)} was rolled back{why}; it is tried again when another one was served meanwhile"
    )


def _completed(commit: str) -> Note:
    return Note("Normal", "RolloutCompleted", f"all requests go to commit {_short(commit)}")


def _weigh(state: State, weights: Mapping[str, int], now: float) -> State:
    """These weights and no others; since now where they have changed."""
    return replace(
        state,
        revisions=tuple(
            one if one.weight == weights.get(one.commit, 0) else Weighted(one.commit, weights.get(one.commit, 0), now)
            for one in state.revisions
        ),
    )


def _settled(
    state: State, wish: Wish, seen: Mapping[str, Seen], now: float, phase: Phase, message: str,
    more: Mapping[str, int] | None = None, notes: Sequence[Note] = (), again: float | None = None,
) -> Step:  # fmt: skip
    """The step with the capacity that its weights need, or ``more``; commits that are done with are let go."""
    more = more or {}
    left, hold, waits = [], set(), [again] if again is not None else []
    capacity: dict[str, int] = {}
    for one in state.revisions:
        its, age = seen.get(one.commit, Seen()), now - one.since
        capacity[one.commit] = max(one.weight, more.get(one.commit, 0))
        coming = one.commit in more or one.weight
        settled = age >= HEARD_S and (one.weight or its.in_flight == 0 or age >= wish.drain_s)
        if not settled and its.pods and not wish.asleep and one.weight < 100:
            hold.add(one.commit)
            waits.append(max(1.0, HEARD_S - age if age < HEARD_S else min(5.0, wish.drain_s - age)))
        follows = one.commit == wish.target and one.commit != state.refused and not wish.split
        if not coming and not its.pods and not follows:
            del capacity[one.commit]
            continue
        left.append(one)
    kept = replace(state, revisions=tuple(left))
    return Step(kept, phase, message, capacity, frozenset(hold), tuple(notes), min(waits, default=None))


def _short(commit: str | None) -> str:
    return (commit or "none")[:10]
