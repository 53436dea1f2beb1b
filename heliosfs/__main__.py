"""``python -m heliosfs``: a mount's daemon, started by ``helios mount`` (helios/mounting.py)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

import msgspec

from helios import config, logs
from helios.errors import HeliosError
from helios.home import Home
from helios.mounts import MountState
from heliosfs.daemon import Plan, run


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; one JSON line on ``--ready-fd`` says that it is ready, or why it can't be."""
    parser = argparse.ArgumentParser(prog="python -m heliosfs")
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--log", required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--overrides", type=json.loads, default={})
    parser.add_argument("--created", action="store_true")
    args = parser.parse_args(argv)

    def say(key: str, value: object) -> None:
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
        plan = Plan(args.mountpoint, settings, Home.from_env(os.environ), os.environ, args.created, args.log)
        os.chdir("/")
        return run(plan, ready)
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
