"""Names of models at the registry, in requests to a real router, with a real registry before a simulated Hub."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helios.http.client import HttpClient
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.hub_site import write
from tests.support.mirror_site import MB, Site, own_site
from tests.support.routing import CHAT, Response, RouterProcess, StartRouter, start_router, stream
from tests.support.wake_hook import Hook, hook

__all__ = ["allowed_violations", "fake_vllm", "hook", "start_router"]
ROUTE = "/v1/chat/completions"
FakeVllm = Callable[..., Control]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with own_site(tmp_path / "site", 1000) as (_, open_):
        site = open_()
        monkeypatch.setenv("HELIOS_REGISTRY__URLS", json.dumps([site.registry.url]))
        yield site


def discovery(**settings: Any) -> str:
    return json.dumps({"resolve": True, "resolve_ttl_s": 0.2, "fetch": ["org/*"], **settings})


def push(site: Site, root: Path, repo: str, text: str) -> str:
    """Publish another version; returns its commit."""
    return site.helios("push", str(write(root / text, {"config.json": f'{{"text": "{text}"}}'.encode()})), repo)


def code_of(answer: Response) -> tuple[int, str]:
    return answer.status, answer.json()["error"]["code"]


def test_an_alias_is_followed_to_the_workers_of_its_commit_also_while_the_registry_is_away(
    site: Site, start_router: StartRouter, fake_vllm: FakeVllm, tmp_path: Path, wait_for: Any
) -> None:
    first = push(site, tmp_path, "org/name", "one")
    site.helios("ref", "set", "org/name", "champion", "--alias")
    second = push(site, tmp_path, "org/name", "two")
    one, two = fake_vllm("org/name"), fake_vllm("org/name")
    router = start_router(
        f"org/name={one.url},revision={first}", f"org/name={two.url},revision={second}",
        discovery=discovery(resolve_timeout_s=5.0), aliases=json.dumps({"best": "org/name@champion"}),
        policy="round-robin",
    )  # fmt: skip
    for name in ["org/name@champion", "best", f"org/name@{first}"] * 2:
        answer = router.chat(name)
        assert answer.status == 200, answer.body
        assert answer.json()["model"] == "org/name", "the first request of a name, too"
    assert (len(one.journal()), len(two.journal())) == (6, 0)
    listed = [card["id"] for card in router.request("GET", "/v1/models").json()["data"]]
    assert listed == ["org/name"], "commits are no models of their own"
    assert code_of(router.chat("org/none")) == (404, "model_not_found")
    assert code_of(router.chat(f"org/name@{first[:-1]}0")) == (404, "model_not_found")

    site.helios("ref", "set", f"org/name@{second}", "champion")
    wait_for(
        lambda: router.chat("org/name@champion").status == 200 and two.journal(),
        timeout_s=60,
        what="the alias to be followed",
    )
    before = len(one.journal())
    site.helios("deprecate", "org/name", "-m", "it is wrong", "--use", "org/better")
    warning = "org/name is deprecated: it is wrong Use org/better."
    wait_for(lambda: router.chat("best").header("x-helios-warning") == warning, timeout_s=60)
    site.registry.kill()
    for _ in range(5):
        assert router.chat("org/name@champion").status == 200
        assert router.chat("org/name").status == 200
    assert code_of(router.chat("org/never-heard-of")) == (503, "model_unavailable")
    assert len(one.journal()) <= before + 5, "what names the alias has gone to the other one"
    assert router.in_flight() == 0


@contextmanager
def administration(router: RouterProcess, home: Any) -> Iterator[HttpClient]:
    client = HttpClient(f"unix:{home.run / f'router-{router.address[1]}.sock'}")
    try:
        yield client
    finally:
        client.close()


def register(router: RouterProcess, home: Any, worker: Control, model: str, revision: str) -> None:
    with administration(router, home) as client:
        body = {"url": worker.url, "models": [model], "revision": revision, "lease_s": 60.0}
        client.json("PUT", "/workers/woken", body=body)


def test_requests_are_held_while_a_model_is_fetched_and_woken(
    site: Site, start_router: StartRouter, fake_vllm: FakeVllm, hook: Hook, helios_home: Any, wait_for: Any
) -> None:
    commit = site.hub.commit("org/large", {"config.json": b"{}", "model.bin": bytes(3 * MB)})
    site.hub.bytes_per_s = 2 * MB
    admission = json.dumps({"wake_url": hook.url, "queue": {"comment_after_s": 0.2}})
    router = start_router(discovery=discovery(hold=True), admission=admission, processes=2, wait_up=False)
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(router.chat, "org/large") for _ in range(3)]
        body = {"model": "org/large", "max_tokens": 4, "stream": True, **CHAT}
        sock, answer = stream(router.address, ROUTE, body)
        assert (answer.status, answer.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
        seen = []
        while not hook.documents:
            seen.append(answer.readline())
        assert any(b": waking it is being fetched (" in line for line in seen), "how far the download is"
        assert hook.documents[0] == {"model": "org/large", "commit": commit, "revision": "main"}
        while b"40%" not in (line := answer.readline()):
            assert line.startswith(b": ") or line == b"\n"
        assert not any(one.done() for one in whole)
        worker = fake_vllm("org/large")
        register(router, helios_home, worker, "org/large", commit)
        assert b"data: [DONE]" in answer.read()
        sock.close()
        assert [one.result(30).status for one in whole] == [200] * 3
    assert len(hook.documents) <= 3, "one flight for all processes: again every 2 s"
    assert router.chat(f"org/large@{commit}").status == 200, "and a pinned name of it is served, too"
    assert len(worker.journal()) == 5
    wait_for(lambda: router.in_flight() == 0 and router.metric("helios_router_queued") == 0, timeout_s=60)
    site.hub.bytes_per_s = None


def test_traffic_while_a_model_is_scaled_to_zero_and_back(
    site: Site, start_router: StartRouter, fake_vllm: FakeVllm, hook: Hook, helios_home: Any, wait_for: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Nobody hears of it: who asks meanwhile waits."""
    commit = push(site, tmp_path, "org/name", "one")
    admission = json.dumps({"wake_url": hook.url})
    router = start_router(discovery=discovery(hold=True), admission=admission, processes=2, wait_up=False)
    worker = fake_vllm("org/name")
    register(router, helios_home, worker, "org/name", commit)
    wait_for(lambda: router.up() == 1, what="the worker to be up")
    outcomes, over = Counter[Any](), threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                outcomes[router.chat("org/name", timeout_s=60).status] += 1
            except (OSError, http.client.HTTPException) as error:
                outcomes[repr(error)] += 1

    asking = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in asking:
        thread.start()
    try:
        for _ in range(2):
            enough = outcomes.total() + 20
            wait_for(lambda enough=enough: outcomes.total() > enough, timeout_s=60, what="requests to be served")
            wishes = len(hook.documents)
            with administration(router, helios_home) as client:
                assert client.json("DELETE", "/workers/woken")["everywhere"]
            wait_for(lambda: router.metric("helios_router_queued") == len(asking), timeout_s=60, what="all to wait")
            wait_for(lambda n=wishes: len(hook.documents) > n, timeout_s=60, what="the model to be asked for")
            assert worker.metric("vllm:num_requests_running") == 0
            worker = fake_vllm("org/name")  # at another address
            register(router, helios_home, worker, "org/name", commit)
    finally:
        enough = outcomes.total() + 20
        wait_for(lambda: outcomes.total() > enough, timeout_s=60, what="requests to be served")
        over.set()
        for thread in asking:
            thread.join(60)
    assert set(outcomes) == {200}
    assert (router.in_flight(), router.metric("helios_router_queued")) == (0, 0)


