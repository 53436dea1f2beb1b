"""The life of volumes at random: calls repeated and mixed, driver and worker killed, against a model of it."""

import os
import signal
import tempfile
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.support.csi import all_at_once, running_driver
from tests.support.mounts import call, mounted, next_worker, push, worker, write

pytestmark = [pytest.mark.fuse, pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind-mount")]

VOLUMES = {"v0": "org/zero", "v1": "org/one", "v2": "org/zero"}
CONTENT = {"org/zero": b"0" * 5000, "org/one": b"1" * 7000}

volumes = st.sampled_from(sorted(VOLUMES))
places = st.sampled_from(["a", "b", "c"])


def outcome(function, *arguments):
    """The status that a call is refused with, None where it is done."""
    try:
        function(*arguments)
    except grpc.RpcError as error:
        return error.code()
    return None


def machine(driver, mount):
    class Life(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.at: dict[str, str] = {}

        @initialize()
        def nothing_is_there(self):
            assert driver.mounts() == []
            assert call(mount, "GET", "volumes") == {"volumes": []}

        def publish(self, volume, place):
            driver.publish(volume, driver.target(place), model=VOLUMES[volume])

        @rule(volume=volumes, place=places, times=st.integers(1, 3))
        def published(self, volume, place, times):
            for _ in range(times):
                code = outcome(self.publish, volume, place)
                assert code == (None if self.at.get(place, volume) == volume else grpc.StatusCode.ALREADY_EXISTS)
                self.at.setdefault(place, volume)

        @rule(volume=volumes, place=places, times=st.integers(1, 3))
        def unpublished(self, volume, place, times):
            for _ in range(times):
                code = outcome(driver.unpublish, volume, driver.target(place))
                assert code == (None if self.at.get(place, volume) == volume else grpc.StatusCode.NOT_FOUND)
                if code is None:
                    self.at.pop(place, None)

        @rule(chosen=st.lists(st.tuples(volumes, places), min_size=2, max_size=6))
        def published_at_once_and_settled(self, chosen):
            """Whoever is told to come again does; of two volumes for one place the first one stays."""
            all_at_once(*[lambda v=v, p=p: self.publish(v, p) for v, p in chosen])
            there = {Path(mounted).parts[-5]: mounted for mounted in driver.mounts()}
            for place in {place for _, place in chosen}:
                assert place in there
                wanted = [volume for volume, at in chosen if at == place]
                if place in self.at:
                    continue
                found = [volume for volume in wanted if outcome(self.publish, volume, place) is None]
                assert len(set(found)) == 1
                self.at[place] = found[0]

        @rule(volume=volumes, place=places)
        def the_driver_is_killed_while_it_publishes(self, volume, place):
            def kill():
                os.kill(driver.process.pid, signal.SIGKILL)

            all_at_once(lambda: self.publish(volume, place), kill)
            driver.process.wait(10)
            driver.restart()
            self.published(volume, place, 1)

        @rule()
        def the_worker_is_killed(self):
            if mount.state["worker"]:
                last = worker(mount)
                last.send(signal.SIGKILL)
                next_worker(mount, last)

        @invariant()
        def pods_read_what_they_have_and_nothing_else_is_mounted(self):
            assert sorted(driver.mounts()) == sorted(str(driver.target(place)) for place in self.at)
            for place, volume in self.at.items():
                assert (driver.target(place) / "w.bin").read_bytes() == CONTENT[VOLUMES[volume]]
            there = {record["id"] for record in call(mount, "GET", "volumes")["volumes"]}
            assert {f"csi.{volume}" for volume in self.at.values()} <= there

        def teardown(self):
            """Also what a killed driver left goes with the unpublish that the kubelet calls."""
            for place in ("a", "b", "c"):
                for volume in [self.at[place]] if place in self.at else sorted(VOLUMES):
                    driver.unpublish(volume, driver.target(place))
                assert not driver.target(place).exists()
            assert driver.mounts() == []
            assert call(mount, "GET", "volumes") == {"volumes": []}

    return Life


@pytest.mark.slow
def test_volumes_survive_whatever_comes(helios_home, tmp_path):
    with tempfile.TemporaryDirectory() as work:
        for name, content in CONTENT.items():
            push(helios_home, write(Path(work, name), {"w.bin": content}), name)
    with mounted(helios_home, tmp_path / "mnt") as mount, running_driver(helios_home, tmp_path) as driver:
        run_state_machine_as_test(
            machine(driver, mount),
            settings=settings(
                max_examples=6,
                stateful_step_count=15,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
