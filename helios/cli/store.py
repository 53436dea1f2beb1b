"""``helios gc``, ``helios usage`` and ``helios store``: what the registry keeps."""

from __future__ import annotations

from typing import Any

import click

from helios.cli.common import (
    as_json,
    attached,
    kind_option,
    parse_spec,
    print_json,
    print_table,
    registry_option,
    size_text,
)
from helios.errors import UsageError

LONGEST_S = 7 * 24 * 3600.0
"""Longest collection or verification, in seconds."""


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@registry_option
@as_json
def gc(dry_run: bool, urls: tuple[str, ...], as_json: bool) -> int:
    """Remove what no ref, lease or recent use keeps, and has been garbage for the grace.

    The exit code is 1 where something could not be looked at.
    """
    with attached(urls) as registry:
        report = _last(registry.client().collect(dry_run=dry_run, timeout_s=LONGEST_S))
    if as_json:
        print_json(report)
        return 1 if report["problems"] else 0
    kept = ", ".join(f"{report[f'kept_{why}']} {text}" for why, text in _KEPT)
    click.echo(f"{report['commits']} commits: {kept}")
    verb = "would go" if dry_run else "removed"
    click.echo(
        f"{verb}: {report['removed_commits']} commits, {report['removed_blobs']} files, "
        f"{report['removed_objects']} objects of {size_text(report['freed_bytes'])}"
    )
    verb = "would be rewritten" if dry_run else "rewritten"
    click.echo(f"{verb}: {report['rewritten_objects']} objects, {size_text(report['rewritten_bytes'])} of them garbage")
    click.echo(
        f"waiting: {report['condemned_commits']} commits and {report['condemned_blobs']} files for the grace, "
        f"{report['waiting_objects']} objects for readers; {report['busy_blobs']} files are in use by pushes or pulls"
    )
    if not dry_run:
        click.echo(f"deleted: {report['deleted_objects']} objects")
    for problem in report["problems"]:
        click.echo(f"helios: {problem}", err=True)
    return 1 if report["problems"] else 0


_KEPT = (
    ("refs", "named by refs"),
    ("history", "in their history"),
    ("pinned", "leased"),
    ("recent", "in use not long ago"),
)


@click.command()
@click.argument("spec", metavar="[ORG/NAME]", required=False)
@click.option("--reads", is_flag=True, help="Show who read what instead.")
@click.option("--since", default="7d", metavar="TIME", help="With --reads: how far back, as 12h or 7d (default: 7d).")
@click.option("--by", default=None, metavar="WHAT", help="With --reads: repo, commit, node, time, or some with commas.")
@kind_option
@registry_option
@as_json
def usage(
    spec: str | None, reads: bool, since: str, by: str | None, kind: str, urls: tuple[str, ...], as_json: bool
) -> None:
    """Show the bytes of each model: logical, unique and stored; with --reads how often each was read.

    LOGICAL counts every commit as a full copy, UNIQUE every distinct file once, STORED what the model's files take in
    the store, where what several share is divided among them: the column adds up to all that is stored.
    """
    if reads:
        from helios.cli.reads import show

        show(spec, since, by, kind, urls, as_json)
        return
    if spec is not None:
        raise UsageError("usage shows all models; with --reads one can be named")
    with attached(urls) as registry:
        found = registry.client().usages()
    if as_json:
        print_json(found)
        return
    rows = [
        [row["repo"].partition("/")[2], *(size_text(row[name]) for name in ("logical", "unique", "stored"))]
        for row in found["repos"]
    ]
    rows.append(["(no model)", "", "", size_text(found["unheld"])])
    rows.append(["total", *(size_text(found["total"][name]) for name in ("logical", "unique", "stored"))])
    print_table(["MODEL", "LOGICAL", "UNIQUE", "STORED"], rows, right=frozenset({1, 2, 3}))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def store() -> None:
    """Look after the registry's object store."""


