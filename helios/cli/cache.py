"""``helios pin``, ``helios unpin`` and ``helios evict``: what a mount's local cache keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from helios.cli.common import as_json, kind_option, parse_spec, print_json, size_text
from helios.errors import NotFound, UsageError

mount_option = click.option(
    "--mount",
    "mountpoint",
    type=click.Path(path_type=Path),
    metavar="MOUNTPOINT",
    help="The mount whose cache is meant; needed where there are several.",
)

CLASSES = ("scratch", "normal", "critical", "pinned")

CALL_S = 60.0


@click.command()
@click.argument("model", metavar="ORG/NAME[@REVISION]")
@click.option(
    "--priority",
    type=click.Choice(CLASSES),
    default="pinned",
    show_default=True,
    help="Lower ones are evicted first, pinned never.",
)
@kind_option
@mount_option
@as_json
def pin(model: str, priority: str, kind: str, mountpoint: Path | None, as_json: bool) -> None:
    """Keep a model's files in the cache once they are there.

    The commit that the revision names now is meant. Nothing is fetched.
    """
    found = _call(mountpoint, "pin", model, kind, priority=priority)
    print_json(found) if as_json else click.echo(f"{found['commit']} {found['class']}")


@click.command()
@click.argument("model", metavar="ORG/NAME[@REVISION]")
@kind_option
@mount_option
@as_json
def unpin(model: str, kind: str, mountpoint: Path | None, as_json: bool) -> None:
    """Take back what `helios pin` did for this revision, or for this commit.

    Nothing is removed: the files may go when room is needed.
    """
    found = _call(mountpoint, "unpin", model, kind)
    if as_json:
        print_json(found)
    for gone in found["unpinned"] if not as_json else ():
        click.echo(gone["commit"])
    if not found["unpinned"]:
        raise NotFound(f"{model} is not pinned")


@click.command()
@click.argument("model", metavar="ORG/NAME[@REVISION]")
@kind_option
@mount_option
@as_json
def evict(model: str, kind: str, mountpoint: Path | None, as_json: bool) -> None:
    """Remove a model's files from the cache, but for those that are pinned or in use.

    They are fetched again when they are read.
    """
    found = _call(mountpoint, "evict", model, kind)
    if as_json:
        print_json(found)
        return
    click.echo(f"removed {found['removed']} files, freed {size_text(found['freed'])}")
    if found["kept"]:
        click.echo(
            f"helios: {len(found['kept'])} files stay: {', '.join(sorted(set(found['kept'].values())))}", err=True
        )


def _call(mountpoint: Path | None, what: str, model: str, kind: str, **fields: str) -> dict[str, Any]:
    """What the mount's control API answers (docs/control-api.md)."""
    from helios.http.client import HttpClient

    repo, revision = parse_spec(model, kind)
    client = HttpClient(f"unix:{_socket(mountpoint)}", timeout_s=CALL_S)
    try:
        body = {"repo": str(repo), "revision": revision} | fields
        answer: dict[str, Any] = client.json("POST", f"/api/v1/{what}", body=body)
        return answer
    finally:
        client.close()


def _socket(mountpoint: Path | None) -> str:
    """The control socket of the mount that is meant. Raises NotFound, UsageError."""
    from helios import mounts
    from helios.home import Home

    home = Home.from_env(os.environ)
    running = [state for state, alive in mounts.states(home) if alive]
    if mountpoint is not None:
        place = str(mounts.canonical(mountpoint))
        running = [state for state in running if state.mountpoint == place]
        if not running:
            raise NotFound(f"{place} is no mount of {home.root}", hint="`helios status` shows those that there are.")
    if not running:
        raise NotFound(f"{home.root} has no mount", hint="`helios mount MOUNTPOINT` makes one.")
    if len(running) > 1:
        raise UsageError(f"say which mount with --mount: {', '.join(state.mountpoint for state in running)}")
    return running[0].socket
