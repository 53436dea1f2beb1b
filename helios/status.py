"""What runs on this machine for one HELIOS_HOME. Reads records and asks what runs; starts nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from helios import mounts
from helios.config import Config
from helios.embedded import running
from helios.errors import HeliosError, Unavailable
from helios.home import Home
from helios.http.client import HttpClient
from helios.mounts import MountState
from helios.registry_answers import Usage
from helios.registry_client import RegistryClient
from helios.tokens import Token, no_token, token_of

PROBE_S = 3.0
ASKED = ("volumes", "tiers", "activity", "pool", "shadow")
"""What a mount itself is asked for."""


def collect(config: Config, home: Home) -> dict[str, Any]:
    """The document that ``helios status --json`` prints; sizes in bytes, times in unix seconds."""
    from helios.launch.compile_cache import base_of
    from helios.launch.compile_state import starts
    from helios.launch.processes import records

    record = None if config.registry.urls else running(home)
    urls = list(config.registry.urls) or ([record.url] if record else [])
    base = f"unix:{record.socket}" if record else (urls[0] if urls else None)
    usage = _usage(base, token_of(config.registry.token_file) if config.registry.urls else no_token) if base else None
    store = config.registry.store_directory(home.store)
    cache = Path(config.mount.cache) if config.mount.cache else home.cache
    return {
        "home": str(home.root),
        "registry": {
            "urls": urls,
            "embedded": record.embedded if record else False,
            "pid": record.pid if record else None,
            "reachable": usage is not None,
        },
        "store": {
            "path": str(store or config.registry.store),
            "stored": usage.stored if usage else (None if config.registry.urls or not store else disk_usage(store)),
            "logical": usage.logical if usage else None,
        },
        "cache": {"path": str(cache), "bytes": disk_usage(cache, shared=False)},
        "l2": {"path": config.mount.l2, "bytes": disk_usage(Path(config.mount.l2), shared=False)}
        if config.mount.l2
        else None,
        "mounts": mounts_of(home),
        "processes": [
            {
                "name": entry.name,
                "pid": entry.process.pid,
                "alive": entry.process.alive(),
                "since": entry.since,
                "owner": entry.owner.pid,
                "log": entry.log,
            }
            for _, entry in records(home)
        ],
        "compiled": [msgspec.to_builtins(start) | {"found": start.found} for start in starts(base_of(home))],
    }


def mounts_of(home: Home) -> list[dict[str, Any]]:
    """The home's mounts, and what each says of itself."""
    return [
        {
            "mountpoint": state.mountpoint,
            "alive": alive,
            "pid": state.pid,
            "worker": msgspec.to_builtins(state.worker),
            "since": state.since,
            "mode": state.mode,
            "reason": state.reason,
            "url": state.url,
            "socket": state.socket,
            "log": state.log,
        }
        | (_asked(state) if alive else dict.fromkeys(ASKED))
        for state, alive in mounts.states(home)
    ]


def _usage(base: str, token: Token) -> Usage | None:
    client = RegistryClient(HttpClient(base, timeout_s=PROBE_S, token=token))
    try:
        return client.usage()
    except HeliosError:
        return None
    finally:
        client.close()


def _asked(state: MountState) -> dict[str, Any]:
    """What a mount answers (docs/control-api.md), over one connection; None for what it does not."""
    answers: dict[str, Any] = {}
    client = HttpClient(f"unix:{state.socket}", timeout_s=PROBE_S)
    try:
        for what in ("volumes", "cache", "activity", "status", "shadow"):
            try:
                answers[what] = client.json("GET", f"/api/v1/{what}")
            except Unavailable:
                break  # nor will it answer the rest
            except HeliosError:
                continue
    finally:
        client.close()
    shadow = answers.get("shadow")
    found = (
        answers.get("volumes", {}).get("volumes"),
        answers.get("cache", {}).get("tiers"),
        answers.get("activity"),
        answers.get("status", {}).get("pool"),
        shadow if shadow and shadow["percent"] else None,
    )
    return dict(zip(ASKED, found, strict=True))


def disk_usage(directory: Path, *, shared: bool = True) -> int:
    """Bytes that the files below a directory take on disk; sparse files count what they hold.

    Without ``shared`` files that have another name, somewhere else as it may be, are not counted.
    """
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except FileNotFoundError:
                continue  # evicted or renamed meanwhile
            if shared or found.st_nlink == 1:
                total += found.st_blocks * 512
    return total
