"""``python -m heliosfs.keeper``: mounts, holds the mount, and starts and replaces the worker that serves it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time

from heliosfs.keeper import kernel, takeover, wire
from heliosfs.keeper.board import Board
from heliosfs.keeper.keeper import Keeper
from heliosfs.keeper.state import Held, Settings, log


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
    settings = Settings(
        socket=os.path.abspath(args.socket),
        argv=args.worker,
        pid_file=args.worker_pid_file,
        lock_fd=args.lock_fd,
        created=args.created,
        stall_s=args.stall,
        patience_s=args.patience,
        grace_s=args.grace,
        start_s=args.start,
    )
    try:
        if args.take_over:
            taken = takeover.take_over(settings.socket)
            held = taken.held
            settings = dataclasses.replace(settings, lock_fd=settings.lock_fd or taken.lock_fd)
        else:
            held = _mount(args.mountpoint, args.options, settings.socket)
    except OSError as error:
        reason = f"{args.mountpoint} can't be {'taken over' if args.take_over else 'mounted'}: {error}"
        log("error", reason)
        say("error", {"code": "Unavailable", "message": reason, "hint": "`helios doctor` checks this machine."})
        return 1
    os.chdir("/")
    keeper = Keeper(settings, held, signals, say)
    if held.worker is not None and held.worker.sock is not None:
        wire.send(held.worker.sock, keeper.welcome())
    if held.served:
        say("state", held.state)
    return keeper.run()


def _mount(mountpoint: str, options: str, socket: str) -> Held:
    listener = takeover.listen(socket)
    place = os.path.realpath(mountpoint)
    try:
        fuse_fd = kernel.mount(place, options)
        device = kernel.device(place)
        if device is None:
            raise FileNotFoundError(f"the new mount is not in /proc/self/mountinfo as {place}")
    except OSError:
        os.unlink(socket)
        raise
    board = Board.create()
    board.mounted_ns = time.time_ns()
    log("info", "mounted", mountpoint=place, dev=device)
    return Held(place, device, fuse_fd, board, listener)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m heliosfs.keeper", epilog="After --: the worker's command.")
    parser.add_argument("mountpoint")
    parser.add_argument("--socket", required=True, help="where workers and successors connect")
    parser.add_argument("--options", default=kernel.OPTIONS, help="mount options beside those of the descriptor")
    parser.add_argument("--ready-fd", type=int, help="an inherited pipe for one line of JSON")
    parser.add_argument("--lock-fd", type=int, help="an inherited lock, held and removed with the mount")
    parser.add_argument("--worker-pid-file")
    parser.add_argument("--created", action="store_true", help="remove the mount point with the mount")
    parser.add_argument("--take-over", action="store_true", help="take the mount from the keeper that has it")
    parser.add_argument("--no-spawn", action="store_true", help="somebody else starts the worker")
    parser.add_argument("--stall", type=float, default=10.0, help="a worker silent for so long is replaced (seconds)")
    parser.add_argument("--patience", type=float, default=60.0, help="requests fail after so long without a worker")
    parser.add_argument("--grace", type=float, default=5.0, help="how long a worker may take to end")
    parser.add_argument("--start", type=float, default=150.0, help="how long a worker may take to be ready")
    argv, marker, worker = sys.argv[1:], "--", []
    if marker in argv:
        at = argv.index(marker)
        argv, worker = argv[:at], argv[at + 1 :]
    args = parser.parse_args(argv)
    args.worker = worker
    if args.no_spawn == bool(args.worker):
        parser.error("give either a worker's command after -- or --no-spawn")
    return args


if __name__ == "__main__":
    sys.exit(main())
