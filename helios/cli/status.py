"""``helios status``."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from helios.cli.common import print_table, size_text


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(as_json: bool) -> None:
    """Show what runs on this machine for this HELIOS_HOME, and what its store holds.

    Starts nothing: a registry that does not run is shown as such.
    """
    from helios import status as facts
    from helios.config import load_from_process
    from helios.home import Home

    document = facts.collect(load_from_process(), Home.from_env(os.environ))
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"home       {document['home']}")
    click.echo(f"registry   {_registry(document['registry'])}")
    store = document["store"]
    kept = f"{size_text(store['stored'])} in {store['path']}" if store["stored"] is not None else "unknown"
    saved = f", for {size_text(store['logical'])} of models" if store["logical"] is not None else ""
    click.echo(f"store      {kept}{saved}")
    click.echo(f"cache      {size_text(document['cache']['bytes'])} in {document['cache']['path']}\n")
    rows = []
    for m in document["mounts"]:
        rows.append(["mount", str(m["pid"]), "up" if m["alive"] else "dead", m["mountpoint"]])
        if pool := m["pool"]:
            held = f"{size_text(pool['used'])} of {size_text(pool['limit'])} in memory"
            rows.append(["pool", "", "", f"{held}, {sum(pool['hits'].values())} hits"])
        for v in m["volumes"] or ():
            rows.append(["volume", "", v["commit"][:12], f"{m['mountpoint']}/.volumes/{v['id']} ({v['repo']})"])
    rows += [[p["name"], str(p["pid"]), "up" if p["alive"] else "dead", p["log"]] for p in document["processes"]]
    print_table(["WHAT", "PID", "STATE", "WHERE"], rows) if rows else click.echo("no mount, router or vLLM runs")


def _registry(registry: dict[str, Any]) -> str:
    if not registry["urls"]:
        return "embedded, not running (it starts when a command needs it)"
    state = "answers" if registry["reachable"] else "does not answer"
    return f"{', '.join(registry['urls'])} ({'embedded, ' if registry['embedded'] else ''}{state})"
