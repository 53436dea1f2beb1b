"""``helios serve --on-demand`` on a machine with sleep: models take turns on a GPU that can hold one of them awake."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from helios.errors import HeliosError
from helios.home import Home
from helios.launch import demand, sleep
from helios.launch.needs import Need
from helios.launch.pools import MAIN
from tests.conftest import processes_of
from tests.fakes.vllm.verify import ADMINISTRATION
from tests.support.hub_site import write
from tests.support.mirror_site import Site, own_site
from tests.support.on_demand import GPU, ONE_AWAKE, PLACE, SLEEPER, Fakes, running, serving_on_demand
from tests.support.routing import CHAT, RouterProcess, stream

NAMES = ("one", "two")
START_S = 120.0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A registry with models of all ``NAMES``."""
    root = tmp_path_factory.mktemp("site")
    with own_site(root / "site", 1000) as (_, open_):
        site = open_()
        for name in NAMES:
            site.helios("push", str(write(root / name, {"config.json": name.encode()})), f"org/{name}")
        yield site


@contextlib.contextmanager
def sleepers(home: Home, site: Site, **more: Any) -> Iterator[tuple[RouterProcess, Fakes]]:
    with serving_on_demand(home, site.registry.url, **{"pools": ONE_AWAKE, "default": SLEEPER, **more}) as both:
        yield both
        router, _ = both
        told = [message for message in router.messages() if message["level"] not in ("debug", "info")]
        assert told == [], "to the router a model that sleeps is none that is broken"


def answered(router: RouterProcess, name: str) -> bool:
    answer = router.chat(name, timeout_s=START_S)
    return answer.status == 200 and answer.json()["model"] == name


def asleep(fakes: Fakes, name: str) -> Callable[[], bool]:
    def look() -> bool:
        try:
            return bool(fakes.calls(name, "/is_sleeping"))
        except (HeliosError, ValueError):
            return False

    return look


def test_a_model_that_nobody_uses_sleeps_and_is_woken_by_a_request_that_waits(
    site: Site, helios_home: Home, wait_for: Any
) -> None:
    with sleepers(helios_home, site, idle_s=1.0) as (router, fakes):
        assert answered(router, "org/one")
        wait_for(asleep(fakes, "org/one"), timeout_s=60)
        wait_for(lambda: router.up() == 0, timeout_s=60)

        before = len(fakes.control("org/one").journal())
        for path in ADMINISTRATION:
            assert router.request("POST", path, {}).status == 404, path
        assert len(fakes.control("org/one").journal()) == before, "clients reach none of its calls"

        body = {"model": "org/one", "max_tokens": 4, "stream": True, **CHAT}
        sock, answer = stream(router.address, "/v1/chat/completions", body)
        told = answer.read()
        sock.close()
        assert b"data: [DONE]" in told
        targets = [record["target"] for record in fakes.control("org/one").journal("/sleep")]
        assert targets == ["/sleep?level=1&mode=wait"]
        assert fakes.calls("org/one", "/wake_up") == 1
        assert len(fakes.started) == 1, "it is the same process"


def test_two_models_take_turns_and_each_is_started_once(
    site: Site, helios_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "LEAST_S", 0.3)
    with sleepers(helios_home, site) as (router, fakes):
        for _ in range(3):
            assert answered(router, "org/one")
            assert answered(router, "org/two")
        assert len(fakes.started) == 2
        counts = [fakes.calls(f"org/{name}", path) for name in NAMES for path in ("/sleep", "/wake_up")]
        assert counts == [3, 2, 2, 2]


def test_weights_that_main_memory_has_no_room_for_are_read_again(
    site: Site, helios_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "LEAST_S", 0.3)
    with sleepers(helios_home, site, pools={MAIN: 3, GPU: 10}) as (router, fakes):
        for name in ("org/one", "org/two", "org/one"):
            assert answered(router, name)
        journal = [record["target"] for record in fakes.control("org/one").journal()]
        assert [target for target in journal if target != "/v1/chat/completions"] == [
            "/sleep?level=2&mode=wait", "/is_sleeping", "/wake_up?tags=weights", "/collective_rpc",
            "/wake_up?tags=kv_cache", "/is_sleeping",
        ]  # fmt: skip


def test_a_model_that_does_not_fall_asleep_is_stopped_and_never_put_to_sleep_again(
    site: Site, helios_home: Home, wait_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleep, "LULL_S", 1.0)
    with sleepers(helios_home, site, idle_s=1.0) as (router, fakes):
        assert answered(router, "org/one")
        fakes.control("org/one").fault("hang", path="/sleep", times=None)
        wait_for(lambda: running(helios_home) == [], timeout_s=60)
        assert answered(router, "org/one")
        assert len(fakes.started) == 2
        wait_for(lambda: running(helios_home) == [], timeout_s=60)


def test_a_model_that_does_not_wake_is_started_again_for_the_request_that_waits(
    site: Site, helios_home: Home, wait_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleep, "WAKE_S", 1.0)
    with sleepers(helios_home, site, idle_s=2.0) as (router, fakes):
        assert answered(router, "org/one")
        wait_for(asleep(fakes, "org/one"), timeout_s=60)
        fakes.control("org/one").fault("hang", path="/wake_up")
        assert answered(router, "org/one")
        assert len(fakes.started) == 2


def test_one_that_dies_in_its_sleep_is_started_again(site: Site, helios_home: Home, wait_for: Any) -> None:
    with sleepers(helios_home, site, idle_s=2.0) as (router, fakes):
        assert answered(router, "org/one")
        wait_for(asleep(fakes, "org/one"), timeout_s=60)
        (pid,) = [pid for pid, command in processes_of(helios_home).items() if command_of_fake(command)]
        os.kill(pid, signal.SIGKILL)
        assert answered(router, "org/one")
        assert len(fakes.started) == 2


def command_of_fake(command: str) -> bool:
    return "tests.fakes.vllm" in command and "guard.py" not in command


def test_a_model_that_can_not_sleep_is_stopped_for_one_that_can(
    site: Site, helios_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "LEAST_S", 0.3)
    with sleepers(helios_home, site) as (router, fakes):
        fakes.needs["org/one"] = (Need(PLACE, {MAIN: 1, GPU: 8}),)
        for name in ("org/one", "org/two", "org/one"):
            assert answered(router, name)
        assert [one.partition("@")[0] for one in fakes.started] == ["org/one", "org/two", "org/one"]
        assert fakes.calls("org/two", "/sleep") == 1


def test_nothing_is_left_of_one_that_is_killed(site: Site, helios_home: Home, wait_for: Any) -> None:
    command = [sys.executable, "-m", "tests.support.on_demand", str(helios_home.root), site.registry.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        router = RouterProcess(serving.stdout.readline().strip(), serving, helios_home.logs / "router.log")
        for name in ("org/one", "org/two"):  # the one sleeps then
            assert answered(router, name)
        assert len(running(helios_home)) == 2
        serving.kill()
        serving.wait()
    wait_for(lambda: not processes_of(helios_home), timeout_s=60)
