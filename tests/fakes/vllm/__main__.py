"""``python -m tests.fakes.vllm --model M [--port N]``: a fake as a process; prints its URLs as one JSON line."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal

from tests.fakes.vllm.client import Control
from tests.fakes.vllm.server import run
from tests.fakes.vllm.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.vllm", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--role", choices=("both", "prefill", "decode"), default="both")
    parser.add_argument("--prefill-s", type=float, default=0.0)
    parser.add_argument("--token-s", type=float, default=0.0)
    parser.add_argument("--lease-s", type=float, default=30.0)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--sleep-mode", action="store_true")
    given = parser.parse_args()
    settings = Settings(
        given.model, given.role, prefill_s=given.prefill_s, token_s=given.token_s, lease_s=given.lease_s,
        max_model_len=given.max_model_len, sleep_mode=given.sleep_mode,
    )  # fmt: skip

    def started(control: Control) -> None:
        print(json.dumps({"url": control.url, "control": control.control}), flush=True)

    async def serve() -> None:
        stop = asyncio.Event()
        for sig in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sig, stop.set)
        await run(settings, started, stop, given.host, given.port, given.control_port)

    asyncio.run(serve())


if __name__ == "__main__":
    main()
