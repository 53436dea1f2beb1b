"""``helios replicate`` and ``helios bundle``: models from one registry to another."""

from __future__ import annotations

import os
from pathlib import Path

import click

from helios.cli.common import as_json, attached, kind_option, parse_spec, print_json, registry_option, size_text
from helios.errors import HeliosError

REPLICATE_S = 7 * 24 * 3600.0
"""Longest replication, in seconds."""


@click.command()
@click.argument("peer")
@click.argument("patterns", metavar="[PATTERN...]", nargs=-1)
@registry_option
@as_json
def replicate(peer: str, patterns: tuple[str, ...], urls: tuple[str, ...], as_json: bool) -> int:
    """Bring the repositories of the registry that the configuration calls PEER here.

    All that the configuration names, or those whose id fits a PATTERN such as 'org/*'. Only chunks that are not here
    travel. Refs and notices follow, but never over what somebody did here. The exit code is 1 where one stayed behind.
    """
    result: dict[str, object] = {}
    with attached(urls) as registry:
        for event in registry.client().replicate(peer, list(patterns) or None, timeout_s=REPLICATE_S):
            if event["event"] == "log":
                click.echo(f"helios: {event['message']}", err=True)
            elif event["event"] == "done":
                result = {key: value for key, value in event.items() if key != "event"}
    if as_json:
        print_json(result)
    else:
        travelled, logical = (size_text(float(str(result[key]))) for key in ("travelled_bytes", "logical_bytes"))
        click.echo(f"{result['commits']} commits, {result['refs']} refs, {travelled} of {logical} travelled")
    return 1 if result["problems"] else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bundle() -> None:
    """Carry models to a registry that no network reaches, in a file.

    A bundle is a tar archive that holds commits with all their files, each content once. What arrives is checked as if
    it came from a stranger, and has the same commit ids.
    """


@bundle.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("specs", metavar="[ORG/NAME[@REVISION]...]", nargs=-1)
@click.option(
    "--have",
    multiple=True,
    metavar="ORG/NAME[@REVISION]",
    help="Leave out what this revision holds: the other side has it.",
)
@kind_option
@registry_option
@as_json
def export(
    file: Path, specs: tuple[str, ...], have: tuple[str, ...], kind: str, urls: tuple[str, ...], as_json: bool
) -> None:
    """Write revisions to FILE, which appears when it is complete.

    Notices on their repositories, and on those of --have, go with them; with --have alone nothing else does.
    """
    wanted, known = ([f"{repo}@{rev}" for repo, rev in (parse_spec(s, kind) for s in each)] for each in (specs, have))
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with attached(urls) as registry, open(temporary, "xb") as out:
            size = registry.client().export_bundle(wanted, known, out)
            os.fsync(out.fileno())
        temporary.replace(file)
    except OSError as error:
        raise HeliosError(f"{file} can't be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    if as_json:
        print_json({"file": str(file), "bytes": size})
    else:
        click.echo(f"{file}: {size_text(size)}")


@bundle.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@registry_option
@as_json
def load(file: Path, urls: tuple[str, ...], as_json: bool) -> None:
    """Bring the commits and notices of FILE into the registry."""
    with attached(urls) as registry:
        done = registry.client().import_bundle(file)
    if as_json:
        sizes = {"logical_bytes": done.logical_bytes, "new_bytes": done.new_bytes}
        print_json({"commits": done.commits, **sizes, "notices": done.notices})
        return
    for commit in done.commits:
        click.echo(commit.partition("/")[2])
