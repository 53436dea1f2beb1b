"""One start of an engine that compiles, in a process that kills itself (SIGKILL) at one instant of it.

    python -m tests.support.compiled_kill HOME MOUNT URL KEY COMMIT WHERE

``WHERE`` is one of ``INSTANTS``: a function, and whether the kill comes before or after it does its work for the n-th
time.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Final

from helios.home import Home
from helios.http.client import HttpClient
from helios.launch import compile_artifact, compile_cache, compile_commits, compile_publish, overlay
from helios.launch.compile_state import Shown
from helios.registry_client import RegistryClient
from tests.support.compiled import Node

MADE: Final = {"a/one": b"1" * 5000, "a/two": b"2" * 5000, "b/three": b"3" * 5000}

PUBLISHING: Final[dict[str, tuple[Any, str, str, int]]] = {
    "while files are copied aside": (compile_artifact, "_copy", "after", 2),
    "before the index is sealed": (compile_publish, "seal", "before", 1),
    "before the push begins": (RegistryClient, "start_push", "before", 1),
    "when the push has begun": (RegistryClient, "start_push", "after", 1),
    "while files are sent": (RegistryClient, "put_file", "after", 2),
    "before the commit": (RegistryClient, "commit_push", "before", 1),
    "after the commit": (RegistryClient, "commit_push", "after", 1),
}
UNPACKING: Final[dict[str, tuple[Any, str, str, int]]] = {
    "before files are read": (compile_commits, "read_all", "before", 1),
    "before the view is mounted": (overlay, "_overlay", "before", 1),
    "when the view is mounted": (overlay, "_overlay", "after", 1),
    "while files are copied": (shutil, "copyfile", "after", 2),
    "before its start is told": (Shown, "open", "before", 1),
    "while the engine runs": (compile_cache, "answered", "before", 1),
    "while what it replaces is removed": (Path, "rename", "after", 1),
}
INSTANTS: Final = PUBLISHING | UNPACKING


def kill_at(owner: Any, name: str, when: str, number: int) -> None:
    """Have the function kill this process."""
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == number
        if when == "before" and last:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def main(home: str, mount: str, url: str, key: str, commit: str, where: str) -> None:
    compile_publish.QUIET_S = 0.0  # type: ignore[misc]
    compile_cache.POLL_S = 0.05  # type: ignore[misc]
    if where == "while files are copied":
        overlay._overlay = lambda lower, place: "the test has it so"
    kill_at(*INSTANTS[where])
    node = Node(Home(Path(home)), Path(mount), RegistryClient(HttpClient(url)), key_file=key)
    with node.caches() as caches:
        node.start(commit, MADE, caches)
    raise SystemExit(f"nothing was done {where}: {node.notes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
