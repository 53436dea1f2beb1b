"""``helios ref``: a model's branches, tags and aliases."""

from __future__ import annotations

import click

from helios.cli.common import (
    as_json,
    attached,
    kind_option,
    parse_spec,
    print_json,
    print_table,
    registry_option,
    time_text,
)
from helios.errors import UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def ref() -> None:
    """List a model's refs, move them, and see who moved them.

    A branch moves with every push. A tag never moves. An alias, such as 'champion', moves when somebody says so. Every
    move is a compare-and-swap, and is kept with who and when.
    """


@ref.command("ls")
@click.argument("spec", metavar="ORG/NAME")
@kind_option
@registry_option
@as_json
def ls(spec: str, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """List the refs with their kinds and commits."""
    repo = parse_spec(spec, kind)[0]
    with attached(urls) as registry:
        client = registry.client()
        refs, kinds = client.refs(repo), client.ref_kinds(repo)
    found = [{"ref": name, "kind": kinds.get(name, "branch"), "commit": commit} for name, commit in refs.items()]
    if as_json:
        print_json({"refs": found})
    else:
        print_table(["REF", "KIND", "COMMIT"], [[each["ref"], each["kind"], each["commit"]] for each in found])


@ref.command("set")
@click.argument("spec", metavar="ORG/NAME[@REVISION]")
@click.argument("name", metavar="REF")
@click.option("--tag", "becomes", flag_value="tag", help="A new ref becomes a tag, which never moves.")
@click.option("--alias", "becomes", flag_value="alias", help="A new ref becomes an alias.")
@click.option("--expect", metavar="COMMIT", help="Move it only from there; by default from where it is seen to be.")
@kind_option
@registry_option
def point(spec: str, name: str, becomes: str | None, expect: str | None, kind: str, urls: tuple[str, ...]) -> None:
    """Point REF at a revision and print the commit."""
    import getpass

    repo, revision = parse_spec(spec, kind)
    with attached(urls) as registry:
        client = registry.client()
        commit, refs = client.resolve(repo, revision).commit, client.refs(repo)
        if becomes is not None and name in refs and client.ref_kinds(repo).get(name, "branch") != becomes:
            raise UsageError(f"{name} is there already, and no {becomes}: remove it first (helios rm {repo.id}@{name})")
        seen = refs.get(name) if expect is None else expect
        client.set_ref(repo, name, commit, seen, author=getpass.getuser(), kind=becomes or "branch")
    click.echo(commit)


@ref.command("log")
@click.argument("spec", metavar="ORG/NAME[@REF]")
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Moves to show.")
@kind_option
@registry_option
@as_json
def log(spec: str, limit: int, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """Show who moved the refs, or one of them, newest first; also of what is gone."""
    repo, name = parse_spec(spec, kind)
    with attached(urls) as registry:
        moves = registry.client().ref_history(repo, name if "@" in spec else None, limit)
    if as_json:
        found = [{"ref": m.ref, "old": m.old, "new": m.new, "author": m.author, "time": m.time} for m in moves]
        print_json({"moves": found})
        return
    rows = [[time_text(m.time), m.ref, (m.old or "-")[:12], (m.new or "removed")[:12], m.author] for m in moves]
    print_table(["TIME", "REF", "FROM", "TO", "BY"], rows)
