"""``vllm serve`` with the fake inside: takes vLLM's own command line, so that what starts vLLM can be tested as it is.

FAKE_VLLM names a directory. ``plan.json`` in it is a list with an object for each start, the last for all later ones,
too: ``{"ends": 1}`` ends with that status before it listens, ``{"faults": […], "token_s": …}`` serves with these faults
and at this pace, ``"deaf": true`` does not hear SIGTERM. ``start-N.json`` says how the Nth was started (arguments,
environment, the control API).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.faults import Fault
from tests.fakes.vllm.server import run
from tests.fakes.vllm.settings import Settings


def main() -> None:
    directory = Path(os.environ["FAKE_VLLM"])
    number = len(list(directory.glob("start-*.json"))) + 1
    plan: dict[str, Any] = {}
    if (directory / "plan.json").exists():
        steps = json.loads((directory / "plan.json").read_text())
        plan = steps[min(number, len(steps)) - 1]
    told = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}
    say(directory, number, told)
    if "ends" in plan:
        print("(EngineCore pid=1) ValueError: no such dtype", flush=True)
        raise SystemExit(plan["ends"])
    given = arguments()
    settings = Settings(
        given.served_model_name, plan.get("role", "both"), token_s=plan.get("token_s", 0.0), max_model_len=4096,
        load_tracking=given.enable_server_load_tracking, api_key=given.api_key,
    )  # fmt: skip
    print(f"INFO fake vLLM serves {given.model}", flush=True)

    def started(control: Control) -> None:
        say(directory, number, {**told, "control": control.control, "url": control.url})

    async def serve() -> None:
        stop = asyncio.Event()
        for sig in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sig, (lambda: None) if plan.get("deaf") else stop.set)
        faults = [msgspec.convert(fault, Fault) for fault in plan.get("faults", [])]
        await run(settings, started, stop, given.host, given.port, faults=faults)

    asyncio.run(serve())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm")
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--api-key", default="")
    parser.add_argument("--enable-server-load-tracking", action="store_true")
    for name in ("--shutdown-timeout", "--max-num-seqs", "--kv-cache-memory-bytes", "--max-model-len"):
        parser.add_argument(name, type=int)
    for name in ("--kv-transfer-config", "--kv-events-config"):
        parser.add_argument(name, type=json.loads)
    for name in ("--enforce-eager", "--disable-uvicorn-access-log"):
        parser.add_argument(name, action="store_true")
    return parser.parse_args()  # status 2 for what vLLM would not know either


def say(directory: Path, number: int, document: dict[str, Any]) -> None:
    part = directory / f".start-{number}"
    part.write_text(json.dumps(document))
    part.replace(directory / f"start-{number}.json")


if __name__ == "__main__":
    main()
