"""``python -m heliosfs.keeper``: mounts, holds the mount, and sees to the worker that serves it (see the package)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys

from heliosfs.keeper import kernel
from heliosfs.keeper.held import Held, Moot, log, mount, take_over
from heliosfs.keeper.keeper import Keeper, Settings


def main() -> int:
    """Keep a mount; one JSON line on ``--ready-fd`` says that a worker is ready, or why there is no mount."""
    args = _parse()
    for fd in filter(None, (args.ready_fd, args.lock_fd)):
        os.set_inheritable(fd, False)
    said = args.ready_fd is None

    def say(key: str, value: object) -> None:
        nonlocal said
        if not said:
            said = True
            try:
                with os.fdopen(args.ready_fd, "w") as pipe:
                    pipe.write(json.dumps({key: value}) + "\n")
            except BrokenPipeError:
                log("warning", "whoever started this keeper is gone; the mount stays")

    signals, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        held = _come_by(args)
    except Moot as error:
        log("info", f"{args.mountpoint} is not taken over: {error}")
        return 0
    except OSError as error:
        reason = f"{args.mountpoint} can't be {'taken over' if args.take_over else 'mounted'}: {error}"
        log("error", reason)
        say("error", {"code": "Unavailable", "message": reason, "hint": "`helios doctor` checks this machine."})
        return 1
    held.lock_fd = args.lock_fd or held.lock_fd
    os.chdir("/")
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    keeper = Keeper(settings, held, signals, say)
    if held.served:
        say("state", held.state)
    return keeper.run()


def _come_by(args: argparse.Namespace) -> Held:
    """Take over, or mount; a keeper that is started again by somebody else does whichever is to be done."""
    mode = 0o600 if args.uids == [os.getuid()] else 0o666
    parent, name = os.path.split(os.path.abspath(args.mountpoint))
    place = os.path.join(os.path.realpath(parent), name)  # looking at a mount that nobody serves would take for ever
    if args.take_over:
        return take_over(place, args.socket, mode, args.uids, args.orphan, args.asker)
    if args.external and kernel.device(place):
        try:
            return take_over(place, args.socket, mode, args.uids, args.orphan)
        except ConnectionError:
            raise  # a living keeper has it
        except OSError as error:
            log("warning", "nobody holds this mount any more; it is made anew", mountpoint=place, reason=str(error))
        while (number := kernel.device(place)) is not None:
            kernel.detach(place, number)
    return mount(os.path.realpath(place), args.options, args.socket, mode)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m heliosfs.keeper", epilog="After --: the worker's command.")
    parser.add_argument("mountpoint")
    parser.add_argument("--socket", required=True, type=os.path.abspath, help="where workers and successors connect")
    parser.add_argument("--options", default=kernel.OPTIONS, help="mount options beside those of the descriptor")
    parser.add_argument("--ready-fd", type=int, help="an inherited pipe for one line of JSON")
    parser.add_argument("--lock-fd", type=int, help="an inherited lock, held and removed with the mount")
    parser.add_argument("--worker-pid-file", dest="pid_file")
    parser.add_argument("--created", action="store_true", help="remove the mount point with the mount")
    parser.add_argument("--take-over", action="store_true", help="take the mount from the keeper that has it")
    parser.add_argument("--asker", type=int, help="with --take-over: the pid of the worker that lost its keeper")
    parser.add_argument("--external", action="store_true", help="somebody else starts the workers, and this keeper")
    parser.add_argument(
        "--worker-uid", dest="uids", type=int, action="append", help="users whose workers may come (our own)"
    )
    parser.add_argument("--orphan", type=float, default=15.0, help="how long a worker without keeper may take to come")
    parser.add_argument(
        "--stall", dest="stall_s", type=float, default=10.0, help="a worker silent for so long is replaced (seconds)"
    )
    parser.add_argument(
        "--patience", dest="patience_s", type=float, default=60.0, help="requests fail after so long without a worker"
    )
    parser.add_argument("--grace", dest="grace_s", type=float, default=5.0, help="how long a worker may take to end")
    parser.add_argument(
        "--start", dest="start_s", type=float, default=150.0, help="how long a worker may take to be ready"
    )
    argv, marker, worker = sys.argv[1:], "--", []
    if marker in argv:
        at = argv.index(marker)
        argv, worker = argv[:at], argv[at + 1 :]
    args = parser.parse_args(argv)
    args.argv, args.uids = worker, args.uids or [os.getuid()]
    if args.external == bool(worker):
        parser.error("give either a worker's command after -- or --external")
    return args


if __name__ == "__main__":
    sys.exit(main())
