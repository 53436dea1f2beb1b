"""Three registries, or three routers, behind a plain TCP balancer: killing one loses nothing that it had acknowledged.

What a client had asked the dead one and has no answer to fails, visibly, and is asked again by whoever may ask twice:
the mount by itself, OpenAI's client for what has not begun to answer, a person for a push.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from helios.home import Home
from helios.names import RepoId
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.mounts import mounted, write
from tests.support.redis import Server, redis_server
from tests.support.registry import Registries, Running
from tests.support.routing import StartRouter, start_router
from tests.support.slow_link import Spread

__all__ = ["allowed_violations", "fake_vllm", "redis_server", "start_router"]
Start = Callable[..., Control]
MIB = 1 << 20
TOKENS = 12
LIMIT = 8
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def registries(helios: Any, helios_home: Home, tmp_path: Path, postgres_url: str) -> Iterator[list[Running]]:
    """Three on one PostgreSQL and one store."""

    def start(name: str, log: int) -> subprocess.Popen[str]:
        environ = {"HELIOS_HOME": str(helios_home.root / name), "HELIOS_REGISTRY__DATABASE": postgres_url}
        command = ("registry", "--port", "0", "--json", "--store", tmp_path / "store")
        started: subprocess.Popen[str] = helios.start(*command, env=environ, stderr=log)
        return started

    with Registries(helios_home.root) as group:
        yield group.start(*(partial(start, name) for name in "abc"))


@pytest.mark.fuse
def test_a_registry_that_is_killed_costs_readers_and_pushers_nothing(
    helios: Any, helios_home: Home, tmp_path: Path, registries: list[Running], wait_for: Callable[..., None]
) -> None:
    """Cold reads through a mount and pushes by the command go on while one of three is killed: every read has the right
    bytes, a push is either done or says that it isn't, and then succeeds when it is repeated."""
    content = {f"{n}.bin": random.Random(n).randbytes(4 * MIB) for n in range(6)}
    with Spread(*(each.url for each in registries)) as link:
        environ = {"HELIOS_REGISTRY__URLS": link.url}
        commit = helios("push", str(write(tmp_path / "read", content)), "org/read", env=environ).out.strip()
        failures: Counter[str] = Counter()
        pushed: dict[str, str] = {}

        def read(path: Path, names: list[str]) -> list[str]:
            return [name for name in names if (path / name).read_bytes() != content[name]]

        def push_until_done(number: int) -> None:
            model = write(tmp_path / f"p{number}", {"a.bin": random.Random(90 + number).randbytes(3 * MIB)})
            for _ in range(5):
                process = helios.start("push", str(model), f"org/p{number}", env=environ, stderr=subprocess.PIPE)
                out, error = process.communicate(timeout=60)
                if process.returncode == 0:
                    pushed[f"org/p{number}"] = out.strip()
                    return
                failures[error] += 1

        with mounted(helios_home, tmp_path / "mnt", "--registry", link.url) as mount, ThreadPoolExecutor(8) as pool:
            path = mount.path / "org/read" / commit
            link.throttle.rate = 8.0 * MIB  # so that all of it is under way when one dies
            begun = link.passed
            reads = [pool.submit(read, path, names) for names in (sorted(content), sorted(content, reverse=True))]
            pushes = [pool.submit(push_until_done, number) for number in range(3)]
            wait_for(lambda: link.passed - begun > 4 * MIB, 30, "reads being under way")
            registries[1].kill()
            link.throttle.rate = None
            assert [each.result(60) for each in reads] == [[], []]
            for each in pushes:
                each.result(120)
        for said in failures:
            assert "can't be reached" in said or "did not answer" in said, said
        assert sum(failures.values()) <= 3, "each was disturbed once at the most"
    assert len(pushed) == 3
    for survivor in (registries[0], registries[2]):
        with contextlib.closing(survivor.client()) as client:
            found = {name: client.resolve(RepoId.parse(name), "main").commit for name in pushed}
            assert found == pushed


def test_a_router_that_is_killed_costs_what_it_was_streaming_and_no_count(
    fake_vllm: Start, start_router: StartRouter, redis_server: Server, wait_for: Callable[..., None]
) -> None:
    """OpenAI's client asks again by itself where no answer had begun; a stream at the dead one ends with an error and
    never as if it were whole. Shared limits count on, without what nobody uses any more."""
    limited = f"org/{secrets.token_hex(4)}"
    fake, other = fake_vllm("tiny", token_s=0.02), fake_vllm(limited)
    ours = json.dumps(
        {"models": {limited: {"requests_per_minute": LIMIT}}, "shared": {"url": redis_server.url, "timeout_s": 5}}
    )
    routers = [start_router(fake, other, admission=ours) for _ in range(3)]
    victim, *alive = routers
    begun = time.monotonic()
    assert [each.chat(limited).status for each in routers + alive] == [200] * 5
    urls = [each.url for each in routers]
    with Spread(*urls) as link, Spread(*urls) as for_streams, ThreadPoolExecutor(18) as pool:
        stop = threading.Event()
        streams = [pool.submit(read_stream, for_streams.url) for _ in range(9)]
        wait_for(lambda: [each.in_flight() for each in routers] == [3, 3, 3], what="three streams at each")
        whole = [pool.submit(ask_until, stop, link.url) for _ in range(9)]
        wait_for(lambda: all(each.in_flight() > 3 for each in routers), what="answers under way at each")
        for pid in (victim.process.pid, *victim.pids("control"), *victim.pids()):  # all of a pod at once
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: sum(each.done() for each in streams) >= 3, what="the dead one's streams being over")
        stop.set()
        answers = [count for each in whole for count in each.result(60)]
        ends = Counter(each.result(60) for each in streams)
    assert set(answers) == {TOKENS}, "every one is whole, whoever answered"
    assert ends == {"broken": 3, "whole": 6}, "those of the dead one, and no others"
    wait_for(lambda: sum(each.in_flight() for each in alive) == 0, what="counts of zero")
    wait_for(lambda: fake.metric("vllm:num_requests_running") == 0, what="the worker having nobody left")
    allowed = 0
    while alive[allowed % 2].chat(limited).status == 200:
        allowed += 1
    refilled = (time.monotonic() - begun) * LIMIT / 60
    assert LIMIT <= 5 + allowed <= LIMIT + refilled + 1, "what three counted before, of which one is gone, counts"
    with contextlib.closing(redis.Redis(unix_socket_path=str(redis_server.socket))) as client:
        assert all(client.ttl(key) > 0 for key in client.keys("*")), "what nobody asks for again goes by itself"


def ask_until(stop: threading.Event, url: str) -> list[int]:
    """Ask again and again as applications do; how long the answers were, in tokens. Raises what the client raises."""
    found = []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        while not stop.is_set():
            answer = client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=TOKENS, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None
            found.append(answer.usage.completion_tokens)
    return found


def read_stream(url: str) -> str:
    """How a stream of some four seconds ends."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        chunks = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        try:
            last = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
        except (openai.APIConnectionError, httpx.TransportError):
            return "broken"
    return "whole" if last == "length" else f"it ends with {last}"
