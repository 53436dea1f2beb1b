"""Prefill and decode apart, beside two workers that do both, with real vLLM (CPU build, the tiny model, NIXL).

``helios serve --prefill 1 --decode 1`` starts two vLLMs, a core each. Three routers stand before the same two, so that
nothing else differs:

- ``together``: each computes prompts and answers;
- ``apart``: one computes the prompts of ``router.disaggregation.min_tokens`` and more, the other answers: the default;
- ``always``: the same with prompts of every length (``min_tokens`` 1): what the threshold avoids.

They get the same requests in turn, ``--clients`` at a time, each as soon as its client has the answer before: ``long``
prompts of some 1,200 tokens, ``short`` ones of some 60, and ``mixed``, which takes turns; all with answers of 48
tokens, and no two prompts alike.

Reported, over all rounds: time to the first token (p50, p99), time between two pieces of an answer (p50, p99), tokens
a second, part of the prompts that were computed elsewhere; and the load of the machine.

    python -m benchmarks.disaggregation_vllm [--seconds 8] [--rounds 2] [--clients 4] [--directory DIR] [--json FILE]

``benchmarks.disaggregation`` has the same for sixteen simulated workers of the size that such a split is for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.common import save
from benchmarks.live import Client, Streamed, counted, ending, part, require_vllm, run, serving, wait_for
from helios.home import Home
from helios.launch.processes import records
from helios.launch.source import TINY
from helios.launch.tiny_model import WORDS, tiny_llama

TOKENS: Final = 48
LONG, SHORT = 600, 30
"""Words of a prompt, of two tokens each."""
WAYS: Final[Mapping[str, Mapping[str, int] | None]] = {"together": None, "apart": {}, "always": {"min_tokens": 1}}
"""The routers, and their settings of ``router.disaggregation``; None: nothing is apart."""
TRAFFIC: Final[Mapping[str, Callable[[int], int]]] = {
    "long": lambda number: LONG,
    "short": lambda number: SHORT,
    "mixed": lambda number: (LONG, SHORT)[number % 2],
}
"""How many words the prompt of a client's nth request has."""


@dataclass
class Load:
    """What came of one kind of traffic through one router."""

    answers: list[Streamed] = field(default_factory=list)
    seconds: float = 0.0
    remote: float = 0.0

    def figures(self) -> dict[str, float]:
        first = [answer.first_s for answer in self.answers]
        gaps = [gap for answer in self.answers for gap in answer.gaps]
        return {
            "ttft_p50_s": part(first, 0.5), "ttft_p99_s": part(first, 0.99), "between_p50_s": part(gaps, 0.5),
            "between_p99_s": part(gaps, 0.99), "requests": len(first), "remote": self.remote / len(first),
            "tokens_s": sum(answer.tokens for answer in self.answers) / self.seconds,
        }  # fmt: skip


@contextlib.contextmanager
def router(environ: Mapping[str, str], log: Path, workers: list[str]) -> Iterator[str]:
    """A router before these workers, as ``--worker`` takes them."""
    command = [sys.executable, "-m", "helios", "router", "--port", "0"]
    command += [word for worker in workers for word in ("--worker", worker)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
    with ending(process):
        yield wait_for(process, log, r"^(http://\S+)$")[1]


def ready(url: str, pairs: int) -> None:
    """Wait until both workers are up, and have exchanged blocks where they are a pair."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = counted(url)
        if found["helios_router_worker_up"] == 2 and found["helios_router_warm_pairs"] == pairs:
            return
        time.sleep(0.2)
    raise RuntimeError(f"the workers behind {url} were not ready in time")


def ask(url: str, words: Callable[[int], int], clients: int, seconds: float, seed: int, load: Load) -> None:
    """Ask for so long; what came is added to ``load``."""
    end = time.time() + seconds

    def one(number: int) -> list[Streamed]:
        rng, client = random.Random(f"{seed} {number}"), Client(url, TINY.id)
        answers: list[Streamed] = []
        with contextlib.closing(client):
            while time.time() < end:
                prompt = " ".join(rng.choices(WORDS, k=words(number + len(answers))))
                answers.append(client.stream(prompt, TOKENS))
        return answers

    before, began = remote(url), time.time()
    with ThreadPoolExecutor(clients) as threads:
        for answers in threads.map(one, range(clients)):
            load.answers += answers
    load.seconds += time.time() - began
    load.remote += remote(url) - before


def remote(url: str) -> float:
    """Prompts that were computed elsewhere, by the router's count."""
    return counted(url, 'result="remote"').get("helios_router_prefills_total", 0.0)


def measured(urls: Mapping[str, str], wanted: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by traffic and way."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for kind in wanted.traffic:
        words = TRAFFIC[kind]
        loads = {way: Load() for way in urls}
        for number in range(-1, wanted.rounds):
            for way, url in urls.items():
                into = loads[way] if number >= 0 else Load()  # the first round only warms
                ask(url, words, wanted.clients, wanted.seconds if number >= 0 else 2, number, into)
        rows[kind] = {way: load.figures() for way, load in loads.items()}
        print(f"\n{kind}\n{'':10}{'TTFT p50':>10}{'p99':>9}{'between':>11}{'p99':>8}{'tokens/s':>10}{'remote':>8}")
        for way, row in rows[kind].items():
            first = f"{way:10}{row['ttft_p50_s']:9.3f}s{row['ttft_p99_s']:8.2f}s"
            between = f"{row['between_p50_s'] * 1e3:8.1f} ms{row['between_p99_s'] * 1e3:5.0f} ms"
            print(f"{first}{between}{row['tokens_s']:10.0f}{row['remote']:8.0%}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each traffic through each router, in a round (8)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds that count (2)")
    parser.add_argument("--clients", type=int, default=4, help="requests at a time (4)")
    parser.add_argument("--traffic", nargs="+", choices=TRAFFIC, default=list(TRAFFIC))
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    wanted = parser.parse_args()
    require_vllm()
    with (
        tempfile.TemporaryDirectory(dir=wanted.directory, prefix="helios-apart-") as text,
        contextlib.ExitStack() as stack,
    ):
        base = Path(text)
        home, log = Home(base / "home"), base / "serve.log"
        environ = {**os.environ, "HELIOS_HOME": str(home.root)}
        run(environ, "push", str(tiny_llama(base / "model")), TINY.id)
        process = stack.enter_context(serving(environ, log, TINY.id, "--prefill", "1", "--decode", "1"))
        wait_for(process, log, r"^(http://\S+)$")
        command = next(record.command for _, record in records(home) if record.name == "router")
        workers = [word for word in command if word.startswith(f"{TINY.id}=")]
        urls = {}
        for way, settings in WAYS.items():
            said = {**environ, "HELIOS_ROUTER__DISAGGREGATION": json.dumps(settings or {})}
            options = workers if settings is not None else [re.sub(r",role=\w+", "", word) for word in workers]
            urls[way] = stack.enter_context(router(said, base / f"{way}.log", options))
            ready(urls[way], pairs=int(settings is not None))
        load = os.getloadavg()[0]
        rows = measured(urls, wanted)
        loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    result: dict[str, Any] = {
        "benchmark": "disaggregation_vllm", "time": int(time.time()), "cores": os.cpu_count(), "load": loads,
        "seconds": wanted.seconds, "rounds": wanted.rounds, "clients": wanted.clients, "rows": rows,
    }  # fmt: skip
    print(f"\nload {loads[0]} to {loads[1]}\n{save(result, wanted.json)}")


if __name__ == "__main__":
    main()
