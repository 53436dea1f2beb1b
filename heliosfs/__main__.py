"""``python -m heliosfs``: what serves a mount. A portable one mounts by itself; a native one is a keeper's worker.

Started by ``helios mount`` (helios/mounting.py), or by a keeper, which HELIOS_KEEPER then names.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from helios import config, logs
from helios.errors import HeliosError
from helios.home import Home
from helios.mounts import MountState
from heliosfs.daemon import run
from heliosfs.fuse.attach import attach
from heliosfs.keeper.wire import ENVIRON
from heliosfs.plan import Plan


def main(argv: list[str] | None = None) -> int:
    """Run it; a JSON line on ``--ready-fd``, or a message to the keeper, says that it is ready, or why it is not."""
    parser = argparse.ArgumentParser(prog="python -m heliosfs")
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--log", help="where standard error goes, for those who ask")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--portable", default="pyfuse3 mounts alone", metavar="WHY", help="why it is not native")
    parser.add_argument("--overrides", type=json.loads, default={})
    parser.add_argument("--created", action="store_true")
    args = parser.parse_args(argv)

    if os.getpid() == 1:  # in a container of its own: the kernel keeps from it what it has no handler for
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    keeper = attach(os.environ[ENVIRON]) if ENVIRON in os.environ else None

    def say(key: str, value: Any) -> None:
        if keeper is not None:
            if key == "state":
                keeper.ready(value)
            else:
                keeper.failed(**value)
            return
        with os.fdopen(args.ready_fd, "w") as pipe:
            json.dump({key: value}, pipe)
            pipe.write("\n")

    def ready(state: MountState) -> None:
        try:
            say("state", msgspec.to_builtins(state))
        except BrokenPipeError:
            logging.getLogger("heliosfs").warning("whoever started this mount is gone; it stays")

    try:
        settings = config.load_from_process(args.overrides)
        logs.setup(settings.log)
        home = Home.from_env(os.environ)
        plan = Plan(args.mountpoint, settings, home, os.environ, args.created, args.log, args.portable)
        os.chdir("/")
        return run(plan, ready, keeper)
    except HeliosError as error:
        log = logging.getLogger("heliosfs")
        try:
            say("error", {"code": error.code, "message": error.message, "hint": error.hint})
        except OSError:  # it was ready once, or nobody listens: only the log is left
            log.error("the mount failed", extra={"reason": str(error)})
        else:
            log.warning("the mount can't start, as was reported", extra={"reason": str(error)})
        return 1


if __name__ == "__main__":
    sys.exit(main())
