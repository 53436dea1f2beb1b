"""Stateful tests of convergence: what an API server, its watches and the deaths of operators do to any operator.

A subclass says where (``make``), what people do (rules of its own), and the site what is wrong (``Site.wrong``).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.operators import Site

TIMES: dict[str, Any] = {"lease_s": 1.0, "renew_s": 0.6, "retry_s": 0.02, "silence_s": 0.4}
STILL_S = 30.0
"""Longest time until nothing is wrong and nothing is written any more once all is well, in seconds."""


def tried(examples: int, steps: int) -> settings:
    """So many examples; each try of a smaller one would take half a minute."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    return settings(max_examples=examples, stateful_step_count=steps, deadline=None, phases=phases)


class Faulty(RuleBasedStateMachine):
    """Whatever people, faults and the deaths of operators do: once all is well everything is as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = tempfile.TemporaryDirectory()
        self.here = self.make(Path(self.root.name))
        self.operators: list[Any] = []

    def make(self, root: Path) -> Site:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.runner.run(self.here.open())
        self.operator()
        self.operator()

    @rule()
    def operator(self) -> None:
        async def begin() -> None:
            self.operators.append(self.here.start())

        if len(self.operators) < 2:
            self.runner.run(begin())

    @rule()
    def kill(self) -> None:
        if self.operators:
            self.runner.run(self.here.kill(self.operators.pop(0)))

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.25]))
    def time_passes(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

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
        async def settled() -> None:
            """Nothing is wrong, and steady state makes no writes. What is right may change once more: a registry on a
            busy machine takes longer to say what a revision names now."""
            wrong, writes = self.here.wrong(), await self.here.still(0.4)
            end = time.monotonic() + STILL_S
            while wrong or writes or self.here.wrong():
                assert time.monotonic() < end, (wrong, writes)
                wrong, writes = self.here.wrong(), await self.here.still(0.4)

        try:
            self.heal()
            self.runner.run(settled())
            self.runner.run(self.here.close())
        finally:
            self.runner.close()
            self.root.cleanup()
