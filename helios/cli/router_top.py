"""``helios router top``: a running router, as it is now."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from helios.cli.common import as_json

if TYPE_CHECKING:
    from helios.http.client import HttpClient

EVERY_S = 1.0
PIPE_COLUMNS = 140
PIPE_ROWS = 1000


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", metavar="URL", help="The router's administration, http://HOST:PORT (default: its unix socket).")
@click.option("--port", type=click.IntRange(1, 65535), metavar="PORT", help="Port of a router on this machine.")
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with an administrator's token, for --url.",
)
@click.option("--once", is_flag=True, help="Show it once.")
@as_json
def top(url: str | None, port: int | None, token_file: Path | None, once: bool, as_json: bool) -> None:
    """Show a running router's models and workers, again every second, until Ctrl-C.

    Without --url it is the router of this HELIOS_HOME, asked over its unix socket.
    """
    from helios.config import load_from_process
    from helios.errors import UsageError
    from helios.home import Home
    from helios.http.client import HttpClient
    from helios.tokens import TokenFile, no_token

    if url is not None and port is not None:
        raise UsageError("--url and --port name two routers; give one of them")
    settings, base = load_from_process().router, url
    if base is None:
        where = settings.admin_socket if port is None else ""
        base = f"unix:{where or Home.from_env(os.environ).socket(f'router-{port or settings.port}')}"
    token = no_token if token_file is None else TokenFile(token_file)
    client = HttpClient(base, timeout_s=10.0, token=token)
    try:
        if as_json:
            click.echo(json.dumps(_state(client)))
        else:
            _show(client, url or base.removeprefix("unix:"), once=once)
    finally:
        client.close()


def _state(client: HttpClient) -> dict[str, Any]:
    from helios.errors import Unavailable

    try:
        state: dict[str, Any] = client.json("GET", "/state")
    except Unavailable as error:
        hint = "Is the router running? Another one is named with --port, or with --url and --token-file."
        raise Unavailable(error.message, hint=error.hint or hint) from None
    return state


def _show(client: HttpClient, where: str, *, once: bool) -> None:
    """Until Ctrl-C: in place on a terminal, one after another elsewhere. A router that went away is said, and waited
    for."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from helios.cli.router_view import router_view
    from helios.errors import Unavailable

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else PIPE_COLUMNS)
    state = _state(client)
    if once:
        console.print(router_view(state, where, console.width, PIPE_ROWS))
        return
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        view = router_view(state, where, console.width, console.height if terminal else PIPE_ROWS)
        while True:
            if console.is_terminal:
                live.update(view, refresh=True)
            else:
                console.print(view)
                sys.stdout.flush()
            time.sleep(EVERY_S)
            try:
                height = console.height if terminal else PIPE_ROWS
                view = router_view(_state(client), where, console.width, height)
            except Unavailable as error:
                view = Text(f"{where} does not answer: {error.message}", "red")
