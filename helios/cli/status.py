"""``helios status``."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from helios.cli.common import print_table, size_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from helios.config import Config
    from helios.home import Home

EVERY_S = 1.0
SLOW_S = 15.0
"""How often the view is made anew, and how often what takes longer is: the disk usage of store and cache."""

PIPE_COLUMNS = 140


@click.command()
@click.option("--watch", "--live", "watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(watch: bool, as_json: bool) -> None:
    """Show what runs on this machine for this HELIOS_HOME, and what its store and its mounts hold and do.

    Starts nothing: a registry that does not run is shown as such.
    """
    from helios import status as facts
    from helios.config import load_from_process
    from helios.home import Home

    config, home = load_from_process(), Home.from_env(os.environ)
    if as_json:
        click.echo(json.dumps(facts.collect(config, home), indent=2))
    elif watch:
        _watch(config, home)
    else:
        _print(facts.collect(config, home))


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console

    from helios.cli.view import mount_view

    for name, text in _heading(document):
        click.echo(f"{name:<10} {text}")
    click.echo()
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    for mount in document["mounts"]:
        console.print(mount_view(mount, console.width))
    rows = [[p["name"], str(p["pid"]), "up" if p["alive"] else "dead", p["log"]] for p in document["processes"]]
    if rows:
        print_table(["WHAT", "PID", "STATE", "WHERE"], rows)
    elif not document["mounts"]:
        click.echo("no mount, router or vLLM runs")
    for line in _compiled(document):
        click.echo(line)


def _watch(config: Config, home: Home) -> None:
    """Show it until Ctrl-C: in place on a terminal, one after another elsewhere."""
    from rich.console import Console
    from rich.live import Live

    from helios import status as facts

    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    document, asked = facts.collect(config, home), time.monotonic()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            if console.is_terminal:
                live.update(_view(document, console.width), refresh=True)
            else:
                console.print(_view(document, console.width))
                sys.stdout.flush()
            time.sleep(EVERY_S)
            if time.monotonic() - asked > SLOW_S:
                document, asked = facts.collect(config, home), time.monotonic()
            else:
                document |= {"mounts": facts.mounts_of(home)}


def _view(document: dict[str, Any], width: int) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from helios.cli.view import mount_view

    grid = Table.grid(padding=(0, 2))
    for name, text in _heading(document):
        grid.add_row(Text(name, "dim"), Text(text, overflow="ellipsis", no_wrap=True))
    shown: list[RenderableType] = [mount_view(mount, width) for mount in document["mounts"]]
    for process in document["processes"]:
        state = ("up", "green") if process["alive"] else ("dead", "red")
        shown.append(Text.assemble(f"{process['name']}  ", state, (f"  pid {process['pid']}", "dim")))
    shown += [Text(line) for line in _compiled(document)]
    return Group(grid, Text(), *(shown or [Text("no mount, router or vLLM runs")]))


def _compiled(document: dict[str, Any]) -> list[str]:
    return [
        f"compiled kernels of {start['model']}: {start['found']}"
        + (f"; published as {start['published'][:12]}" if start["published"] else "")
        for start in document["compiled"]
    ]


def _heading(document: dict[str, Any]) -> list[tuple[str, str]]:
    store = document["store"]
    kept = f"{size_text(store['stored'])} in {store['path']}" if store["stored"] is not None else "unknown"
    saved = f", for {size_text(store['logical'])} of models" if store["logical"] is not None else ""
    tiers = [(name, document[name]) for name in ("cache", "l2") if document[name]]
    return [
        ("home", document["home"]),
        ("registry", _registry(document["registry"])),
        ("store", f"{kept}{saved}"),
        *((name, f"{size_text(tier['bytes'])} in {tier['path']}") for name, tier in tiers),
    ]


def _registry(registry: dict[str, Any]) -> str:
    if not registry["urls"]:
        return "embedded, not running (it starts when a command needs it)"
    state = "answers" if registry["reachable"] else "does not answer"
    return f"{', '.join(registry['urls'])} ({'embedded, ' if registry['embedded'] else ''}{state})"
