"""``python -m heliosfs.keeper``: the command line, and how a keeper comes by its mount."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys

from heliosfs.keeper import kernel, wire
from heliosfs.keeper.held import Held, mount, take_over
from heliosfs.keeper.keeper import Keeper
from heliosfs.keeper.log import log
from heliosfs.keeper.place import Settings


def main() -> int:
    """Keep a mount; one JSON line on ``--ready-fd`` says that a worker is ready, or why there is no mount."""
    args = _parse(sys.argv[1:])
    for fd in filter(None, (args.ready_fd, args.lock_fd)):
        os.set_inheritable(fd, False)

    def say(key: str, value: object) -> None:
        fd, args.ready_fd = args.ready_fd, None  # only the first call counts
        if fd is not None:
            with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "w") as pipe:  # who started us may be gone
                pipe.write(json.dumps({key: value}) + "\n")

    signals, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        held = _come_by(args)
    except ProcessLookupError as error:
        log("info", f"{args.mountpoint} is not taken over: {error}")
        return 0
    except OSError as error:
        reason = f"{args.mountpoint} can't be {'taken over' if args.take_over else 'mounted'}: {error}"
        log("error", reason)
        say("error", {"code": "Unavailable", "message": reason, "hint": "`helios doctor` checks this machine."})
        return 1
    os.chdir("/")
    if held.worker is not None and held.worker.ready_at:
        say("state", held.state)
    settings = Settings(*(getattr(args, name) for name in Settings._fields))
    status = Keeper(settings, held, signals, say).run()
    if status is None:
        return 0
    _clean_up(args, held)
    return status


def _come_by(args: argparse.Namespace) -> Held:
    """Take over, or mount; a keeper that is started again by somebody else does whichever is to be done."""
    parent, name = os.path.split(os.path.abspath(args.mountpoint))
    place = os.path.join(os.path.realpath(parent), name)  # looking at a mount that nobody serves would take for ever
    if args.take_over or (args.external and kernel.device(place)):
        try:
            return take_over(place, args.socket, args.uids, args.orphan, args.asker)
        except OSError as error:
            if args.take_over or isinstance(error, ConnectionError):  # a living keeper has it
                raise
            log("warning", "nobody holds this mount any more; it is made anew", mountpoint=place, reason=str(error))
        while (number := kernel.device(place)) is not None:
            kernel.detach(place, number)
    return mount(os.path.realpath(place), args.options, args.socket, args.uids)


def _clean_up(args: argparse.Namespace, held: Held) -> None:
    """Leave nothing of a mount that has ended; the descriptors close with this process."""
    kernel.abort(held.device)
    lock = args.lock_fd and os.readlink(f"/proc/self/fd/{args.lock_fd}")
    for path in filter(None, (args.socket, args.socket + wire.NEXT, args.pid_file, lock)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    if args.created:
        with contextlib.suppress(OSError):  # not empty: somebody uses it
            os.rmdir(held.mountpoint)
    log("info", "unmounted", mountpoint=held.mountpoint)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m heliosfs.keeper", epilog="After --: the worker's command.")
    add = parser.add_argument
    add("mountpoint")
    add("--socket", required=True, type=os.path.abspath, help="where workers and successors connect")
    add("--options", default=kernel.OPTIONS, help="mount options beside those of the descriptor")
    add("--ready-fd", type=int, help="an inherited pipe for one line of JSON")
    add("--lock-fd", type=int, help="an inherited lock, held and removed with the mount")
    add("--worker-pid-file", dest="pid_file")
    add("--created", action="store_true", help="remove the mount point with the mount")
    add("--take-over", action="store_true", help="take the mount from the keeper that has it")
    add("--asker", type=int, help="with --take-over: the pid of the worker that lost its keeper")
    add("--external", action="store_true", help="somebody else starts the workers, and this keeper")
    add("--worker-uid", dest="uids", type=int, action="append", help="users whose workers may come (our own)")
    add("--orphan", type=float, default=15.0, help="how long a worker without keeper may take to come (seconds)")
    add("--stall", dest="stall_s", type=float, default=10.0, help="a worker silent for so long is replaced")
    add("--patience", dest="patience_s", type=float, default=60.0, help="without a worker requests fail after so long")
    add("--grace", dest="grace_s", type=float, default=5.0, help="how long a worker may take to end")
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    args.argv, args.uids = argv[at + 1 :], args.uids or [os.getuid()]
    if args.external == bool(args.argv):
        parser.error("give either a worker's command after -- or --external")
    return args


if __name__ == "__main__":
    sys.exit(main())