def test_without_hold_the_answer_says_how_far_it_is(
    site: Site, start_router: StartRouter, fake_vllm: FakeVllm, hook: Hook, helios_home: Any, wait_for: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    commit = push(site, tmp_path, "org/name", "one")
    router = start_router(
        discovery=discovery(), admission=json.dumps({"wake_url": hook.url}), answer_model="asked", wait_up=False
    )
    answer = router.chat("org/name@main")
    assert code_of(answer) == (503, "model_not_ready"), "known by the first answer: nothing is to be fetched"
    assert int(answer.header("retry-after") or 0) > 0
    wait_for(lambda: "40%" in router.chat("org/name@main").json()["error"]["message"], timeout_s=60)
    worker = fake_vllm("org/name")
    register(router, helios_home, worker, "org/name", commit)
    wait_for(lambda: router.chat("org/name@main").status == 200, timeout_s=60)
    assert router.chat("org/name@main").json()["model"] == "org/name@main", "the name that was asked for"
    assert hook.documents[0] == {"model": "org/name", "commit": commit, "revision": commit}

    hook.says = 409, {"message": "no GPU is free"}
    push(site, tmp_path, "org/other", "two")
    wait_for(lambda: "no GPU is free" in router.chat("org/other").json()["error"]["message"], timeout_s=60)


def test_who_waits_and_leaves_is_forgotten_and_a_model_that_does_not_come_is_told(
    site: Site, start_router: StartRouter, hook: Hook, wait_for: Any, tmp_path: Path
) -> None:
    push(site, tmp_path, "org/name", "one")
    admission = json.dumps({"wake_url": hook.url, "queue": {"comment_after_s": 0.2}})
    router = start_router(discovery=discovery(hold=True), admission=admission, wait_up=False)
    body = {"model": "org/name", "stream": True, **CHAT}
    sock, answer = stream(router.address, ROUTE, body)
    assert answer.readline().startswith(b": waking")
    assert router.metric("helios_router_queued") == 1
    answer.close()
    sock.close()
    wait_for(lambda: router.metric("helios_router_queued") == 0, timeout_s=60)
    hook.says = 409, {"message": "no GPU is free"}
    refused = router.chat("org/name")
    assert code_of(refused) == (503, "model_unavailable")
    assert "no GPU is free" in refused.json()["error"]["message"]
    assert router.metric("helios_router_queued") == 0
