"""``helios warm``, ``helios verify`` and ``helios drain``: what a mount does in the background."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from helios.cli.common import as_json, kind_option, parse_spec, print_json, progress_bar, size_text
from helios.cli.mounted import Mounted, mount_option
from helios.errors import NotFound, Unavailable, UsageError, from_code

POLL_S = 0.2
RESTARTS = 5
"""How often a job is asked for again because what served the mount was replaced, and with it the job."""


@click.command()
@click.argument("model", metavar="ORG/NAME[@REVISION]")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--no-wait", "--detach", "detach", is_flag=True, help="Return at once; the mount goes on.")
@kind_option
@mount_option
@as_json
def warm(model: str, patterns: tuple[str, ...], detach: bool, kind: str, mountpoint: Path | None, as_json: bool) -> int:
    """Have the mount fetch a model's files, and return when all are local and verified.

    PATTERNs are files, or patterns of files (`*.safetensors`); without any all are meant. Small files come first,
    weights in loading order, all of them behind what is being read. Ctrl-C ends the waiting, not the work.
    """
    mounted = Mounted(mountpoint)
    repo, revision = parse_spec(model, kind)
    body = {"repo": str(repo), "revision": revision, "patterns": list(patterns)}
    job = mounted.call("POST", "warm", body)
    if not detach:
        job = _follow(mounted, job, body, f"warming {model}")
    if as_json:
        print_json(job)
    else:
        click.echo(f"{job['commit']} {job['files_done']} of {job['files']} files, {size_text(job['bytes_done'])}")
    for path, reason in [*job["no_room"].items(), *job["errors"].items()]:
        click.echo(f"helios: {path}: {reason}", err=True)
    return _ended(job, detach)


@click.command()
@click.argument("model", metavar="[ORG/NAME[@REVISION]]", required=False)
@kind_option
@mount_option
@as_json
def verify(model: str | None, kind: str, mountpoint: Path | None, as_json: bool) -> int:
    """Hash every local byte of a model, or of everything in the cache, and compare.

    What is wrong is put aside, where nobody reads it, and fetched again. Exits 1 when something was wrong.
    """
    mounted = Mounted(mountpoint)
    body: dict[str, Any] = {}
    if model is not None:
        repo, revision = parse_spec(model, kind)
        body = {"repo": str(repo), "revision": revision}
    job = _follow(mounted, mounted.call("POST", "verify", body), body, f"verifying {model or 'the cache'}")
    if as_json:
        print_json(job)
    else:
        click.echo(f"{job['local']} of {job['blobs']} files are here, {size_text(job['bytes_done'])} verified")
        for bad in job["bad"]:
            click.echo(f"BAD {bad['path'] or bad['sha256']}: {bad['reason']}; {bad['outcome']}")
            if bad["in_use"]:
                click.echo("    it is open: who has it mapped, or in a native mount, must open it again", err=True)
    return _ended(job, detach=False)


@click.command()
@click.option("--timeout", "timeout_s", type=float, default=60.0, show_default=True, help="Longest wait, in seconds.")
@click.option("--undo", is_flag=True, help="Go on as before.")
@mount_option
@as_json
def drain(timeout_s: float, undo: bool, mountpoint: Path | None, as_json: bool) -> int:
    """Have the mount begin nothing new, and wait until all that it fetched is safe on the disk.

    For a node drain, or before a mount is stopped. Reads go on, and fetch what they need. Exits 1 when something is
    left after the time-out.
    """
    if timeout_s < 0:
        raise UsageError("--timeout is a number of seconds, 0 or more")
    mounted = Mounted(mountpoint)
    state = mounted.call("DELETE" if undo else "POST", "drain")
    end = time.monotonic() + timeout_s
    while not undo and not state["drained"] and time.monotonic() < end:
        time.sleep(POLL_S)
        state = mounted.call("GET", "drain")
        if not state["draining"]:  # what serves the mount was replaced, or somebody took it back
            state = mounted.call("POST", "drain")
    left = {name: count for name, count in state["pending"].items() if count}
    if as_json:
        print_json(state)
    elif undo:
        click.echo("not draining")
    else:
        click.echo("drained" if state["drained"] else f"draining: {_counted(left)} left")
    return 0 if undo or state["drained"] else 1


def _follow(mounted: Mounted, job: dict[str, Any], body: Any, what: str) -> dict[str, Any]:
    """Show how far a job is until it is over. One that went with the process that did it is asked for again."""
    restarts = 0
    with progress_bar(what, job["bytes"]) as show:
        while job["state"] in ("waiting", "running"):
            time.sleep(POLL_S)
            try:
                job = mounted.call("GET", f"{job['kind']}/{job['id']}")
            except NotFound:
                restarts += 1
                if restarts > RESTARTS:
                    raise
                job = mounted.call("POST", job["kind"], body)
            show(job["bytes_done"], job["bytes"])
    return job


def _ended(job: dict[str, Any], detach: bool) -> int:
    """The exit code. Raises the error with which a job failed."""
    if job["error"] is not None:
        raise from_code(job["error"]["code"], job["error"]["message"])
    if job["state"] == "cancelled":
        raise Unavailable(f"somebody ended the job: {job['bytes_done']} of {job['bytes']} bytes were done")
    return 0 if detach or job["state"] == "done" else 1


def _counted(left: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in left.items()) or "nothing"
