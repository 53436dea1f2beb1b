"""``helios router``: the router as a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import click

from helios.cli.common import as_json
from helios.cli.router_keys import keys
from helios.cli.router_top import top


@click.group(invoke_without_command=True)
@click.option("--host", metavar="HOST", help="Address to listen on (default: 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), metavar="PORT", help="Port; 0 takes a free one (default: 8480).")
@click.option("--processes", type=click.IntRange(0), metavar="N", help="Processes; 0: one for each core (default: 1).")
@click.option(
    "--worker",
    "workers",
    multiple=True,
    metavar="MODEL=URL[,KEY=VALUE…]",
    help="A vLLM server and the model it serves; once for each. KEY: role (both, prefill or decode), revision, weight, "
    "adapter (a LoRA adapter's name), bootstrap.",
)
@click.option(
    "--policy",
    metavar="POLICY",
    help="How a worker is chosen (default: prefix-cache): a name, or a table in JSON; docs/router.md lists them.",
)
@click.option(
    "--picker",
    metavar="HOST:PORT",
    help="Tell gateways (Envoy, Istio) there where requests go, over gRPC; docs/router-picker.md.",
)
@click.option(
    "--config",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Configuration file (default: $HELIOS_CONFIG or $HELIOS_HOME/helios.toml); --worker replaces its workers.",
)
@as_json
@click.pass_context
def router(
    context: click.Context,
    host: str | None,
    port: int | None,
    processes: int | None,
    workers: tuple[str, ...],
    policy: str | None,
    picker: str | None,
    file: Path | None,
    as_json: bool,
) -> int | None:
    """Run the router in front of vLLM workers until Ctrl-C or SIGTERM; prints its URL when it is ready."""
    if context.invoked_subcommand is not None:
        return None
    import msgspec

    from helios import logs
    from helios.config import Config, load_from_process
    from router.daemon import run
    from router.scheduling.configured import parse_policy
    from router.workers import parse_worker

    given = [msgspec.to_builtins(parse_worker(text)) for text in workers] or None
    chosen = None if policy is None else parse_policy(policy)
    asked = None if picker is None else {"listen": picker}
    ours = {
        "host": host, "port": port, "processes": processes, "workers": given, "policy": chosen, "picker": asked,
    }  # fmt: skip

    def load() -> Config:
        return load_from_process({"router": ours}, file)

    config = load()
    logs.setup(config.log)

    def announce(url: str, models: list[str], picker: str) -> None:
        told = {"url": url, "models": models, **({"picker": picker} if picker else {})}
        click.echo(json.dumps(told) if as_json else url)

    return run(config, announce, load)


router.add_command(top)
router.add_command(keys)
