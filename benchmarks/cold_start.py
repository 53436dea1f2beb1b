"""Cold start of a stopped model through the router: the request that starts it is held until its first token is there.

``helios serve --on-demand`` with real vLLM (CPU build, the tiny model). A streamed request comes while the model is
stopped, waits, and is answered; what the wait was for is itemised. Then the model is used warm, through the router and
directly at its vLLM in turn, and left alone until it is stopped; so it goes in each round. The yardstick, in each
round: vLLM started by hand with the same arguments on the original directory, asked as soon as it listens.

**Helios' own share** of a cold start is all that is not between the start of vLLM's process and the moment it listens,
and not between the router's request to it and its first byte. It is made of five:

- ``to start``: from sending the request to what ``helios serve`` says when it begins to start the model: the router has
  asked the registry which commit that is, and ``helios serve`` to start it;
- ``to process``: from there to the start of vLLM's process (/proc/PID/stat, in hundredths of a second): the mount, in
  which nobody has looked at the model before the first round, its configuration, the process that guards vLLM's;
- ``to ready``: from the line in vLLM's log after which it listens to what ``helios serve`` says when it has found out,
  and has told the router;
- ``to request``: from there to the beginning of the router's span of its request to vLLM;
- ``to client``: from the first byte at the router, by that span, to the first token at the client.

**Of a warm first token** it is the difference of the medians, through the router and directly.

Printed beside: vLLM's own times (its log's phases as they were entered, its count for the weights), its prefill and
decode times and tokens a second by its metrics, how long the mount took when ``helios serve`` began, the load.

    python -m benchmarks.cold_start [--rounds 2] [--warm 100] [--directory DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.common import save
from benchmarks.live import Client, Streamed, counted, ending, part, require_vllm, run, serving, wait_for
from helios.home import Home
from helios.launch.phases import FIRST, Phases
from helios.launch.processes import Record, records
from helios.launch.source import TINY
from helios.launch.tiny_model import tiny_llama
from helios.launch.vllm import reserved_port
from tests.support.otlp import Collector, Span, collector

LOOK_S: Final = 0.005
"""How often a log is looked at, in seconds: as exact are the times of its phases."""
IDLE_S: Final = 5
PROMPT: Final = "What does the sea look like in the morning?"
TOKENS: Final = 32
SHARE_S, WARM_S = 0.5, 0.005
"""The most that Helios may add to a cold start, and to a warm first token, in seconds."""
STARTS, ANSWERS = "is being started.", " answers."
"""What ``helios serve --on-demand`` says."""
LISTENS: Final = "Application startup complete"
WEIGHTS: Final = re.compile(r"Loading weights took ([\d.]+) seconds")
OWN: Final = ("to start", "to process", "to ready", "to request", "to client")


@dataclass
class Started:
    """What the log of a vLLM says, and when. All times by ``time.time``."""

    phases: list[tuple[str, float]] = field(default_factory=list)
    listens: float = 0.0
    weights_s: float = 0.0

    def seconds(self, began: float) -> dict[str, float]:
        """How long each phase took, in seconds."""
        at = [(FIRST, began), *self.phases, ("", self.listens)]
        found: dict[str, float] = {}
        for (name, start), (_, end) in itertools.pairwise(at):
            name = name.partition(":")[0]
            found[name] = found.get(name, 0.0) + end - start
        return found


@contextlib.contextmanager
def followed(log: Path) -> Iterator[Started]:
    """A log that may not be there yet, read as it is written until the block ends."""
    found, done = Started(), threading.Event()

    def follow() -> None:
        phases, text = Phases(), ""
        while not log.exists():
            if done.wait(LOOK_S):
                return
        with log.open(errors="replace") as lines:
            while not done.wait(LOOK_S):
                more = lines.read()
                now, text = time.time(), text + more
                found.phases += [(phase, now) for phase in phases.feed(more)]
                if not found.listens and LISTENS in text:
                    found.listens = now
        if weights := WEIGHTS.search(text):
            found.weights_s = float(weights[1])

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def began(pid: int) -> float:
    """When a process began, by ``time.time``, to a hundredth of a second."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def vllm_of(home: Home) -> Record | None:
    """The vLLM that runs, if one does."""
    return next((record for _, record in records(home) if record.name.startswith("vllm")), None)


