"""The whole operator is killed at each of its writes, is two at a time, and meets every fault an API server has."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from helios.config import SignalsSettings
from helios.kube import following
from orchestrator.operator import Operator
from orchestrator.reconcile import rollout
from tests.conftest import Helios
from tests.fakes.kubernetes import Call
from tests.fakes.kubernetes.errors import Refusal
from tests.support.demand import TOKEN
from tests.support.faulty import TIMES, Faulty, tried
from tests.support.registry import running_registry
from tests.support.scaled import Told
from tests.support.whole_operator import push
from tests.support.whole_site import WholeSite, say, whole_site

SCALING: dict[str, Any] = {"minReplicas": 0, "warmSeconds": 600, "targets": {"inFlight": 8}}
CLAIM = {"volume": "Claim", "storageClassName": "helios"}
LEAST_WRITES = 35
"""Of the life of one Model and one InferenceService."""


class Stored(NamedTuple):
    """A registry with a commit on each of two branches."""

    url: str
    main: str
    later: str


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    root = tmp_path_factory.mktemp("stored")
    command = Helios({"HELIOS_HOME": str(root / "home")})
    with running_registry(command) as registry, contextlib.closing(registry.client()) as client:
        yield Stored(registry.url, push(client, root, "{}"), push(client, root, '{"n": 2}', branch="later"))


# --- killed ---


class Step(NamedTuple):
    """A part of a service's life: what the router ``tells``, what people ``do``, and how it is seen that the operator
    is ``done`` with it."""

    tell: Callable[[], None]
    do: Callable[[], None]
    done: Callable[[], bool]


def steps(here: WholeSite, router: Told, stored: Stored) -> list[Step]:
    cluster = here.cluster

    def begin() -> None:
        cluster.model(storage=CLAIM)
        cluster.service(scaling=SCALING, rollout={"steps": [100], "stepSeconds": 1})

    def end() -> None:
        cluster.delete("inferenceservices", "chat")
        cluster.delete("models", "llama")

    def serves(commit: str) -> bool:
        return cluster.ready() == ("True", "Serving") and cluster.replicas() == {commit[:10]: 1}

    def used() -> None:
        say(router, in_flight=1, revision=stored.later)

    return [
        Step(lambda: say(router), begin, lambda: cluster.ready() == ("True", "Asleep")),
        Step(lambda: say(router, held=3), lambda: None, lambda: serves(stored.main)),
        Step(
            used, lambda: cluster.model(storage=CLAIM, revision={"revision": "later"}),
            lambda: serves(stored.later) and cluster.weights() == {stored.later: 100},
        ),
        Step(used, end, lambda: here.shape() == []),
    ]  # fmt: skip


class Seen(NamedTuple):
    """What was in the cluster at a moment of a step."""

    step: int
    objects: dict[Any, Any]


async def lived(here: WholeSite, parts: Sequence[Step]) -> tuple[list[Seen], list[Any]]:
    """One operator, all steps: the cluster right before and right after each of its writes, and at the end of each
    step."""
    store, seen, ends = here.server.cluster.store, dict[str, Seen](), list[Any]()

    def keep() -> None:
        mark = f"{len(ends)} {here.shape()}"
        seen.setdefault(mark, Seen(len(ends), dict(store.objects)))  # stored objects are never changed

    def performing(call: Call) -> None:
        if call.write and call.kind not in ("Lease", "Event"):
            keep()
            asyncio.get_running_loop().call_soon(keep)  # once it is performed, before anything else is asked

    here.performed = performing
    one = here.start()
    for part in parts:
        part.tell()
        part.do()
        await here.until(part.done, why=here.brief)
        while await here.still(0.3):
            pass
        ends.append(here.shape())
    await here.kill(one)
    here.performed = lambda call: None
    return [one for one in seen.values() if one.step < len(parts)], ends


@pytest.mark.slow
def test_an_operator_that_is_killed_before_or_after_any_write_is_followed_by_one_that_comes_to_the_same_end(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an operator leaves that is killed is the cluster as it is then, and nothing else. So it is what the next one
    finds: from each of these states there is an operator that knows nothing and comes to where the first one came."""
    monkeypatch.setattr(rollout, "HEARD_S", 0.3)

    async def run() -> None:
        token = tmp_path / "token"
        token.write_text(TOKEN)
        async with Told(TOKEN).serving() as router:
            signals = SignalsSettings([router.url], poll_s=0.1, timeout_s=2.0, stale_s=20.0, token_file=str(token))
            times = {"lease_s": 8.0, "renew_s": 6.0, "retry_s": 0.1}
            async with whole_site(tmp_path, stored.url, signals, **times) as here:
                parts = steps(here, router, stored)
                seen, ends = await lived(here, parts)
                assert len(seen) >= LEAST_WRITES
                for each in seen:
                    here.restore(each.objects)
                    parts[each.step].tell()
                    one = here.start()
                    await here.until(lambda step=each.step: here.shape() == ends[step], why=here.brief)
                    await here.kill(one)

    asyncio.run(run())


def test_a_volume_whose_creation_was_not_answered_goes_with_its_model(stored: Stored, tmp_path: Path) -> None:
    """The Model is deleted meanwhile, and no watch has told of the volume yet."""

    async def run() -> None:
        async with whole_site(tmp_path, stored.url, **TIMES) as here:
            made = here.server.faults.add(
                lambda call: call.write and call.kind == "PersistentVolume", lost=True,
                run=lambda call: here.cluster.delete("models", "llama"),
            )  # fmt: skip
            here.server.faults.add(
                lambda call: call.verb == "watch" and call.kind == "PersistentVolume", hang=True, times=None
            )
            here.start()
            here.cluster.model(storage=CLAIM)
            await here.until(lambda: made.met == 1 and here.cluster.find("models", "llama") is None, why=here.brief)
            assert here.cluster.left() == []

    asyncio.run(run())


