"""``helios mount`` and ``helios umount``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import msgspec

from helios.cli.mounted import mountpoint_argument
from helios.home import Home


def _show(state: Any, as_json: bool) -> None:
    document = msgspec.to_builtins(state)
    click.echo(json.dumps(document) if as_json else document["mountpoint"])


@click.command()
@mountpoint_argument
@click.option("--foreground", is_flag=True, help="Stay until Ctrl-C, logging to standard error.")
@click.option("--upgrade", is_flag=True, help="Replace what serves a mount by the installed version; readers go on.")
@click.option("--registry", "urls", multiple=True, metavar="URL", help="Registry to use; more than one: in order.")
@click.option("--cache", type=click.Path(path_type=Path), metavar="DIR", help="Directory of the local cache.")
@click.option("--allow-other/--no-allow-other", default=None, help="Let other users read it (default: where allowed).")
@click.option(
    "--shadow", type=click.FloatRange(0, 100), metavar="PERCENT", help="Compare a part of the reads with a download."
)
@click.option("--json", "as_json", is_flag=True, help="Print what is known about the mount as JSON.")
def mount(
    mountpoint: Path,
    foreground: bool,
    upgrade: bool,
    urls: tuple[str, ...],
    cache: Path | None,
    allow_other: bool | None,
    shadow: float | None,
    as_json: bool,
) -> int:
    """Mount the registry's models at MOUNTPOINT, read-only, and return when it is ready.

    MOUNTPOINT/org/name/@main/… are a model's files; MOUNTPOINT/.hub is a Hugging Face cache of all models.
    """
    from helios import config, mounting, native

    if upgrade:
        _show(mounting.upgrade(Home.from_env(os.environ), mountpoint), as_json)
        return 0
    overrides: dict[str, dict[str, Any]] = {
        "registry": {"urls": list(urls) or None},
        "mount": {
            "cache": os.path.abspath(cache) if cache else None,
            "allow_other": allow_other,
            "shadow_percent": shadow,
        },
    }
    settings = config.load_from_process(overrides)
    home = Home.from_env(os.environ)
    place = mounting.prepare(home, mountpoint)
    if place.note:
        click.echo(f"helios: {place.note}", err=True)
    if not foreground:
        _show(mounting.start(home, place, overrides), as_json)
        return 0
    reasons = native.reasons_against(settings.mount.mode)
    if not reasons:
        return mounting.run_native(home, place, overrides, lambda state: _show(state, as_json))
    from helios import logs
    from heliosfs.daemon import run
    from heliosfs.plan import Plan

    logs.setup(settings.log)
    plan = Plan(place.mountpoint, settings, home, os.environ, place.created, portable="; ".join(reasons))
    return run(plan, lambda state: _show(state, as_json))


@click.command()
@mountpoint_argument
@click.option("--json", "as_json", is_flag=True, help="Print what was unmounted as JSON.")
def umount(mountpoint: Path, as_json: bool) -> None:
    """Unmount MOUNTPOINT and wait until its process is gone.

    Files that are still open there fail from then on.
    """
    from helios import unmounting

    gone = unmounting.stop(Home.from_env(os.environ), mountpoint)
    if as_json:
        click.echo(json.dumps({"unmounted": str(gone)}))
