"""``helios doctor``."""

from __future__ import annotations

import json
import os

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> int:
    """Check this machine and say what to fix.

    Looks at the kernel, /dev/fuse, who may mount, the mount mode, memory, free space, vLLM, GPU, the router's port and
    whether registry, object store and upstream Hub can be reached. Exits 1 when something is marked fail.
    """
    from helios import config
    from helios.doctor import examine
    from helios.home import Home

    checks = []
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in examine(config.load_from_process(), Home.from_env(os.environ), os.environ):
        checks.append(check)
        if not as_json:
            mark = click.style(f"{check.status:4}", fg=colors[check.status])
            click.echo(f"{mark}  {check.name:12}  {check.detail}")
            if check.fix:
                click.echo(f"{'':20}{check.fix}")
    failed = [check.name for check in checks if check.status == "fail"]
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [check.json() for check in checks]}, indent=2))
    elif failed:
        click.echo(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0
