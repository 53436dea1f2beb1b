"""Commands that ask a mount for something: which mount is meant, and its control API (docs/control-api.md)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from helios.cli.common import parse_spec
from helios.errors import NotFound, Unavailable, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from helios.mounts import MountState

CALL_S = 60.0

PATIENCE_S = 30.0
"""How long a mount may be silent while what serves it is replaced, in seconds."""


def _directories(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


# not click.Path, which looks at what it is given: a mount that nobody serves would not answer

mountpoint_argument = click.argument("mountpoint", type=Path, shell_complete=_directories)

mount_option = click.option(
    "--mount",
    "mountpoint",
    type=Path,
    shell_complete=_directories,
    metavar="MOUNTPOINT",
    help="The mount whose cache is meant; needed where there are several.",
)


class Mounted:
    """The mount that is meant. A call during which its process is replaced is made again."""

    def __init__(self, mountpoint: Path | None) -> None:
        """Raises NotFound, UsageError."""
        self.state = _find(mountpoint)

    def call(self, method: str, path: str, body: Any = None, timeout_s: float = CALL_S) -> Any:
        """What the control API answers below ``/api/v1``. Raises the error that it answers with; Unavailable."""
        from helios.http.client import HttpClient

        end = time.monotonic() + PATIENCE_S
        while True:
            client = HttpClient(f"unix:{self.state.socket}", timeout_s=timeout_s)
            try:
                return client.json(method, f"/api/v1/{path}", body=body)
            except Unavailable as error:
                if error.status != Unavailable.status or "can't be reached" not in error.message:
                    raise
                if time.monotonic() > end or self.state.worker is None:  # no keeper that would start another
                    raise
            finally:
                client.close()
            time.sleep(0.2)


def call_for(mountpoint: Path | None, what: str, model: str, kind: str, **fields: Any) -> dict[str, Any]:
    """What the mount answers to ``POST /api/v1/<what>`` about a model."""
    repo, revision = parse_spec(model, kind)
    body = {"repo": str(repo), "revision": revision} | fields
    answer: dict[str, Any] = Mounted(mountpoint).call("POST", what, body)
    return answer


def _find(mountpoint: Path | None) -> MountState:
    from helios import mounts
    from helios.home import Home

    home = Home.from_env(os.environ)
    running = [state for state, alive in mounts.states(home) if alive]
    if mountpoint is not None:
        place = str(mounts.canonical(mountpoint))
        running = [state for state in running if state.mountpoint == place]
        if not running:
            raise NotFound(f"{place} is no mount of {home.root}", hint="`helios status` shows those that there are.")
    if not running:
        raise NotFound(f"{home.root} has no mount", hint="`helios mount MOUNTPOINT` makes one.")
    if len(running) > 1:
        raise UsageError(f"say which mount with --mount: {', '.join(state.mountpoint for state in running)}")
    return running[0]
