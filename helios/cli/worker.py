"""``helios worker`` and ``helios worker drain``."""

from __future__ import annotations

import json
import os

import click

from helios.cli.common import as_json


class _Worker(click.Group):
    """``helios worker MODEL`` is ``helios worker run MODEL``: a model is what comes first unless a command does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Worker)
def worker() -> None:
    """Serve one mounted model with vLLM, as a pod's own process does.

    helios worker MODEL [OPTIONS] [-- VLLM_ARGUMENTS...] serves MODEL, as `helios worker run` does; `helios worker run
    --help` explains it.
    """


@worker.command()
@click.argument("model", metavar="MODEL")
@click.option("--role", type=click.Choice(["both", "prefill", "decode"]), help="What it computes (default: both).")
@click.option("--name", metavar="NAME", help="What the model is called in requests (default: as the directory says).")
@click.option("--revision", metavar="COMMIT", help="The commit that it is (default: as the directory says).")
@click.option("--host", metavar="HOST", help="Where vLLM and the front listen (default: 127.0.0.1).")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port of the front, for probes, metrics and draining; 0 takes a free one (default: 8490).",
)
@click.option(
    "--vllm-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port of vLLM, for requests; 0 takes a free one (default: 8000).",
)
@click.option(
    "--advertise", metavar="ADDRESS", help="The address at which others reach it, a pod's IP (default: HOST)."
)
@click.option(
    "--router",
    "routers",
    multiple=True,
    metavar="URL",
    help="A router's administration at which it registers; once for each.",
)
@click.option("--router-token-file", metavar="FILE", help="File with the registrar's token for the routers.")
@click.option(
    "--start-timeout", type=click.FloatRange(1), metavar="SECONDS", help="Longest start of vLLM (default: 900)."
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long requests under way may go on when it ends (default: 120).",
)
@as_json
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGUMENTS...]")
def run(
    model: str,
    role: str | None,
    name: str | None,
    revision: str | None,
    host: str | None,
    port: int | None,
    vllm_port: int | None,
    advertise: str | None,
    routers: tuple[str, ...],
    router_token_file: str | None,
    start_timeout: float | None,
    drain_timeout: float | None,
    as_json: bool,
    vllm_arguments: tuple[str, ...],
) -> int:
    """Serve MODEL until SIGTERM, and drain then.

    MODEL is a directory that is mounted already, with the model's files or a Hugging Face cache of it, or
    ORG/NAME[@REVISION] in the cache that HF_HUB_CACHE names or in this home's mount.

    It is ready once vLLM has answered a request; its URL is printed then. Arguments after -- go to vLLM.
    """
    from helios.launch.init import as_init

    as_init()  # before there are threads
    import msgspec

    from helios import logs
    from helios.config import load_from_process
    from helios.home import Home
    from helios.launch.worker.run import Ready
    from helios.launch.worker.run import run as serve

    given = {
        "role": role,
        "name": name,
        "revision": revision,
        "host": host,
        "port": port,
        "vllm_port": vllm_port,
        "advertise": advertise,
        "routers": list(routers) or None,
        "router_token_file": router_token_file,
        "start_timeout_s": start_timeout,
        "drain_s": drain_timeout,
    }
    config = load_from_process({"worker": given})
    logs.setup(config.log)

    def announce(ready: Ready) -> None:
        click.echo(json.dumps(msgspec.to_builtins(ready)) if as_json else ready.url)

    return serve(Home.from_env(os.environ), config, model, vllm_arguments, announce)


@worker.command()
@click.option(
    "--port", type=click.IntRange(1, 65535), metavar="PORT", help="Port of the worker's front (default: 8490)."
)
@as_json
def drain(port: int | None, as_json: bool) -> int:
    """Have the worker of this HELIOS_HOME drain, and wait until it has: a container's preStop hook.

    It takes no requests from then on, until it is started again. Exits 1 where requests were under way at the deadline.
    """
    from helios.config import load_from_process
    from helios.errors import NotFound
    from helios.home import Home
    from helios.launch.worker.asking import drained

    config = load_from_process({"worker": {"port": port}})
    path = Home.from_env(os.environ).socket(f"worker-{config.worker.port}")
    if not path.exists():
        raise NotFound(
            f"no worker of this HELIOS_HOME has its front at port {config.worker.port}",
            hint="Say its port with --port, and HELIOS_HOME as it has it.",
        )
    answer = drained(path)
    click.echo(json.dumps(answer) if as_json else answer["why"])
    return 1 if answer["cut"] or not answer["drained"] else 0