@store.command()
@click.argument("spec", metavar="[ORG/NAME]", required=False)
@click.option(
    "--sample", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Share to look at (default: 1)."
)
@click.option("--repair", is_flag=True, help="Get what is damaged from other copies, peers or the upstream.")
@kind_option
@registry_option
@as_json
def verify(spec: str | None, sample: float, repair: bool, kind: str, urls: tuple[str, ...], as_json: bool) -> int:
    """Hash what is stored, all of it or what one model needs.

    The exit code is 1 where damage was found and not repaired.
    """
    repo = None if spec is None else parse_spec(spec, kind)[0]
    with attached(urls) as registry:
        client = registry.client()
        found = _last(client.verify(repo, sample, repair=repair, timeout_s=LONGEST_S), tell=True)
    repaired = found["repaired"]
    whole = found["damaged"] == 0 or (repaired is not None and not repaired["failed"])
    if as_json:
        print_json(found)
        return 0 if whole else 1
    for damage in found["damage"]:
        what = {"missing": "is missing", "size": "has another size", "bytes": "has wrong bytes"}[damage["kind"]]
        chunk = f", chunk {damage['chunk']}" if damage["chunk"] else ""
        click.echo(f"{damage['object']} {what}{chunk}; {len(damage['blobs'])} files need it")
    click.echo(
        f"{found['objects']} objects, {found['chunks']} chunks, {size_text(found['bytes'])} read; "
        f"{found['damaged']} problems, {found['stray_objects']} objects that nothing names"
    )
    if repaired is not None:
        here = repaired["replicas"] + repaired["store"]
        click.echo(
            f"repaired: {here} from copies in the store, {repaired['peers']} from peers, {repaired['upstream']} from "
            f"the upstream, {repaired['metadata']} from the metadata; {repaired['records']} of them were records, the "
            f"others chunks; {repaired['failed']} not"
        )
        for problem in repaired["problems"]:
            click.echo(f"helios: {problem}", err=True)
    return 0 if whole else 1


@store.command()
@click.argument("spec", metavar="[ORG/NAME]", required=False)
@click.option(
    "--unread-for",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long nobody has read what is compressed (default: registry.recompress_after_s).",
)
@click.option("--dry-run", is_flag=True, help="Only try samples, and say what would be saved.")
@kind_option
@registry_option
@as_json
def compress(
    spec: str | None, unread_for: float | None, dry_run: bool, kind: str, urls: tuple[str, ...], as_json: bool
) -> int:
    """Store again, compressed, what nobody has read for a while: of all models, or of one.

    Readers notice nothing. The room is free once no reader can rely on the old objects any more. The exit code is 1
    where something could not be compressed.
    """
    repo = None if spec is None else parse_spec(spec, kind)[0]
    with attached(urls) as registry:
        client = registry.client()
        report = _last(client.compress(repo, unread_for, dry_run=dry_run, timeout_s=LONGEST_S), tell=True)
    if as_json:
        print_json(report)
        return 1 if report["problems"] else 0
    verb = "would become about" if dry_run else "became"
    click.echo(
        f"{report['compressed']} of {report['objects']} cold objects: {size_text(report['before'])} {verb} "
        f"{size_text(report['after'])}{_saved(report)}"
    )
    click.echo(
        f"left as they are: {report['poor']} that would save too little, {report['linked']} that mounts here have, "
        f"{report['busy']} in use by pushes or pulls"
    )
    if report["by_type"]:
        rows = [
            [name, str(part["chunks"]), size_text(part["before"]), size_text(part["after"]), _saved(part)[2:-1]]
            for column in ("by_type", "by_codec")
            for name, part in sorted(report[column].items())
        ]
        print_table(["CHUNKS OF", "COUNT", "BEFORE", "AFTER", "SAVED"], rows, right=frozenset({1, 2, 3, 4}))
    for problem in report["problems"]:
        click.echo(f"helios: {problem}", err=True)
    return 1 if report["problems"] else 0


def _saved(part: dict[str, Any]) -> str:
    return f" ({1 - part['after'] / part['before']:.1%})" if part["before"] else ""


def _last(events: Any, *, tell: bool = False) -> dict[str, Any]:
    """The last event of a job, without its name."""
    result: dict[str, Any] = {}
    for event in events:
        if tell and event["event"] == "log":
            click.echo(f"helios: {event['message']}", err=True)
        elif event["event"] == "done":
            result = {key: value for key, value in event.items() if key != "event"}
    return result
