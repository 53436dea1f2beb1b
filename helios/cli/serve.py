"""``helios serve``."""

from __future__ import annotations

import os

import click

from helios.cli.common import parse_spec


@click.command()
@click.argument("spec", metavar="ORG/NAME[@REVISION]")
@click.option("--host", metavar="HOST", help="Address of the router (default: 127.0.0.1).")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port of the router; 0 takes a free one (default: 8480).",
)
@click.option(
    "--start-timeout", type=click.FloatRange(1), metavar="SECONDS", help="Longest start of vLLM (default: 900)."
)
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGUMENTS...]")
def serve(
    spec: str, host: str | None, port: int | None, start_timeout: float | None, vllm_arguments: tuple[str, ...]
) -> None:
    """Serve a model of the registry with vLLM behind the router, until Ctrl-C.

    Mounts the filesystem at $HELIOS_HOME/mnt unless that is done, starts vLLM on the commit that REVISION (default:
    main) names now, and prints the router's URL once the model answers. Arguments after -- go to vLLM.
    """
    from helios.config import load_from_process
    from helios.home import Home
    from helios.launch.serve import serve as run
    from helios.launch.serving import START_TIMEOUT_S
    from helios.launch.signals import stopped_by_signals

    repo, revision = parse_spec(spec, "models")
    config = load_from_process({"router": {"host": host, "port": port}})
    with stopped_by_signals():
        run(Home.from_env(os.environ), config, repo, revision, vllm_arguments, start_timeout or START_TIMEOUT_S)
