"""Operators that are killed at any action, that are two, and that meet every fault an API server has."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.fakes.kubernetes.errors import Refusal
from tests.support.operators import Site, site
from tests.support.sample_operator import greeting

NEVER = 10**6
WRITES = 9
"""Of two Greetings: finalizers, maps, deployments and statuses, and one scale."""


def writes(call):
    return call.write and bool(call.user) and call.kind not in ("Lease", "Event")


async def killed_at(root: Path, number: int, how: str) -> int:
    """An operator that ends with its write of this number; the writes that there were."""
    async with site(root) as here:
        here.admin("greetings", "create", greeting("a", replicas=3))
        here.admin("greetings", "create", greeting("gone"))
        first, seen, reached = here.start(), 0, asyncio.Event()

        def nth(call):
            nonlocal seen
            seen += writes(call)
            if writes(call) and seen == number:
                reached.set()
                return True
            return False

        here.server.faults.add(nth, lost=how == "after", hang=how == "before")
        if number == NEVER:
            await here.converged()
        else:
            async with asyncio.timeout(30):
                await reached.wait()
        there = seen
        await here.kill(first)
        here.server.delete("leases", "helios-operator")  # who has never seen it need not wait
        here.remove("greetings", "gone")
        changed = copy.deepcopy(next(one for one in here.server.all("greetings") if one["metadata"]["name"] == "a"))
        changed["spec"]["text"] = "changed"
        here.admin("greetings", "update", changed)
        here.start()
        await here.until(lambda: [one["metadata"]["name"] for one in here.server.all("greetings")] == ["a"])
        await here.converged()
        return there


@pytest.mark.parametrize("how", ["before", "after"])
def test_an_operator_that_is_killed_at_any_write_is_followed_by_one_that_converges(tmp_path, how):
    assert asyncio.run(killed_at(tmp_path, NEVER, how)) >= WRITES
    for number in range(1, WRITES + 1):
        root = tmp_path / str(number)
        root.mkdir()
        asyncio.run(killed_at(root, number, how))


def test_two_operators_never_both_write_while_calls_hang_and_leases_are_lost(tmp_path):
    """``Site`` looks, in the moment in which a write is performed, whose the lease is."""

    async def run():
        async with site(tmp_path, lease_s=1.0, renew_s=0.5, retry_s=0.05, call_s=5.0) as here:
            for number in range(6):
                here.admin("greetings", "create", greeting(f"g{number}"))
            operators = [here.start(), here.start()]
            holders = set()
            for turn in range(4):
                await here.until(lambda: any(one.leadership.remaining_s() > 0 for one in operators))
                (leader,) = [one for one in operators if one.leadership.remaining_s() > 0]
                holders.add(leader.identity)
                # The leader's renewals get no answer any more, and its writes are slow.
                here.server.faults.add(
                    lambda call, who=leader.identity: call.user == who and call.kind == "Lease", hang=True, times=None
                )
                here.server.faults.add(writes, delay_s=0.4, times=4)
                for number in range(6):
                    one = copy.deepcopy(here.server.all("greetings")[number])
                    one["spec"]["text"] = f"{turn}"
                    here.admin("greetings", "update", one)
                await here.until(lambda who=leader: who.leadership.remaining_s() == 0)
                await asyncio.sleep(0.3)
                await here.until(lambda: any(one.leadership.remaining_s() > 0 for one in operators))
                here.server.faults.planned.clear()
            await here.converged()
            assert len(holders) == 2

    asyncio.run(run())


class Convergence(RuleBasedStateMachine):
    """Whatever people, faults and the deaths of operators do: once all is well everything is as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = tempfile.TemporaryDirectory()
        self.here = Site(Path(self.root.name), lease_s=1.0, renew_s=0.6, retry_s=0.02, silence_s=0.4)
        self.operators = []
        self.drifts: Counter[tuple[str, str]] = Counter()

    @initialize()
    def start(self) -> None:
        self.runner.run(self.here.open())
        self.operator()
        self.operator()

    names = st.sampled_from(["a", "b", "c"])

    def _run(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @rule()
    def operator(self) -> None:
        async def begin():
            self.operators.append(self.here.start())

        if len(self.operators) < 2:
            self.runner.run(begin())

    @rule()
    def kill(self) -> None:
        if self.operators:
            self.runner.run(self.here.kill(self.operators.pop(0)))

    @rule(name=names, text=st.sampled_from(["x", "y"]), deploy=st.booleans(), replicas=st.integers(0, 3))
    def want(self, name: str, text: str, deploy: bool, replicas: int) -> None:
        one = greeting(name, text, deploy=deploy, replicas=replicas if deploy else min(1, replicas))
        with contextlib.suppress(Refusal):  # it is being deleted
            found = [each for each in self.here.server.all("greetings") if each["metadata"]["name"] == name]
            if found:
                one = copy.deepcopy(found[0]) | {"spec": one["spec"]}
            self.here.admin("greetings", "update" if found else "create", one)

    @rule(name=names, plural=st.sampled_from(["greetings", "configmaps", "deployments"]))
    def delete(self, name: str, plural: str) -> None:
        with contextlib.suppress(Refusal):
            self.here.remove(plural, name)

    @rule(name=names)
    def delete_unseen(self, name: str) -> None:
        self.here.server.delete("deployments", name)
        self.here.server.compact()

    @rule(name=names, plural=st.sampled_from(["configmaps", "deployments"]))
    def drift(self, name: str, plural: str) -> None:
        self.drifts[name, plural] += 1
        if self.drifts[name, plural] > 4:
            return  # another one would be repaired after half a minute
        for one in self.here.server.all(plural):
            if one["metadata"]["name"] == name:
                changed = copy.deepcopy(one)
                if plural == "configmaps":
                    changed["data"] = {"text": "drifted"}
                else:
                    changed["spec"]["replicas"] = 9
                    changed["spec"]["template"]["spec"]["containers"][0]["image"] = "drifted:1"
                self.here.admin(plural, "update", changed)

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.25]))
    def time_passes(self, seconds: float) -> None:
        self._run(seconds)

    @rule(how=st.sampled_from(["cut", "end", "compact"]))
    def watches(self, how: str) -> None:
        getattr(self.here.server, how)()

    @rule(mute=st.booleans())
    def silence(self, mute: bool) -> None:
        self.here.server.mute = mute

    @rule(
        status=st.sampled_from([403, 404, 409, 429, 500, 503, None]), times=st.integers(1, 4),
        lost=st.booleans(), hang=st.booleans(), delay=st.sampled_from([0.0, 0.05]),
    )  # fmt: skip
    def fault(self, status: int | None, times: int, lost: bool, hang: bool, delay: float) -> None:
        hang = hang and status is None and not lost
        self.here.server.faults.add(
            lambda call: call.verb != "watch", status=status, times=times, lost=lost, hang=hang, delay_s=delay
        )  # fmt: skip

    @rule()
    def heal(self) -> None:
        self.here.server.faults.planned.clear()
        self.here.server.mute = False
        if not self.operators:
            self.operator()
        self.runner.run(self.here.converged())

    @invariant()
    def nothing_is_said_that_a_server_refuses(self) -> None:
        assert self.here.server.complaints == []
        assert self.here.deposed == []

    def teardown(self) -> None:
        try:
            self.heal()

            async def quiet():
                await asyncio.sleep(0.3)
                return await self.here.still(0.2)

            assert self.runner.run(quiet()) == {}, "steady state makes no writes"
            self.runner.run(self.here.close())
        finally:
            self.runner.close()
            self.root.cleanup()


TestConvergence = Convergence.TestCase
TestConvergence.settings = settings(
    max_examples=5, stateful_step_count=15, deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # each try of a smaller one would take half a minute
)  # fmt: skip
