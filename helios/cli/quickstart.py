"""``helios quickstart``."""

from __future__ import annotations

import os

import click

from helios.cli.common import as_json, parse_spec


@click.command()
@click.option(
    "--model",
    envvar="MODEL",
    metavar="DIR|ORG/NAME",
    help="A directory or a model of the Hub (default: a tiny Llama made on the spot).",
)
@click.option("--name", metavar="ORG/NAME", help="Name to publish a directory under (default: local/<directory>).")
@click.option("--host", metavar="HOST", help="Address of the router (default: 127.0.0.1).")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port of the router; 0 takes a free one (default: 8480).",
)
@click.option("--once", is_flag=True, envvar="HELIOS_ONCE", help="Stop after the first answer.")
@click.option("--question", metavar="TEXT", help="What to ask.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=48,
    show_default=True,
    metavar="N",
    help="Longest answer, in tokens.",
)
@click.option(
    "--start-timeout", type=click.FloatRange(1), metavar="SECONDS", help="Longest start of vLLM (default: 900)."
)
@as_json
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGUMENTS...]")
def quickstart(
    model: str | None,
    name: str | None,
    host: str | None,
    port: int | None,
    once: bool,
    question: str | None,
    max_tokens: int,
    start_timeout: float | None,
    as_json: bool,
    vllm_arguments: tuple[str, ...],
) -> int:
    """Publish, mount, serve and ask a model, start to end.

    Makes or takes a model, publishes it into the registry, mounts the filesystem, starts real vLLM on the mounted path
    and the router in front of it, streams one answer through it, and shows where the time went. Then everything stays
    up until Ctrl-C. A second run reuses what the first one stored.
    """
    from helios.config import load_from_process
    from helios.home import Home
    from helios.launch.ask import QUESTION
    from helios.launch.quickstart import Wishes
    from helios.launch.quickstart import quickstart as run
    from helios.launch.serving import START_TIMEOUT_S
    from helios.launch.signals import stopped_by_signals

    config = load_from_process({"router": {"host": host, "port": port}})
    wishes = Wishes(
        model=model or None,
        name=parse_spec(name, "models")[0] if name else None,
        once=once,
        question=question or QUESTION,
        max_tokens=max_tokens,
        start_timeout_s=start_timeout or START_TIMEOUT_S,
        vllm_arguments=vllm_arguments,
        as_json=as_json,
    )
    with stopped_by_signals():
        return run(Home.from_env(os.environ), config, wishes)
