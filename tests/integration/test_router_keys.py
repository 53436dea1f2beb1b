"""A worker with an API key that a file of workers names: the router knows it, asks it, and sends it requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.routing import CHAT, StartRouter, start_router

__all__ = ["allowed_violations", "fake_vllm", "start_router"]

KEY = "key-of-the-worker-7f3a"


def test_a_discovered_worker_that_wants_a_key(
    fake_vllm: Callable[..., Control], start_router: StartRouter, tmp_path: Path, wait_for: Any
) -> None:
    worker = fake_vllm("org/tiny", api_key=KEY)
    key, file = tmp_path / "key", tmp_path / "workers.toml"
    key.write_text("another-key\n")
    file.write_text(f'[[workers]]\nmodel = "org/tiny"\nurl = "{worker.url}"\nkey_file = "{key}"\n')
    hang = {"quiet_s": 0.2, "factor": 0.01, "timeout_s": 0.4, "every_s": 0.1}
    router = start_router(wait_up=False, discovery=json.dumps({"file": str(file)}), hang=json.dumps(hang))
    wait_for(lambda: router.up() == 1, what="the worker to be up")  # /health wants no key
    mine = {"authorization": "Bearer of-the-client"}
    assert router.request("POST", "/v1/chat/completions", {"model": "org/tiny", **CHAT}, mine).status == 401

    (tmp_path / "new").write_text(f"{KEY}\n")
    (tmp_path / "new").replace(key)
    wait_for(lambda: router.chat("org/tiny").status == 200, what="the new key")
    worker.fault("hang", times=None)
    router.process.send_signal(0)  # it lives
    waits = router.connection()
    waits.request("POST", "/v1/chat/completions", json.dumps({"model": "org/tiny", **CHAT}))
    wait_for(lambda: router.metric("helios_router_worker_hung", worker=worker.url), what="the hang to be found")
    worker.clear_faults()
    wait_for(lambda: router.metric("helios_router_worker_hung") == 0, what="the worker to be back")
    waits.close()
    assert router.metric("helios_router_token_checks_total", result="unable") == 0
    sent = [dict(record["headers"]).get("authorization") for record in worker.journal()]
    assert set(sent) == {"Bearer another-key", f"Bearer {KEY}"}
    worker.refuse()  # when it comes back it is asked for its models, now with the right key
    wait_for(lambda: router.up() == 0, what="the worker to be down")
    worker.accept()
    wait_for(lambda: router.up() == 1, what="the worker to be up again")
    wait_for(
        lambda: "max_model_len" in router.request("GET", "/v1/models/org/tiny").json(), what="what the worker says"
    )
    log = router.log.read_text()
    assert KEY not in log
    assert "another-key" not in log