def sent_to_worker(spans: Collector, since: float) -> Span:
    """The router's request to the worker, of the first request since then; raises RuntimeError where no span came."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := [one for one in spans.of("client") if one.began / 1e9 >= since]:
            return min(found, key=lambda one: one.began)
        time.sleep(0.1)
    raise RuntimeError("the router sent no span of the request")


@contextlib.contextmanager
def said(log: Path, *texts: str) -> Iterator[dict[str, float]]:
    """When each text came in what is written to a log until the block ends, by ``time.time``."""
    found, done = dict[str, float](), threading.Event()

    def follow(start: int) -> None:
        with log.open(errors="replace") as lines:
            lines.seek(start)
            text = ""
            while not done.wait(LOOK_S):
                text += lines.read()
                found.update({one: time.time() for one in texts if one in text and one not in found})

    thread = threading.Thread(target=follow, args=(log.stat().st_size,))
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def cold(
    home: Home, url: str, spans: Collector, serve_log: Path, log: Path
) -> tuple[dict[str, float], dict[str, float], Record]:
    """One held request: what its wait was for, vLLM's phases (both in seconds), and the vLLM that it started."""
    client = Client(url, TINY.id)
    with followed(log) as started, said(serve_log, STARTS, ANSWERS) as notes, contextlib.closing(client):
        answer = client.stream(PROMPT, TOKENS)
    record = vllm_of(home)
    assert record is not None
    process, span = began(record.process.pid), sent_to_worker(spans, answer.sent)
    at_router = span.began / 1e9 + span.attributes["gen_ai.response.time_to_first_chunk"]
    found = {
        "to start": notes[STARTS] - answer.sent,
        "to process": process - notes[STARTS],
        "vLLM": started.listens - process,
        "to ready": notes[ANSWERS] - started.listens,
        "to request": span.began / 1e9 - notes[ANSWERS],
        "first token": at_router - span.began / 1e9,
        "to client": answer.came[0] - at_router,
        "whole": answer.first_s,
        "weights": started.weights_s,
    }
    return found, started.seconds(process), record


