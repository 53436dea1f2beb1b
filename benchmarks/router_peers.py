"""The proxies that are measured: ours, a plain one, and other routers where they are installed.

Each peer has an environment of its own:

    for name in vllm-router sglang-router smg; do python3 -m venv .venvs/$name; .venvs/$name/bin/pip install $name; done
    python3 -m venv .venvs/litellm; .venvs/litellm/bin/pip install 'litellm[proxy]'

All get all workers. The Rust routers choose in turn (``round_robin``), with logs off and their metrics on, as they come
otherwise; litellm shuffles, the plain proxy takes turns. Ours has its default policy, keys, limits of requests and
tokens, metrics, an id for each request's trace and, where there is a collector, spans of the share that it is told.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.common import ROOT
from benchmarks.nginx import free_ports
from helios.config import TracingSettings

Proxy = Callable[[Sequence[str]], tuple[list[str], str]]
"""A proxy's command for the URLs of its workers, and its own URL where it does not print that."""
COMPILED: Final = ROOT / "build" / "compiled"
"""Where scripts/compiled.py puts the router's modules that are compiled."""
RATIO: Final = TracingSettings().ratio
"""Share of the requests whose spans go to a collector: the router's own default (docs/router-traces.md)."""
HELIOS: Final = str(Path(sys.executable).parent / "helios")


def _rust(name: str, *words: str) -> Callable[[Path], Proxy]:
    def proxy_of(work: Path) -> Proxy:
        def proxy(workers: Sequence[str]) -> tuple[list[str], str]:
            port, metrics = free_ports(2)
            command = [
                str(executable(name)), *words, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *workers,
                "--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(metrics),
            ]  # fmt: skip
            return command, f"http://127.0.0.1:{port}"

        return proxy

    return proxy_of


def _litellm(work: Path) -> Proxy:
    def proxy(workers: Sequence[str]) -> tuple[list[str], str]:
        (port,), config = free_ports(1), work / "litellm.yaml"
        parameters = [{"model": "openai/m", "api_base": f"{worker}/v1", "api_key": "none"} for worker in workers]
        config.write_text(
            json.dumps({"model_list": [{"model_name": "m", "litellm_params": one} for one in parameters]})
        )
        words = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
        env = ("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true", "LITELLM_LOCAL_MODEL_COST_MAP=True")
        return ["env", *env, str(executable("litellm")), *words], f"http://127.0.0.1:{port}"

    return proxy


def compiled(router: Proxy) -> Proxy:
    """Our router with compiled modules."""

    def proxy(workers: Sequence[str]) -> tuple[list[str], str]:
        command, url = router(workers)
        return ["env", f"PYTHONPATH={COMPILED}", *command], url

    return proxy


PEERS: Final = {
    "vllm-router": _rust("vllm-router"),
    "sglang-router": _rust("sglang-router", "launch"),
    "smg": _rust("smg", "launch"),
    "litellm": _litellm,
}


def executable(name: str) -> Path:
    return ROOT / ".venvs" / name / "bin" / name


def installed() -> list[str]:
    """The peers that are there."""
    return [name for name in PEERS if executable(name).exists()]


def version(name: str) -> str:
    """What pip says a peer's version is."""
    pip = executable(name).parent / "pip"
    shown = subprocess.run([str(pip), "show", name], capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"^Version: (.+)", shown, re.MULTILINE)
    return found[1] if found else "?"


def plain(workers: Sequence[str]) -> tuple[list[str], str]:
    return [sys.executable, "-m", "benchmarks.router_backend", "--plain", *workers], ""


def ours(work: Path, collector: str = "", ratio: float = RATIO) -> tuple[Proxy, str]:
    """Our router with all that is on in production, and the key that it takes.

    ``collector``: the URL that gets its spans, of the share ``ratio`` of the requests; empty: none are recorded.
    """
    keys = work / "keys.json"
    limits = ("--requests-per-minute", "1000000000", "--tokens-per-minute", "1000000000000")
    made = subprocess.run(
        [HELIOS, "router", "keys", "create", "bench", "--file", str(keys), *limits],
        capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "HELIOS_HOME": str(work / "home")},
    )  # fmt: skip

    def proxy(workers: Sequence[str]) -> tuple[list[str], str]:
        admission = json.dumps({"keys": str(keys)})
        env = [f"HELIOS_HOME={work / 'home'}", "HELIOS_LOG__LEVEL=warning", f"HELIOS_ROUTER__ADMISSION={admission}"]
        if collector:
            tracing = json.dumps({"endpoint": collector, "ratio": ratio})
            env += [f"HELIOS_ROUTER__TRACING={tracing}", "no_proxy=127.0.0.1"]
        given = [word for worker in workers for word in ("--worker", f"m={worker}")]
        return ["env", *env, HELIOS, "router", "--port", "0", *given], ""

    return proxy, made.stdout.strip()
