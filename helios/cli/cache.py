"""``helios pin``, ``helios unpin`` and ``helios evict``: what a mount's local cache keeps."""

from __future__ import annotations

from pathlib import Path

import click

from helios.cli.common import as_json, kind_option, print_json, size_text
from helios.cli.mounted import call_for, mount_option
from helios.errors import NotFound

CLASSES = ("scratch", "normal", "critical", "pinned")


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
    found = call_for(mountpoint, "pin", model, kind, priority=priority)
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
    found = call_for(mountpoint, "unpin", model, kind)
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
    found = call_for(mountpoint, "evict", model, kind)
    if as_json:
        print_json(found)
        return
    click.echo(f"removed {found['removed']} files, freed {size_text(found['freed'])}")
    if found["kept"]:
        click.echo(
            f"helios: {len(found['kept'])} files stay: {', '.join(sorted(set(found['kept'].values())))}", err=True
        )
