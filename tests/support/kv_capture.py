"""Record the KV events of a real vLLM: ``python -m tests.support.kv_capture OUT.jsonl``.

It makes the tiny model, starts ``vllm serve`` on it with a KV cache of a few blocks, sends prompts that share
prefixes, repeat each other and push each other out, and writes one line for each prompt: its token ids, the
``cached_tokens`` that vLLM reports for it, and the messages that were published until it was answered. The first line
is what a replay from 0 gives at the end. ``tests/golden/vllm/kv-events.jsonl`` comes from here.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from helios.home import Home
from helios.http.client import HttpClient
from helios.launch import vllm
from helios.launch.model_info import ModelInfo
from helios.launch.processes import Children
from helios.launch.tiny_model import tiny_llama

MODEL: Final = "tiny"
BLOCK: Final = 128
"""Tokens in a block of vLLM on a CPU."""


def prompts(rng: random.Random) -> list[list[int]]:
    """Token ids: conversations over three shared beginnings, more than the cache holds."""
    sizes = (2 * BLOCK, 3 * BLOCK + 40, BLOCK + 5)
    beginnings = [[rng.randrange(10, 4000) for _ in range(size)] for size in sizes]
    out: list[list[int]] = []
    for number in range(14):
        beginning = beginnings[number % 3]
        out.append(beginning + [rng.randrange(10, 4000) for _ in range(rng.randrange(20, 300))])
        if number % 4 == 1:
            out.append(out[-1] + [rng.randrange(10, 4000) for _ in range(200)])
        if number % 5 == 2:
            out.append(list(beginning))
    return [*out, *out[:3], *out[-3:]]


def take(sub: zmq.Socket[bytes], quiet_ms: int) -> list[list[bytes]]:
    """Messages until nothing comes for a while."""
    out = []
    while sub.poll(quiet_ms):
        out.append(sub.recv_multipart())
    return out


def replay(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, first: int) -> list[list[bytes]]:
    """All frames of an answer, its end included."""
    sock = context.socket(zmq.DEALER)
    sock.connect(endpoint)
    sock.send_multipart([b"", first.to_bytes(8, "big")])
    out = []
    while not out or out[-1][-2] != b"\xff" * 8:
        if not sock.poll(10_000):
            raise TimeoutError("no replay")
        out.append(sock.recv_multipart())
    sock.close(linger=0)
    return out


def ask(client: HttpClient, prompt: list[int]) -> int:
    """Send a prompt; how many of its tokens vLLM says it had cached."""
    body = msgspec.json.encode(
        {"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    )
    headers = {"content-type": "application/json"}
    with client.request("POST", "/v1/completions", body=body, headers=headers) as response:
        usage = json.loads(response.read())["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def line(message: list[bytes]) -> dict[str, Any]:
    return {"frames": [frame.hex() for frame in message]}


def main(out: str) -> None:
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as base, Children(Home(Path(base) / "home")) as children:
        model = tiny_llama(Path(base))
        info = ModelInfo.read(model)
        with vllm.reserved_port() as port, vllm.reserved_port() as events, vllm.reserved_port() as again:
            config = {
                "enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv@tiny",
                "endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{again}",
            }  # fmt: skip
            extra = ["--kv-events-config", json.dumps(config), "--enable-prompt-tokens-details"]
            extra += ["--kv-cache-memory-bytes", str(24 * BLOCK * info.kv_bytes), "--max-model-len", "1024"]
            server = vllm.start(children, model, MODEL, port=port, device="cpu", info=info, extra=extra)
            server.wait_ready(600, lambda text: print(text, file=sys.stderr))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sub = context.socket(zmq.SUB)
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sub.connect(f"tcp://127.0.0.1:{events}")
        time.sleep(1)
        client = HttpClient(server.url, timeout_s=60)
        for tokens in prompts(random.Random(5)):
            cached = ask(client, tokens)
            messages = [line(message) for message in take(sub, 400)]
            lines.append({"prompt": tokens, "cached": cached, "messages": messages})
        lines.insert(0, {"replay": [line(m) for m in replay(context, f"tcp://127.0.0.1:{again}", 0)]})
        context.destroy(linger=0)
    Path(out).write_text("".join(json.dumps(one, separators=(",", ":")) + "\n" for one in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
