"""``helios quarantine``: files that the registry keeps back."""

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
from helios.errors import NotFound


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def quarantine() -> None:
    """Show and release files that the registry keeps back.

    Files that are read with pickle run whatever they say when they are loaded. They are stored, and listed, but nobody
    can read them until somebody has looked at them and released them.
    """


@quarantine.command("ls")
@click.argument("spec", metavar="[ORG/NAME]", required=False)
@click.option("--released", is_flag=True, help="Show also what was released.")
@kind_option
@registry_option
@as_json
def ls(spec: str | None, released: bool, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """List the files that are kept back, in one repository or in all."""
    import msgspec

    repo = None if spec is None else parse_spec(spec, kind)[0]
    with attached(urls) as registry:
        files = registry.client().kept(repo, released=released)
    if as_json:
        print_json({"files": [msgspec.to_builtins(file) for file in files]})
        return
    rows = [
        [
            file.repo.partition("/")[2],
            file.path,
            file.sha256[:12],
            "kept back" if file.released is None else f"released {time_text(file.released)} by {file.released_by}",
            file.findings,
        ]
        for file in files
    ]
    print_table(["REPOSITORY", "PATH", "SHA256", "STATE", "FINDINGS"], rows)


@quarantine.command("release")
@click.argument("spec", metavar="ORG/NAME")
@click.argument("file", metavar="PATH|SHA256")
@kind_option
@registry_option
def release(spec: str, file: str, kind: str, urls: tuple[str, ...]) -> None:
    """Let a file go: everybody who may read the repository can then read it."""
    import getpass

    repo = parse_spec(spec, kind)[0]
    with attached(urls) as registry:
        client = registry.client()
        found = {kept.sha256 for kept in client.kept(repo) if file in (kept.path, kept.sha256, kept.sha256[:12])}
        if not found:
            raise NotFound(
                f"{repo.id} has no file {file!r} that is kept back", hint=f"See: helios quarantine ls {repo.id}"
            )
        for sha256 in sorted(found):
            client.release(repo, sha256, getpass.getuser())
            click.echo(f"released {sha256}")
