"""``helios where``: at which level models are, and having one brought here."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from helios.registry_answers import Levels, Place


@click.command()
@click.argument("spec", metavar="[ORG/NAME[@REVISION]]", required=False)
@click.option("--fetch", is_flag=True, help="Have it brought from the upstream if it is not here, without waiting.")
@kind_option
@registry_option
@as_json
def where(spec: str | None, fetch: bool, kind: str, urls: tuple[str, ...], as_json: bool) -> int:
    """Show at which level models are: memory, front store, object store, upstream.

    Without a model all that the registry knows are listed. Asking changes nothing; the upstream is asked only about a
    revision that the registry knows nothing of. The exit code is 1 where the model is nowhere, where that can't be
    told, or where fetching it failed.
    """
    import msgspec

    if spec is None:
        if fetch:
            raise UsageError("--fetch needs a model")
        _all(urls, as_json)
        return 0
    repo, rev = parse_spec(spec, kind)
    with attached(urls) as registry:
        client = registry.client()
        place = client.fetch(repo, rev) if fetch else client.where(repo, rev)
    coming = place.fetch is not None and place.fetch.state == "running"
    failed = place.fetch is not None and place.fetch.state == "failed"
    code = 1 if place.state == "nowhere" or failed or (place.state == "unknown" and not coming) else 0
    if as_json:
        print_json(msgspec.to_builtins(place))
        return code
    click.echo(_sentence(f"{repo.id}@{rev}", place), err=place.state in ("nowhere", "unknown") and not coming)
    if place.fetch is not None:
        click.echo(_progress(place), err=failed)
    elif place.state in ("upstream", "partial"):
        click.echo(f"Fetch it with: helios where --fetch {spec}, or wait for it with: helios pull {spec}", err=True)
    if place.levels is not None and place.levels.stored:
        click.echo()
        print_table(["LEVEL", "BYTES", "SHARE"], _levels(place.levels), right=frozenset({1, 2}))
    return code


def _sentence(what: str, place: Place) -> str:
    size = "" if place.bytes is None else size_text(place.bytes)
    match place.state:
        case "here":
            return f"{what} is here: commit {place.commit}, {size}"
        case "partial":
            return f"{what} is here in part: {size_text(place.held)} of {size}, commit {place.commit}"
        case "upstream":
            return f"{what} is at the upstream only: commit {place.commit}, {size}"
        case "nowhere":
            return f"helios: {what} is nowhere: {place.reason}"
    if place.fetch is not None:
        return f"{what} is not here"
    return f"helios: {what} is not here, and whether the upstream has it can't be told: {place.reason}"


def _progress(place: Place) -> str:
    fetch = place.fetch
    assert fetch is not None
    if fetch.state == "failed":
        return f"helios: fetching it failed: {fetch.error.message if fetch.error else ''}"
    if not fetch.files:
        return "It is being fetched; what it holds is being asked"
    share = f"{fetch.done / fetch.total:.0%}" if fetch.total else "0%"
    return f"It is being fetched: {size_text(fetch.done)} of {size_text(fetch.total)} ({share}), {fetch.files} files"


def _levels(levels: Levels) -> list[list[str]]:
    def share(count: int) -> list[str]:
        return [size_text(count), f"{count / levels.stored:.0%}"]

    rows = [["memory", "names" if levels.memory else "no", ""]]
    if levels.front is not None:
        rows.append(["front", *share(levels.front)])
    rows.append(["store", *share(levels.stored - levels.waiting)])
    return rows


def _all(urls: tuple[str, ...], as_json: bool) -> None:
    import msgspec

    with attached(urls) as registry:
        models = registry.client().places()
    if as_json:
        print_json({"models": msgspec.to_builtins(models)})
        return
    if not models:
        click.echo("The registry is empty; `helios push DIRECTORY org/name` publishes a model.", err=True)
        return
    front = any(model.levels.front is not None for model in models)
    head = ["MODEL", "STATE", "SIZE", "MEMORY", *(["FRONT"] if front else []), "STORE"]
    rows = [
        [
            model.repo.removeprefix("models/") + (f"@{model.commit[:12]}" if model.commit else ""),
            model.state,
            size_text(model.bytes),
            "names" if model.levels.memory else "",
            *([_share(model.levels, model.levels.front or 0)] if front else []),
            _share(model.levels, model.levels.stored - model.levels.waiting),
        ]
        for model in models
    ]
    print_table(head, rows, right=frozenset(range(2, len(head))) - {3})


def _share(levels: Levels, count: int) -> str:
    return f"{count / levels.stored:.0%}" if levels.stored else ""
