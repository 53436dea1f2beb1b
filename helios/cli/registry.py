"""``helios registry``: the registry as a process of its own."""

from __future__ import annotations

import json
import os

import click

from helios.cli.common import as_json


@click.command()
@click.option("--host", metavar="HOST", help="Address to listen on (default: 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), metavar="PORT", help="Port; 0 takes a free one (default: 8470).")
@click.option("--store", metavar="STORE", help="Directory or address of the objects (default: $HELIOS_HOME/store).")
@as_json
def registry(host: str | None, port: int | None, store: str | None, as_json: bool) -> int:
    """Run the registry of this HELIOS_HOME until Ctrl-C or SIGTERM; prints its URL when it is ready.

    Commands and mounts with the same HELIOS_HOME use it; others find it through registry.urls.
    """
    import msgspec

    from helios import logs
    from helios.config import load_from_process
    from helios.home import Home
    from registry.daemon import run

    if store and "://" not in store:
        store = os.path.abspath(store)
    config = load_from_process({"registry": {"host": host, "port": port, "store": store}})
    logs.setup(config.log)

    def announce(record: object) -> None:
        document = msgspec.to_builtins(record)
        click.echo(json.dumps(document) if as_json else document["url"])

    return run(config, Home.from_env(os.environ), embedded=False, announce=announce)