def by_hand(
    command: Sequence[str], environ: Mapping[str, str], model: Path, log: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """The same vLLM on a directory, without Helios; both in seconds, as ``cold`` has it."""
    words = list(command)
    with reserved_port() as port, log.open("wb") as output, followed(log) as started:
        words[words.index("serve") + 1] = str(model)
        words[words.index("--port") + 1] = str(port)
        process = subprocess.Popen(words, env=environ, stdout=output, stderr=output)
        with ending(process):
            start = began(process.pid)
            wait_for(process, log, LISTENS, LOOK_S)
            client = Client(f"http://127.0.0.1:{port}", TINY.id)
            with contextlib.closing(client):
                answer = client.stream(PROMPT, TOKENS)
    found = {"vLLM": started.listens - start, "first token": answer.first_s, "weights": started.weights_s}
    return found | {"whole": answer.came[0] - start}, started.seconds(start)


def warm(router: str, worker: str, count: int) -> dict[str, float]:
    """First tokens of a model that is up, through the router and directly in turn, and what the engine takes."""
    ways = {"router": Client(router, TINY.id), "direct": Client(worker, TINY.id)}
    first: dict[str, list[float]] = {way: [] for way in ways}
    before = counted(worker)
    answers: list[Streamed] = []
    for number in range(-3, count):
        for way, client in ways.items():
            answer = client.stream(f"{PROMPT} {number}", TOKENS)
            if number >= 0:
                first[way].append(answer.first_s)
            answers.append(answer)
    for client in ways.values():
        client.close()
    after = counted(worker)
    took = {name: after[name] - before[name] for name in after if name in before}
    requests, decode = took["vllm:request_prefill_time_seconds_count"], took["vllm:request_decode_time_seconds_sum"]
    found = {f"{way}_s": statistics.median(values) for way, values in first.items()}
    found |= {f"{way}_p99_s": part(values, 0.99) for way, values in first.items()}
    return found | {
        "added_s": found["router_s"] - found["direct_s"],
        "prefill_s": took["vllm:request_prefill_time_seconds_sum"] / requests,
        "decode_s": decode / requests,
        "tokens_s": sum(answer.tokens - 1 for answer in answers) / decode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="cold starts of each (2)")
    parser.add_argument("--warm", type=int, default=100, help="warm requests each way in a round (100)")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    wanted = parser.parse_args()
    require_vllm()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=wanted.directory, prefix="helios-cold-") as text, collector() as spans:
        base = Path(text)
        home, log = Home(base / "home"), base / "serve.log"
        environ = {**os.environ, "HELIOS_HOME": str(home.root)}
        model = tiny_llama(base / "model")
        run(environ, "push", str(model), TINY.id)
        environ["HELIOS_ROUTER__TRACING"] = f'{{"endpoint": "{spans.url}", "interval_s": 0.2}}'
        with serving(environ, log, "--on-demand", "--idle", str(IDLE_S)) as process:
            url = wait_for(process, log, r"^(http://\S+)$")[1]
            mount_s = float(wait_for(process, log, r"^Mount: .*\(([\d.]+) s\)")[1])
            for number in range(1, wanted.rounds + 1):
                load = os.getloadavg()[0]
                held, phases, record = cold(home, url, spans, log, home.logs / f"vllm-{number}.log")
                port = record.command[record.command.index("--port") + 1]
                used = warm(url, f"http://127.0.0.1:{port}", wanted.warm)
                wait_for(process, log, rf"(?s)(?:is stopped: no request.*){{{number}}}")
                by_itself = {
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_USE_AOT_COMPILE": "0",
                }
                plain, plain_phases = by_hand(record.command, by_itself, model, base / f"plain-{number}.log")
                rounds.append({
                    "held": held, "phases": phases, "plain": plain, "plain_phases": plain_phases, "warm": used,
                    "own_s": sum(held[name] for name in OWN), "load": [round(load, 1), round(os.getloadavg()[0], 1)],
                })  # fmt: skip
                show(number, rounds[-1])
    median = {
        "own_s": statistics.median(row["own_s"] for row in rounds),
        "warm_added_s": statistics.median(row["warm"]["added_s"] for row in rounds),
    }
    result = {
        "benchmark": "cold_start",
        "time": int(time.time()),
        "cores": os.cpu_count(),
        "mount_s": mount_s,
        "rounds": rounds,
        "median": median,
    }
    print(f"\nThe mount itself was there after {mount_s:g} s, before any request.")
    print(f"Helios' own share: {median['own_s'] * 1e3:.0f} ms of a cold start (at most {SHARE_S * 1e3:.0f}), "
          f"{median['warm_added_s'] * 1e3:.1f} ms of a warm first token (at most {WARM_S * 1e3:.0f})")  # fmt: skip
    print(f"\n{save(result, wanted.json)}")


def show(number: int, row: Mapping[str, Any]) -> None:
    """A round's table."""
    held, plain, used = row["held"], row["plain"], row["warm"]
    print(f"\nround {number}, load {row['load'][0]} to {row['load'][1]}{'held request':>38}{'vLLM by hand':>14}")

    def line(what: str, ours: float | None, theirs: float | None = None) -> None:
        texts = ("-" if value is None else f"{value * 1e3:.0f} ms" for value in (ours, theirs))
        print(f"{what:50}{next(texts):>14}{next(texts):>14}")

    line("Helios: to start, asked for", held["to start"])
    line("Helios: to vLLM's process, the mount looked into", held["to process"])
    for name in dict.fromkeys([*row["phases"], *row["plain_phases"]]):
        line(f"  vLLM: {name}", row["phases"].get(name), row["plain_phases"].get(name))
    line("  of it weights, by its own count", held["weights"], plain["weights"])
    line("vLLM until it listens", held["vLLM"], plain["vLLM"])
    line("Helios: to ready, and told to the router", held["to ready"])
    line("Helios: to the request to vLLM", held["to request"])
    line("vLLM: first token", held["first token"], plain["first token"])
    line("Helios: to the client", held["to client"])
    line("whole", held["whole"], plain["whole"])
    line("Helios' own share", row["own_s"])
    ways = (
        f"{used[f'{way}_s'] * 1e3:.1f} ms (p99 {used[f'{way}_p99_s'] * 1e3:.1f}) {name}"
        for way, name in (("router", "through the router"), ("direct", "directly"))
    )
    print("warm first token:", ", ".join(ways))
    took = f"prefill {used['prefill_s'] * 1e3:.1f} ms, {TOKENS} tokens in {used['decode_s'] * 1e3:.0f} ms"
    print(f"the engine, warm: {took}, {used['tokens_s']:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
