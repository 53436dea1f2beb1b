"""Lines on standard error as helios.logs writes them."""

from __future__ import annotations

import contextlib
import json
import sys
import time


def log(level: str, message: str, **fields: object) -> None:
    """Write a line. Where it can't be written, the log's disk being full, it is lost: that ends no mount."""
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    line = {"time": stamp, "level": level, "logger": "heliosfs.keeper", "message": message, **fields}
    with contextlib.suppress(OSError):
        print(json.dumps(line), file=sys.stderr, flush=True)
