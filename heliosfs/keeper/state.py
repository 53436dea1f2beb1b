"""What a keeper was told, what it holds, and how it logs."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from heliosfs.keeper.board import Board
from heliosfs.keeper.worker import Worker


def log(level: str, message: str, **fields: object) -> None:
    """A line as helios.logs writes it."""
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    line = {"time": stamp, "level": level, "logger": "heliosfs.keeper", "message": message, **fields}
    with contextlib.suppress(OSError):  # the log's disk is full: that ends no mount
        print(json.dumps(line), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Settings:
    """What the command line says; times in seconds. ``argv`` is empty where somebody else starts the worker."""

    socket: str
    argv: list[str]
    pid_file: str | None
    lock_fd: int | None
    created: bool
    stall_s: float
    patience_s: float
    grace_s: float
    start_s: float


@dataclass
class Held:
    """What a keeper holds, and hands to its successor. ``state``: what the worker said when it was ready."""

    mountpoint: str
    device: str
    fuse_fd: int
    board: Board
    listener: socket.socket
    worker: Worker | None = None
    state: Any = None
    served: bool = False
