"""Workers that fail in every way, a fleet that grows and shrinks, clients that leave: nothing is lost, nothing is left.

The short form of `scripts/soak.py --router`. What may fail and what is lost: tests/support/chaos/verdict.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from helios.config import RouterSettings
from tests.support.chaos.board import Count
from tests.support.chaos.scenario import FAULTS, HARMLESS, Scenario, scenario
from tests.support.chaos.verdict import UNREAD, Verdict
from tests.support.routing import StartRouter, start_router

__all__ = ["start_router"]
pytestmark = pytest.mark.slow
DEFAULT: Final = str(RouterSettings().policy)


def judged(chaos: Scenario) -> Verdict:
    """Nothing was lost or done twice, and nothing is left."""
    verdict = chaos.verdict()
    assert verdict.lost == [], "\n".join(verdict.lost)
    assert verdict.twice == []
    assert chaos.left_over() == []
    return verdict


def test_every_fault_of_a_worker(start_router: StartRouter, tmp_path: Path) -> None:
    with scenario(start_router, tmp_path, seed=1, policy=DEFAULT, guarded=True) as chaos:
        chaos.ready(4)
        for faults in (HARMLESS, FAULTS):
            with chaos.load(16) as load:
                for fault in chaos.shuffled(faults):
                    chaos.strike(fault)
                    chaos.more(load, 20)
                chaos.mended()
            if faults is HARMLESS:
                assert set(chaos.verdict().allowed) <= {UNREAD}
        verdict = judged(chaos)
        assert min(verdict.right[kind] for kind in ("chat", "stream", "embedding")) > 20
        assert 0 < verdict.allowed.total() < verdict.right.total()
        assert chaos.router.metric("helios_router_retries_total") > 3
        assert chaos.router.metric("helios_router_tokens_total") > 0  # limits are on


def test_a_fleet_that_grows_and_shrinks_under_load(start_router: StartRouter, tmp_path: Path) -> None:
    with scenario(start_router, tmp_path, seed=2) as chaos:
        chaos.ready(1)
        with chaos.load(16) as load:
            for count in (32, 1):
                chaos.scale(count)
                chaos.more(load, 100)
        verdict = judged(chaos)
        assert verdict.allowed.total() == 0  # nothing has failed at all
        assert sum(chaos.fleet.board.get(slot, Count.TAKEN) > 0 for slot in range(32)) > 16  # they were of use


def test_processes_killed_under_load(start_router: StartRouter, tmp_path: Path) -> None:
    with scenario(
        start_router, tmp_path, seed=3, processes=2, registration=True, policy=DEFAULT, guarded=True
    ) as chaos:
        chaos.ready(3)
        with chaos.load(16) as load:
            for harm in (chaos.kill_router, chaos.kill_control, chaos.kill_router):
                chaos.more(load, 50)
                harm()
            chaos.scale(1)
            chaos.more(load, 50)
        judged(chaos)


def test_clients_that_leave_inside_their_streams(start_router: StartRouter, tmp_path: Path) -> None:
    with scenario(start_router, tmp_path, seed=4, processes=2) as chaos:
        chaos.ready(2)
        chaos.leave(400, 100)
        verdict = judged(chaos)
        assert verdict.right["leaves"] == 400
        assert chaos.router.metric("helios_router_client_disconnects_total") == 400
