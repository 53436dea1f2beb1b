"""``helios mirror``: which upstream refs the registry follows, letting them move, and letting go of them."""

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
from helios.errors import Conflict, RevisionNotFound


@click.group()
def mirror() -> None:
    """Show, approve and detach the upstream refs that the registry follows."""


@mirror.command()
@registry_option
@as_json
def ls(urls: tuple[str, ...], as_json: bool) -> None:
    """List the refs that are followed, and moves that wait for approval."""
    import msgspec

    with attached(urls) as registry:
        refs = registry.client().followed()
    if as_json:
        print_json(msgspec.to_builtins(refs))
        return
    if not refs:
        click.echo("No upstream ref is followed: the Hub API has not been asked for one.", err=True)
        return
    rows = [
        [
            f"{ref.repo.removeprefix('models/')}@{ref.ref}",
            ref.policy,
            ref.commit[:12],
            (ref.pending or "")[:12],
            time_text(int(ref.checked)),
        ]
        for ref in refs
    ]
    print_table(["REF", "POLICY", "COMMIT", "WAITS", "ASKED"], rows)


@mirror.command()
@click.argument("spec", metavar="ORG/NAME[@REF]")
@click.argument("commit", required=False)
@kind_option
@registry_option
@as_json
def approve(spec: str, commit: str | None, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """Let a ref (default: main) move to the upstream's COMMIT that waits; default: whichever waits."""
    repo, ref = parse_spec(spec, kind)
    with attached(urls) as registry:
        client = registry.client()
        if commit is None:
            known = next((each for each in client.followed() if (each.repo, each.ref) == (str(repo), ref)), None)
            if known is None:
                raise RevisionNotFound(f"{repo.id}@{ref} is not followed", hint="`helios mirror ls` shows what is.")
            if known.pending is None:
                raise Conflict(f"nothing waits for approval at {repo.id}@{ref}: it is at {known.commit}")
            commit = known.pending
        client.approve(repo, ref, commit)
    if as_json:
        print_json({"repo": repo.id, "ref": ref, "commit": commit})
    else:
        click.echo(commit)


@mirror.command()
@click.argument("spec", metavar="ORG/NAME[@REF]")
@kind_option
@registry_option
@as_json
def detach(spec: str, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """Make a ref (default: main) one's own: it follows the upstream no more and can be pushed to.

    Removing it (`helios rm ORG/NAME@REF`) lets the next request follow the upstream again.
    """
    repo, ref = parse_spec(spec, kind)
    with attached(urls) as registry:
        registry.client().detach(repo, ref)
    if as_json:
        print_json({"repo": repo.id, "ref": ref})
    else:
        click.echo(f"{repo.id}@{ref} follows the upstream no more.", err=True)
