"""``helios usage --reads``: who read which model."""

from __future__ import annotations

import re
import time
from typing import Final

import click
import msgspec

from helios.cli.common import attached, parse_spec, print_json, print_table, size_text, time_text
from helios.errors import UsageError

_SINCE: Final = re.compile(r"([1-9][0-9]{0,4})([hd])\Z")
_UNITS: Final = {"h": 3600, "d": 86400}


def show(spec: str | None, since: str, by: str | None, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """Ask and print; one model by its commits, all models by their names, unless ``by`` says otherwise."""
    match = _SINCE.match(since)
    if match is None:
        raise UsageError(f"--since {since!r}: write hours or days, as 12h or 7d")
    repo = None if spec is None else parse_spec(spec, kind)[0]
    if spec is not None and "@" in spec:
        raise UsageError(f"{spec}: name the model without a revision; --by commit tells its commits apart")
    chosen = by or ("repo" if repo is None else "commit")
    with attached(urls) as registry:
        start = int(time.time()) - int(match[1]) * _UNITS[match[2]]
        found = registry.client().reads(since=start, repo=repo, by=chosen)
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    if not found.rows:
        click.echo(f"Nothing was read in the last {since}, as far as the registry knows.", err=True)
        return
    names = [name for name in ("time", "repo", "commit", "node") if name in chosen.split(",")]
    rows = found.rows if "time" in names else sorted(found.rows, key=lambda row: -row.bytes)
    table = []
    for row in rows:
        cells = {
            "time": time_text(row.time or 0),
            "repo": (row.repo or "").removeprefix("models/"),
            "commit": row.commit or "(not known)",
            "node": row.node or "",
        }
        table.append([*(cells[name] for name in names), str(row.reads), size_text(row.bytes)])
    head = [{"time": "FROM", "repo": "MODEL", "commit": "COMMIT", "node": "NODE"}[name] for name in names]
    print_table([*head, "READS", "BYTES"], table, right=frozenset({len(names), len(names) + 1}))
    if found.more:
        click.echo("There is more than one answer holds: ask for less time, or tell less apart.", err=True)
