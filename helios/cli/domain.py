"""``helios domain``: where tenants' models are stored, apart from one another."""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec

from helios.cli.common import as_json, attached, print_json, print_table, registry_option, size_text

LONGEST_S = 24 * 3600.0
"""Longest removal, in seconds."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def domain() -> None:
    """List the domains that tenants' models are stored in, and remove one."""


@domain.command("ls")
@registry_option
@as_json
def list_(urls: tuple[str, ...], as_json: bool) -> None:
    """Show every domain: whose it is, and what it holds.

    UNIQUE counts every distinct file of the domain once, STORED is what its objects take, WAITING are objects that are
    deleted when nobody can know of them any more.
    """
    with attached(urls) as registry:
        found = registry.client().domains()
    if as_json:
        print_json([msgspec.to_builtins(row) for row in found])
        return
    rows = [
        [
            row.domain,
            ", ".join(row.tenants) or "-",
            str(row.repositories),
            size_text(row.unique),
            size_text(row.stored),
            str(row.waiting),
        ]
        for row in found
    ]
    head = ["DOMAIN", "TENANTS", "MODELS", "UNIQUE", "STORED", "WAITING"]
    print_table(head, rows, right=frozenset({2, 3, 4, 5}))


@domain.command()
@click.argument("name")
@registry_option
@as_json
def rm(name: str, urls: tuple[str, ...], as_json: bool) -> int:
    """Remove a domain that no tenant and no model is in any more, with all that is stored in it.

    Objects are deleted when the leases on them are over; the registry does so by itself. The exit code is 1 where a
    push or pull under way keeps something: run it again then.
    """
    report: dict[str, Any] = {}
    with attached(urls) as registry:
        for event in registry.client().remove_domain(name, timeout_s=LONGEST_S):
            if event["event"] == "done":
                report = {key: value for key, value in event.items() if key != "event"}
    if as_json:
        print_json(report)
        return 1 if report["busy"] else 0
    click.echo(
        f"removed: {report['removed_blobs']} files, {report['removed_objects']} objects of "
        f"{size_text(report['freed_bytes'])}; deleted: {report['deleted_objects']} objects"
    )
    if report["waiting"]:
        until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report["until"]))
        click.echo(f"{report['waiting']} objects wait for the leases of readers and are deleted after {until}")
    if report["busy"]:
        click.echo(f"helios: pushes or pulls under way rely on {report['busy']} things; run this again", err=True)
    return 1 if report["busy"] else 0
