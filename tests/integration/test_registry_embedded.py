"""The embedded registry: one for all, there as long as somebody uses it, repaired after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helios.config import Config, RegistrySettings
from helios.embedded import AttachedRegistry, attach, lock_path, log_path, read_record, running, users_path
from helios.errors import Unavailable
from helios.home import Home
from helios.lockfile import held
from helios.process import ProcessId
from tests.support.registry import running_registry

ENDS_S = 15.0


def starts(home: Home) -> int:
    """How many registries have served on this home."""
    text = log_path(home).read_text() if log_path(home).exists() else ""
    return sum(json.loads(line)["message"] == "serving" for line in text.splitlines() if line.startswith("{"))


def attached(home: Home) -> AttachedRegistry:
    return attach(Config(), home, {**os.environ, "HELIOS_HOME": str(home.root)})


@pytest.fixture
def ended(helios_home: Home, wait_for: Callable[..., None]) -> Iterator[None]:
    """When the test is over the registry must end by itself and leave nothing in run/."""
    yield
    wait_for(lambda: not held(lock_path(helios_home)), ENDS_S, "the registry's end")
    wait_for(lambda: read_record(helios_home) is None, ENDS_S, "registry.json going")


def test_eight_starters_one_registry(helios: Any, helios_home: Home, ended: None) -> None:
    processes = [helios.start("ls", "--json") for _ in range(8)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, json.loads(out)) == (0, []), err
    assert starts(helios_home) == 1


def test_it_stays_for_its_users_and_ends_after_the_last(helios_home: Home, wait_for: Callable[..., None]) -> None:
    first = attached(helios_home)
    record = running(helios_home)
    assert record is not None
    assert record.embedded
    assert abs(record.started - time.time()) < 60
    with attached(helios_home) as second:
        assert second.client().repos() == []
    time.sleep(3.5)  # longer than its grace without users
    assert first.client().repos() == []
    assert running(helios_home) == record
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:  # a child inherits no use of it
        first.close()
        first.close()
        process = ProcessId(record.pid, record.start)
        wait_for(lambda: not process.alive(), ENDS_S, "the registry's end")
        child.kill()
    assert not held(lock_path(helios_home))
    assert read_record(helios_home) is None
    assert not Path(record.socket).exists()


def test_users_that_come_while_it_ends_always_find_one(helios_home: Home, ended: None) -> None:
    rng = random.Random(5)
    failures: list[BaseException] = []

    def use(delays: list[float]) -> None:
        try:
            for delay in delays:
                time.sleep(delay)
                with attached(helios_home) as registry:
                    assert registry.client().repos() == []
        except BaseException as error:
            failures.append(error)

    # It looks every half second and ends after two seconds without users: these come about then.
    threads = [threading.Thread(target=use, args=([rng.uniform(2.0, 2.9) for _ in range(3)],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not failures


def test_a_killed_one_is_replaced(
    helios: Any, helios_home: Home, tmp_path: Path, ended: None, wait_for: Callable[..., None]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    commit = helios("push", tmp_path / "model", "org/name").out
    with attached(helios_home) as mount:  # a long-lived user
        for _ in range(2):
            record = running(helios_home)
            assert record is not None
            os.kill(record.pid, signal.SIGKILL)
            assert ProcessId(record.pid, record.start).wait(10)
            assert read_record(helios_home) is not None  # what it left is stale, and does no harm
            wait_for(lambda: running(helios_home) is None, what="the killed registry's lock")
            client = mount.client()
            with pytest.raises(Unavailable):
                client.repos()
            mount.ensure()
            assert [r.repo for r in client.repos()] == ["models/org/name"]
        os.kill(running(helios_home).pid, signal.SIGKILL)  # type: ignore[union-attr]
        assert helios("show", "org/name", "--json").json()["commit"] == commit.strip()


def test_one_that_is_terminated_leaves_cleanly(helios_home: Home, ended: None) -> None:
    with attached(helios_home):
        record = running(helios_home)
        assert record is not None
        process = ProcessId(record.pid, record.start)
        assert process.send(signal.SIGTERM)
        assert process.wait(15)
        assert read_record(helios_home) is None


def test_a_registry_of_its_own_is_used_and_guards_its_home(helios: Any, helios_home: Home) -> None:
    with running_registry(helios) as registry:
        with attached(helios_home) as found:
            assert found.urls == [registry.url]
        second = helios("registry", "--port", "0", code=1)
        assert f"pid {registry.pid}" in second.err
        assert "since 20" in second.err
        assert registry.url in second.err
        time.sleep(3.5)  # it does not end when nobody uses it
        with contextlib.closing(registry.client()) as client:
            assert client.repos() == []
    assert starts(helios_home) == 0
    assert not held(lock_path(helios_home))


def test_an_embedded_one_is_named_too(helios: Any, helios_home: Home, ended: None) -> None:
    with attached(helios_home):
        record = running(helios_home)
        assert record is not None
        assert f"an embedded one, pid {record.pid}" in helios("registry", "--port", "0", code=1).err


def test_a_busy_port_is_said_with_the_flag(helios: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        problem = helios("registry", "--port", port, code=1).err
    assert port in problem
    assert "--port" in problem
    assert "Traceback" not in problem


def test_the_url_line_is_all_of_stdout(helios: Any) -> None:
    process = helios.start("registry", "--port", "0", stderr=subprocess.DEVNULL)
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    assert process.stdout.read() == ""


def test_an_interrupted_one_exits_130(helios: Any) -> None:
    process = helios.start("registry", "--port", "0", stderr=subprocess.DEVNULL)
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 130


def test_a_home_that_can_not_be_used(helios: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    env = {"HELIOS_HOME": str(tmp_path / "file" / "home")}
    for command in (("ls",), ("registry", "--port", "0")):
        problem = helios(*command, env=env, code=1).err
        assert "HELIOS_HOME" in problem
        assert "Traceback" not in problem


def test_the_reason_it_can_not_start_is_said(helios: Any, helios_home: Home) -> None:
    helios_home.registry.mkdir(parents=True)
    (helios_home.registry / "metadata.db").write_bytes(b"not a database at all" * 500)
    problem = helios("ls", code=1).err
    assert "the registry can't start" in problem
    assert "damaged" in problem
    assert "Traceback" not in problem


def test_when_it_dies_at_start_its_last_log_lines_are_shown(helios: Any, helios_home: Home) -> None:
    helios_home.ensure_run()
    (helios_home.run / "registry.sock").mkdir()  # something nobody thought of
    problem = helios("ls", code=1).err
    assert "died at its start" in problem
    assert "IsADirectoryError" in problem
    assert problem.count("Traceback") == 1  # the registry's, not ours


def test_a_store_of_another_registry_is_refused(helios: Any, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with running_registry(helios, "--store", store):
        pass
    other = {"HELIOS_HOME": str(tmp_path / "other")}
    assert "belongs to another registry" in helios("registry", "--port", "0", "--store", store, env=other, code=1).err


def test_a_deep_home(helios: Any, tmp_path: Path, wait_for: Callable[..., None]) -> None:
    home = Home(tmp_path / ("deep" * 30) / ("deeper" * 20))
    env = {"HELIOS_HOME": str(home.root)}
    assert helios("ls", "--json", env=env).json() == []
    wait_for(lambda: not held(lock_path(home)), ENDS_S, "the registry's end")


def test_configured_urls_are_used_instead(helios: Any, helios_home: Home, tmp_path: Path) -> None:
    with running_registry(helios) as registry:
        other = Home(tmp_path / "elsewhere")
        config = Config(registry=RegistrySettings(urls=["http://127.0.0.1:9", registry.url]))
        with attach(config, other, os.environ) as found:
            assert not found.embedded
            assert found.client().repos() == []
            found.ensure()
        assert not other.root.exists()


def test_locks_do_not_outlive_a_killed_user(helios_home: Home, ended: None) -> None:
    script = (
        "import os,sys,time; from helios.config import Config; from helios.embedded import attach\n"
        "from helios.home import Home\n"
        "r = attach(Config(), Home.from_env(os.environ)); print('attached', flush=True); time.sleep(60)\n"
    )
    env = {**os.environ, "HELIOS_HOME": str(helios_home.root)}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "attached\n"
        assert held(users_path(helios_home)) is False  # held shared: others may come
        user.kill()
