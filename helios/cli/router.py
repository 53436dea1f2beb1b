"""``helios router``: the router as a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import click

from helios.cli.common import as_json


@click.command()
@click.option("--host", metavar="HOST", help="Address to listen on (default: 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), metavar="PORT", help="Port; 0 takes a free one (default: 8480).")
@click.option(
    "--worker",
    "workers",
    multiple=True,
    metavar="MODEL=URL[,role=ROLE]",
    help="A vLLM server and the model it serves; once for each. ROLE: both (default), prefill or decode.",
)
@click.option(
    "--config",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Configuration file (default: $HELIOS_CONFIG or $HELIOS_HOME/helios.toml); --worker replaces its workers.",
)
@as_json
def router(host: str | None, port: int | None, workers: tuple[str, ...], file: Path | None, as_json: bool) -> int:
    """Run the router in front of vLLM workers until Ctrl-C or SIGTERM; prints its URL when it is ready."""
    import msgspec

    from helios import logs
    from helios.config import load_from_process
    from router.daemon import run
    from router.workers import parse_worker

    given = [msgspec.to_builtins(parse_worker(text)) for text in workers] or None
    config = load_from_process({"router": {"host": host, "port": port, "workers": given}}, file)
    logs.setup(config.log)

    def announce(url: str, models: list[str]) -> None:
        click.echo(json.dumps({"url": url, "models": models}) if as_json else url)

    return run(config.router, announce)
