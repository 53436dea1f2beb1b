"""``helios push``, ``pull``, ``ls``, ``show`` and ``rm``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from helios.cli.common import (
    as_json,
    attached,
    kind_option,
    parse_spec,
    print_json,
    print_table,
    progress_bar,
    registry_option,
    size_text,
    time_text,
)
from helios.errors import UsageError

if TYPE_CHECKING:
    from helios.names import RepoId
    from helios.registry_client import RegistryClient

PULL_S = 24 * 3600.0
"""Longest pull, in seconds: a terabyte over 100 Mbit/s."""


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("spec", metavar="ORG/NAME[@REF]")
@click.option("-m", "--message", default="", help="A line for the model's history.")
@kind_option
@registry_option
@as_json
def push(directory: Path, spec: str, message: str, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """Publish DIRECTORY as ORG/NAME and print the commit.

    The ref (default: main) then points at the commit. The same files give the same commit. Links inside the directory
    are followed; .git and .cache/huggingface are left out.
    """
    from helios.publish import publish, scan
    from heliosfs.store.sending import ByChunks

    repo, ref = parse_spec(spec, kind)
    files = scan(directory)
    total = sum(file.size for file in files)
    with attached(urls) as registry, progress_bar(f"push {repo.id}", total) as progress:
        client = registry.client()
        result = publish(
            client, directory, repo, ref, message=message, files=files, progress=progress, sender=ByChunks()
        )
        _tell_kept(client, repo)
    if sys.stderr.isatty():
        sent = "" if client.local else f"{size_text(result.sent_bytes)} sent; "
        new, old = size_text(result.new_bytes), size_text(result.deduplicated_bytes)
        click.echo(f"helios: {len(files)} files, {size_text(total)}: {sent}{new} new, {old} stored already", err=True)
    if not as_json:
        click.echo(result.commit)
        return
    print_json(
        {
            "commit": result.commit,
            "repo": repo.id,
            "ref": ref,
            "manifest": result.manifest,
            "logical_bytes": result.logical_bytes,
            "new_bytes": result.new_bytes,
            "deduplicated_bytes": result.deduplicated_bytes,
            "sent_bytes": result.sent_bytes,
            "unchanged": result.unchanged,
        }
    )


@click.command()
@click.argument("spec", metavar="ORG/NAME[@REVISION]")
@kind_option
@registry_option
@as_json
def pull(spec: str, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """Bring a model from the upstream Hub into the registry and print the commit.

    Files that are stored already are not fetched again, and an interrupted pull goes on where it was.
    """
    repo, revision = parse_spec(spec, kind)
    sizes: dict[str, int] = {}
    done: dict[str, int] = {}
    commit = ""
    with attached(urls) as registry, progress_bar(f"pull {repo.id}", 0) as progress:
        client = registry.client()
        for event in client.pull(repo, revision, timeout_s=PULL_S):
            match event.get("event"):
                case "file":
                    sizes[event["path"]] = event["size"]
                case "progress":
                    done[event["path"]] = event["done"]
                case "log":
                    click.echo(f"helios: {event['message']}", err=True)
                case "done":
                    commit = event["commit"]
            progress(sum(done.values()), sum(sizes.values()))
        _tell_kept(client, repo)
    if as_json:
        print_json({"commit": commit, "repo": repo.id, "revision": revision})
    else:
        click.echo(commit)


def _tell_kept(client: RegistryClient, repo: RepoId) -> None:
    """Say which files nobody can read yet: loading the model would fail, and only the registry's log knew why."""
    if kept := client.kept(repo):
        some = ", ".join(file.path for file in kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
        click.echo(
            f"helios: pickled, and kept back until somebody releases them: {some}\nSee: helios quarantine ls {repo.id}",
            err=True,
        )


@click.command()
@registry_option
@as_json
def ls(urls: tuple[str, ...], as_json: bool) -> None:
    """List the models in the registry."""
    with attached(urls) as registry:
        repos = registry.client().repos()
    if as_json:
        print_json(
            [
                {"repo": r.id.id, "kind": r.id.kind, "refs": r.refs, "bytes": r.bytes, "updated": r.updated}
                for r in repos
            ]
        )
        return
    if not repos:
        click.echo("The registry is empty; `helios push DIRECTORY org/name` publishes a model.", err=True)
        return
    rows = [
        [r.id.id if r.id.kind == "models" else r.repo, size_text(r.bytes), ", ".join(r.refs), time_text(r.updated)]
        for r in repos
    ]
    print_table(["NAME", "SIZE", "REFS", "UPDATED"], rows, right=frozenset({1}))


@click.command()
@click.argument("spec", metavar="ORG/NAME[@REVISION]")
@kind_option
@registry_option
@as_json
def show(spec: str, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """Show a model's revisions and files, and what deduplication saves."""
    from heliosfs.store.manifest import Manifest

    repo, revision = parse_spec(spec, kind)
    with attached(urls) as registry:
        client = registry.client()
        refs, notices = client.refs(repo), client.notices(repo)
        at = client.resolve(repo, revision)
        files = Manifest.decode(client.manifest(repo, at.commit), at.manifest).files
        record = client.commits(repo, at.commit, 1)[0]
        usage = client.usage(repo)
    if as_json:
        print_json(
            {
                "repo": repo.id,
                "kind": repo.kind,
                "refs": refs,
                "revision": revision,
                "commit": at.commit,
                "manifest": at.manifest,
                "author": record.author,
                "time": record.time,
                "message": record.message,
                "parent": record.parent,
                "lineage": record.lineage,
                "files": [
                    {"path": p, "size": f.size, "sha256": f.sha256, "git_oid": f.git_oid, "executable": f.executable}
                    for p, f in sorted(files.items())
                ],
                "usage": {"logical": usage.logical, "unique": usage.unique, "stored": usage.stored},
            }
        )
        return
    for notice in notices:
        instead = f"; use {notice.replacement}" if notice.replacement else ""
        click.echo(f"{notice.state}{f' (commit {notice.commit})' if notice.commit else ''}: {notice.message}{instead}")
    click.echo(f"{repo.id} @ {revision} = {at.commit}")
    click.echo(
        f"published {time_text(record.time)} by {record.author or 'unknown'}: {record.message or '(no message)'}"
    )
    click.echo(
        f"all revisions {size_text(usage.logical)}, distinct files {size_text(usage.unique)}, "
        f"stored {size_text(usage.stored)}\n"
    )
    print_table(["REF", "COMMIT"], [[name, commit] for name, commit in refs.items()])
    click.echo()
    rows = [[p, size_text(f.size), f.sha256] for p, f in sorted(files.items())]
    print_table(["FILE", "SIZE", "SHA256"], rows, right=frozenset({1}))


@click.command()
@click.argument("spec", metavar="ORG/NAME[@REF]")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--expect", metavar="COMMIT", help="Remove the ref only if it is there.")
@kind_option
@registry_option
@as_json
def rm(spec: str, yes: bool, expect: str | None, kind: str, urls: tuple[str, ...], as_json: bool) -> None:
    """Remove a ref, or without @REF a whole model, from the registry.

    Content that no model holds any more stays in the store until it is collected.
    """
    repo, ref = parse_spec(spec, kind)
    whole = "@" not in spec
    if whole and expect is not None:
        raise UsageError(f"--expect is about a ref: say which one, {repo.id}@REF")
    what = f"{repo.id} with all its refs" if whole else f"{repo.id}@{ref}"
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"removing {what} needs --yes when nobody can be asked")
        click.confirm(f"Remove {what}?", abort=True, err=True)
    with attached(urls) as registry:
        registry.client().delete(repo, None if whole else ref, expect)
    if as_json:
        print_json({"repo": repo.id, "ref": None if whole else ref, "removed": True})
    else:
        click.echo(f"Removed {what}.", err=True)
