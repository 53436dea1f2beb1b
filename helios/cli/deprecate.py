"""``helios deprecate``: warn of a model or a revision, or have nobody use it any more."""

from __future__ import annotations

import click

from helios.cli.common import attached, kind_option, parse_spec, registry_option
from helios.errors import UsageError
from helios.names import is_commit


@click.command()
@click.argument("spec", metavar="ORG/NAME[@COMMIT]")
@click.option("-m", "--message", help="Why; needed but with --undo.")
@click.option("--use", metavar="ORG/NAME[@REVISION]", help="What to use instead.")
@click.option("--retire", is_flag=True, help="Nobody can resolve it any more; mounts that have it go on.")
@click.option("--undo", is_flag=True, help="Take the notice down.")
@kind_option
@registry_option
def deprecate(
    spec: str, message: str | None, use: str | None, retire: bool, undo: bool, kind: str, urls: tuple[str, ...]
) -> None:
    """Warn of a model, or of one of its commits: clients of the Hub API show the warning, and it works as before.

    Retired, it is refused with the message.
    """
    import getpass

    repo, commit = parse_spec(spec, kind)
    if "@" in spec and not is_commit(commit):
        raise UsageError(f"{commit!r} is not a commit: a notice is of a repository or of one commit, names move")
    whole = None if "@" not in spec else commit
    with attached(urls) as registry:
        client = registry.client()
        if undo:
            client.remove_notice(repo, whole)
        elif message is None:
            raise UsageError("say why: --message")
        else:
            state = "retired" if retire else "deprecated"
            client.put_notice(repo, whole, state, message, replacement=use, author=getpass.getuser())