# --- two ---


def test_two_operators_never_both_write_while_one_is_cut_off_stands_still_or_loses_the_lease(
    stored: Stored, tmp_path: Path
) -> None:
    """``Site`` looks, in the moment in which a write is performed, whose the lease is."""

    async def run() -> None:
        times = {"lease_s": 1.5, "renew_s": 0.8, "retry_s": 0.1, "call_s": 5.0}
        async with whole_site(tmp_path, stored.url, **times) as here:
            here.apart = True
            names = [f"s{number}" for number in range(4)]
            here.cluster.model()
            for name in names:
                here.cluster.service(name, scaling={"minReplicas": 1})
            here.start()
            here.start()
            holders = set()
            for turn, trouble in enumerate((no_lease, still, cut_off)):
                await here.until(here.leaders)
                leader = here.leaders()[0]
                holders.add(leader.identity)
                here.server.faults.add(changing, delay_s=0.3, times=4)
                for name in names:
                    here.cluster.service(name, scaling={"minReplicas": 1}, engine={"args": ["--seed", f"{turn}"]})
                await asyncio.sleep(0.1)
                trouble(here, leader)
                await here.until(lambda one=leader: any(other is not one for other in here.leaders()))
                here.server.faults.planned.clear()
            await here.until(lambda: all(seeded(here, name, "2") for name in names), why=here.brief)
            assert len(holders) == 2

    asyncio.run(run())


def changing(call: Call) -> bool:
    return call.write and call.kind not in ("Lease", "Event")


def no_lease(here: WholeSite, one: Operator) -> None:
    """Its renewals get no answer any more; its writes are slow."""
    here.server.faults.add(lambda call: call.user == one.identity and call.kind == "Lease", hang=True, times=None)


def still(here: WholeSite, one: Operator) -> None:
    """It stands still, and goes on where it was when another one leads."""
    here.pause(one, 2.5)


def cut_off(here: WholeSite, one: Operator) -> None:
    """Nothing of it comes through any more."""
    here.server.faults.add(lambda call: call.user == one.identity, hang=True, times=None)
    here.server.cut()


def seeded(here: WholeSite, name: str, seed: str) -> bool:
    """Whether all is as the service's last change wants it."""
    found = [one for one in here.server.all("deployments") if one["metadata"]["labels"]["helios.dev/service"] == name]
    good = [f"'--seed', '{seed}'" in str(one["spec"]["template"]) for one in found]
    return here.cluster.ready(name) == ("True", "Serving") and good == [True]


# --- from any state ---


class Convergence(Faulty):
    """Models and InferenceServices."""

    registry = ""

    def make(self, root: Path) -> WholeSite:
        self.drifts: Counter[str] = Counter()
        return WholeSite(root, self.registry, **TIMES)

    services = st.sampled_from(["a", "b"])
    models = st.sampled_from(["llama", "other"])

    @rule(name=models, branch=st.sampled_from(["main", "later"]))
    def model(self, name: str, branch: str) -> None:
        with contextlib.suppress(Refusal):  # it is being deleted
            storage = CLAIM if name == "other" else {}
            self.here.cluster.model(name, revision={"revision": branch}, storage=storage)

    @rule(name=services, model=models, seed=st.sampled_from(["1", "2"]))
    def service(self, name: str, model: str, seed: str) -> None:
        rollout = {"steps": [100], "stepSeconds": 1}
        engine = {"args": ["--seed", seed], "drainSeconds": 5}  # nobody says what is in flight
        self.here.cluster.service(name, model, scaling={"minReplicas": 1}, rollout=rollout, engine=engine)

    @rule(name=services)
    def delete_service(self, name: str) -> None:
        with contextlib.suppress(Refusal):
            self.here.cluster.delete("inferenceservices", name)

    @rule(name=models)
    def delete_model(self, name: str) -> None:
        with contextlib.suppress(Refusal):
            self.here.cluster.delete("models", name)

    @rule(plural=st.sampled_from(["deployments", "services", "networkpolicies"]), unseen=st.booleans())
    def delete_made(self, plural: str, unseen: bool) -> None:
        for one in self.here.server.all(plural)[:1]:
            self.here.server.delete(plural, one["metadata"]["name"], one["metadata"]["namespace"])
            if unseen:
                self.here.server.compact()

    @rule()
    def drift(self) -> None:
        for one in self.here.server.all("deployments"):
            self.drifts[one["metadata"]["name"]] += 1
            if self.drifts[one["metadata"]["name"]] <= 4:  # another one would be repaired after half a minute
                changed = copy.deepcopy(one)
                changed["spec"]["template"]["spec"]["containers"][0]["image"] = "drifted:1"
                self.here.admin("deployments", "update", changed)


def test_from_any_state_and_through_any_fault_all_is_as_it_should_be_in_the_end(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "HEARD_S", 0.3)
    monkeypatch.setattr(following, "LIST_S", 1.0)
    monkeypatch.setattr(Convergence, "registry", stored.url)
    run_state_machine_as_test(Convergence, settings=tried(4, 20))
