"""``helios quota`` and ``helios priority``: what models may take, and which matter more."""

from __future__ import annotations

import getpass

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
    time_text,
)
from helios.errors import UsageError

CLASSES = ("critical", "normal", "scratch")


@click.command()
@registry_option
@as_json
def quota(urls: tuple[str, ...], as_json: bool) -> None:
    """Show the quotas of the registry: limits, what is used, and what is reserved by what is under way."""
    with attached(urls) as registry:
        found = registry.client().quotas()
    if as_json:
        print_json(
            [
                {"quota": q.quota, "repos": q.repos}
                | {
                    name: {part: getattr(getattr(q, part), name) for part in ("limit", "used", "reserved")}
                    for name in ("logical", "stored")
                }
                for q in found
            ]
        )
        return
    if not found:
        click.echo("The registry has no quotas (registry.quotas in its configuration).", err=True)
        return
    rows = []
    for q in found:
        for name in ("logical", "stored"):
            limit, used, reserved = (getattr(amount, name) for amount in (q.limit, q.used, q.reserved))
            share = f"{100 * (used + reserved) / limit:.0f}%" if limit else ""
            limits = size_text(limit) if limit else "any"
            rows.append([q.quota, name, size_text(used), size_text(reserved), limits, share])
    print_table(["QUOTA", "BYTES", "USED", "RESERVED", "LIMIT", "FULL"], rows, right=frozenset({2, 3, 4, 5}))


@click.command()
@click.argument("spec", metavar="[ORG/NAME[@REF]]", required=False)
@click.argument("priority", metavar="[CLASS]", required=False, type=click.Choice(CLASSES))
@click.option("--clear", is_flag=True, help="Take the class back.")
@kind_option
@registry_option
@as_json
def priority(
    spec: str | None, priority: str | None, clear: bool, kind: str, urls: tuple[str, ...], as_json: bool
) -> None:
    """Give a model, or one of its refs, a class: critical, normal or scratch. Without arguments: list them.

    Pulls and downloads of critical models go before others, those of scratch ones last; nodes evict in that order.
    """
    if spec is None:
        _list(urls, as_json)
        return
    if clear == (priority is not None):
        raise UsageError(f"say which class {spec} gets ({', '.join(CLASSES)}), or --clear")
    repo, revision = parse_spec(spec, kind)
    ref = revision if "@" in spec else None
    with attached(urls) as registry:
        client = registry.client()
        if priority is None:
            client.clear_priority(repo, ref)
        else:
            client.set_priority(repo, ref, priority, author=getpass.getuser())
    if as_json:
        print_json({"repo": repo.id, "kind": repo.kind, "ref": ref, "priority": priority})


def _list(urls: tuple[str, ...], as_json: bool) -> None:
    with attached(urls) as registry:
        found = registry.client().priorities()
    if as_json:
        print_json(
            [
                {"repo": p.id.id, "kind": p.id.kind, "ref": p.ref, "priority": p.priority, "author": p.author}
                for p in found
            ]
        )
        return
    if not found:
        click.echo("No class was given; every model is normal.", err=True)
        return
    rows = [[p.id.id + (f"@{p.ref}" if p.ref else ""), p.priority, p.author, time_text(p.time)] for p in found]
    print_table(["MODEL", "CLASS", "GIVEN BY", "SINCE"], rows)
