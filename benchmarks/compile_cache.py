"""Starts of vLLM with compilation, without and with the kernels that another node has compiled.

Two nodes are two HELIOS_HOMEs with mounts of their own on one registry, and share a key. Each start is a real
``helios serve`` with ``--no-enforce-eager`` until the first answer (CPU build, the tiny model; Inductor needs g++):

- ``empty``: on the first node, with nothing compiled; it stays until what it has compiled is published;
- ``published``: on the second node, which has never started an engine.

    python -m benchmarks.compile_cache [--directory DIR]

Printed are the seconds until the model is ready and until the first answer, those of the engine's own warm-up, in
which it compiles, and the load of the machine before and after. Needs vLLM, and a machine that is not busy: the
engine and the router give up after a while.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.common import save
from benchmarks.live import START_S, require_vllm, run, serving, wait_for
from benchmarks.scene import registry
from helios.home import Home
from helios.launch.source import TINY
from helios.launch.tiny_model import tiny_llama

ENGINE: Final = ("--no-enforce-eager", "--max-model-len", "1024")
PUBLISHED: Final = re.compile(r"Compiled kernels of \S+ are published: .*")
FOUND: Final = re.compile(r"Compiled kernels of \S+: .*")
COMPILED: Final = re.compile(r"init engine \(.*\) took ([\d.]+) s")


def start(node: Path, environ: Mapping[str, str], commit: str, publishes: bool) -> dict[str, Any]:
    """One start, from the command to the first answer; ``publishes``: it stays until what it compiled is published."""
    log = node / "serve.log"
    before, load = time.monotonic(), os.getloadavg()[0]
    with serving(environ, log, f"{TINY.id}@{commit}", "--start-timeout", str(START_S), "--", *ENGINE) as process:
        url = wait_for(process, log, r"^(http://\S+)$")[1]
        ready = time.monotonic() - before
        ask(url)
        answered = time.monotonic() - before
        if publishes:
            wait_for(process, log, PUBLISHED.pattern)
        text = log.read_text(errors="replace")
    engine = COMPILED.search((node / "home" / "logs" / "vllm.log").read_text(errors="replace"))
    return {
        "ready_s": round(ready, 1),
        "first_answer_s": round(answered, 1),
        "engine_s": float(engine[1]) if engine else None,
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "said": [found[0] for pattern in (FOUND, PUBLISHED) if (found := pattern.search(text))],
    }


def ask(url: str) -> None:
    """One short completion."""
    body = json.dumps({"model": TINY.id, "prompt": "Hello", "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=START_S) as answer:
        answer.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    wanted = parser.parse_args()
    require_vllm()
    with (
        tempfile.TemporaryDirectory(dir=wanted.directory, prefix="helios-compiled-") as text,
        contextlib.ExitStack() as stack,
    ):
        base = Path(text)
        (base / "key").write_text(os.urandom(32).hex())
        site = stack.enter_context(registry(Home(base / "registry")))
        shared = {**os.environ, "HELIOS_REGISTRY__URLS": site, "HELIOS_COMPILE_CACHE__KEY_FILE": str(base / "key")}
        model = tiny_llama(base / "model")
        commit = run({**shared, "HELIOS_HOME": str(base / "pushes")}, "push", str(model), TINY.id).strip()
        starts = {}
        for name, publishes in (("empty", True), ("published", False)):
            node = base / name
            node.mkdir()
            environ = {**shared, "HELIOS_HOME": str(node / "home"), "TMPDIR": str(node)}
            starts[name] = start(node, environ, commit, publishes)
            print(f"{name}: {json.dumps(starts[name])}", flush=True)
    saved = {
        what: round(starts["empty"][what] - starts["published"][what], 1) for what in ("ready_s", "first_answer_s")
    }
    print(f"\n{'':12}{'ready':>10}{'answer':>10}{'engine':>10}  load before, after")
    for name, row in starts.items():
        engine = row["engine_s"] or float("nan")
        print(f"{name:12}{row['ready_s']:9.1f}s{row['first_answer_s']:9.1f}s{engine:9.1f}s  {row['load']}")
    print(f"{'saved':12}{saved['ready_s']:9.1f}s{saved['first_answer_s']:9.1f}s")
    result = {
        "benchmark": "compile_cache",
        "time": int(time.time()),
        "cores": os.cpu_count(),
        "starts": starts,
        "saved": saved,
    }
    print(f"\n{save(result, wanted.json)}")


if __name__ == "__main__":
    main()
