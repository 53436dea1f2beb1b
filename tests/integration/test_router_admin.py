"""Workers that come and go in a running router: from a file and by registration, through its administration."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from helios.errors import Forbidden, Unauthorized
from helios.http.client import HttpClient
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.cloud_servers import free_port
from tests.support.routing import RouterProcess, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]

ADMIN, REGISTRAR = "hls_administrator", "hls_registrar"


def tokens(path: Path, token: str) -> str:
    path.write_text(f"{hashlib.sha256(token.encode()).hexdigest()} somebody\n")
    return str(path)


def described(*workers: Any) -> str:
    return "".join(f'[[workers]]\nmodel = "{one.model}"\nurl = "{one.url}"\n' for one in workers)


def own(home: Any, router: RouterProcess) -> HttpClient:
    """The router's user."""
    return HttpClient(f"unix:{home.run / f'router-{router.address[1]}.sock'}")


def test_workers_of_a_file_come_go_and_are_drained(
    start_router: StartRouter, helios_home: Any, helios: Any, fake_vllm: Any, wait_for: Any, tmp_path: Path
) -> None:
    one, two = fake_vllm(token_s=0.04), fake_vllm()
    file = tmp_path / "workers.toml"
    file.write_text(described(one))
    discovery = json.dumps({"file": str(file), "file_poll_s": 0.05})
    router = start_router(discovery=discovery, wait_up=False)
    wait_for(lambda: router.up() == 1)
    assert router.chat(one.model).status == 200
    body = {"model": one.model, "max_tokens": 40, "stream": True, "messages": [{"role": "user", "content": "x"}]}
    held, answer = stream(router.address, "/v1/chat/completions", body)
    file.write_text(described(two))
    client = own(helios_home, router)
    try:
        wait_for(lambda: {w["url"]: w["draining"] for w in client.json("GET", "/workers")["workers"]} == {
            one.url: True, two.url: False,
        })  # fmt: skip
        wait_for(lambda: router.up() >= 1)
        assert answer.read().endswith(b"data: [DONE]\n\n"), "what it had goes on to its end"
        held.close()
        wait_for(lambda: [w["url"] for w in client.json("GET", "/workers")["workers"]] == [two.url])
        file.write_text("[[workers]]\nmodle = 1\n")
        wait_for(lambda: router.metric("helios_router_discovery_failures_total", source="file", reason="broken") == 1)
        assert router.chat(two.model).status == 200
        who = two.url.removeprefix("http://")
        client.json("POST", f"/workers/{who}/drain?wait_s=5")
        assert "cordoned by an administrator" in router.chat(two.model).json()["error"]["message"]
        client.json("POST", f"/workers/{who}/uncordon")
        assert router.chat(two.model).status == 200
        shown = helios("router", "top", "--once", "--port", str(router.address[1])).out
        assert "1/1 up" in shown
        assert who in shown
        state = helios("router", "top", "--json", "--port", str(router.address[1])).json()
        assert [w["url"] for w in state["workers"]] == [two.url]
    finally:
        client.close()
    out = helios("router", "top", "--once", "--port", "9", code=1)
    assert "Is the router running?" in out.err


def test_the_live_view_goes_on_until_ctrl_c_and_says_that_a_router_is_gone(
    start_router: StartRouter, helios: Any, fake_vllm: Any
) -> None:
    worker = fake_vllm()
    router = start_router(worker)
    top = helios.start("router", "top", "--port", str(router.address[1]))
    assert top.stdout is not None
    shown = (line for line in top.stdout if line.startswith(worker.url.removeprefix("http://")))
    assert "up" in next(shown)
    assert "up" in next(shown)  # a second later
    router.stop()
    assert any("does not answer" in line for line in top.stdout)
    top.send_signal(signal.SIGINT)
    assert top.wait(20) == 130


def test_after_the_answer_no_process_goes_by_what_was_before(
    start_router: StartRouter, helios_home: Any, fake_vllm: Any
) -> None:
    worker = fake_vllm()
    router = start_router(worker, processes=2)
    client, who = own(helios_home, router), worker.url.removeprefix("http://")
    try:
        for _ in range(10):
            drained = client.json("POST", f"/workers/{who}/drain?wait_s=20")
            assert drained == {"in_flight": 0, "drained": True, "everywhere": True}
            assert [router.chat(worker.model).status for _ in range(6)] == [503] * 6
            client.json("POST", f"/workers/{who}/uncordon")
            assert [router.chat(worker.model).status for _ in range(6)] == [200] * 6
    finally:
        client.close()


def test_workers_register_over_tcp_and_go_when_they_say_nothing_more(
    start_router: StartRouter, helios: Any, fake_vllm: Any, wait_for: Any, tmp_path: Path
) -> None:
    worker, port = fake_vllm(), free_port()
    discovery = json.dumps({"registrars": tokens(tmp_path / "registrars", REGISTRAR)})
    router = start_router(
        discovery=discovery, admin_tokens=tokens(tmp_path / "admins", ADMIN), admin_port=port, wait_up=False
    )
    url = f"http://127.0.0.1:{port}"
    assert router.chat(worker.model).status == 404
    registrar, admin, nobody = (
        HttpClient(url, token=lambda token=token: token) for token in (REGISTRAR, ADMIN, None)
    )  # fmt: skip
    try:
        said = {"url": worker.url, "models": [worker.model, "alias"], "lease_s": 60.0}
        with pytest.raises(Unauthorized):
            nobody.json("PUT", "/workers/w1", body=said)
        registrar.json("PUT", "/workers/w1", body=said)
        with pytest.raises(Forbidden):
            registrar.json("GET", "/state")
        wait_for(lambda: registrar.json("PUT", "/workers/w1", body=said) and router.up() == 2)
        assert router.chat(worker.model).status == 200
        (tmp_path / "token").write_text(ADMIN)
        top = helios("router", "top", "--once", "--url", url, "--token-file", str(tmp_path / "token"))
        assert "w1" in top.out
        registrar.json("PUT", "/workers/w1", body={**said, "lease_s": 1.0})
        wait_for(lambda: admin.json("GET", "/state")["workers"] == [])
        assert router.chat(worker.model).status == 503, "it had workers a moment ago"
        labels = {"source": "registration", "reason": "expired"}
        assert router.metric("helios_router_discovery_failures_total", **labels) == 1
    finally:
        for client in (registrar, admin, nobody):
            client.close()


@pytest.mark.parametrize(
    ("discovery", "named"),
    [
        ({"file": "/no/such/file"}, "/no/such/file"),
        ({"resolve": True}, "needs a registry"),
        ({"file_poll_s": 0}, "router.discovery.file_poll_s"),
        ({"registrars": "/no/such/tokens"}, "/no/such/tokens"),
        ({"kubernets": {}}, "kubernets"),
        ({"max_lease_s": 0}, "max_lease_s"),
    ],
)
def test_settings_that_cant_work_exit_2(helios: Any, discovery: dict[str, Any], named: str) -> None:
    env = {"HELIOS_ROUTER__DISCOVERY": json.dumps(discovery)}
    assert named in helios("router", "--port", "0", env=env, code=2).err
