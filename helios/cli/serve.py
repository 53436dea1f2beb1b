"""``helios serve``."""

from __future__ import annotations

import os

import click

from helios.cli.common import parse_size, parse_spec


@click.command()
@click.argument("spec", required=False, metavar="[ORG/NAME[@REVISION]]")
@click.option("--host", metavar="HOST", help="Address of the router (default: 127.0.0.1).")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port of the router; 0 takes a free one (default: 8480).",
)
@click.option(
    "--prefill",
    type=click.IntRange(0, 64),
    default=0,
    metavar="N",
    help="Workers that only compute prompts (default: none).",
)
@click.option(
    "--decode",
    type=click.IntRange(0, 64),
    default=0,
    metavar="M",
    help="Workers that answer with them (default: none).",
)
@click.option("--gpu", "gpus", metavar="LIST", help="GPUs to use, such as 0,1, in equal parts (default: as needed).")
@click.option("--logs", is_flag=True, help="Show the workers' logs on standard error.")
@click.option(
    "--start-timeout", type=click.FloatRange(1), metavar="SECONDS", help="Longest start of vLLM (default: 900)."
)
@click.option("--on-demand", is_flag=True, help="Start the registry's models when clients ask for them.")
@click.option("--memory", metavar="SIZE", help="Main memory of all models together, such as 24GB (--on-demand).")
@click.option("--gpu-memory", metavar="SIZE", help="Memory of each GPU for all models together (--on-demand).")
@click.option(
    "--idle",
    "idle_s",
    type=click.FloatRange(0),
    default=0,
    metavar="SECONDS",
    help="Put a model to sleep, or stop it, that nobody has used for so long; 0: never (--on-demand).",
)
@click.option(
    "--warm",
    "warm_s",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Keep a model that was started or woken for so long at least (default: as --idle; --on-demand).",
)
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(1),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait of requests for memory that models in use hold (--on-demand).",
)
@click.option(
    "--fetch",
    multiple=True,
    metavar="PATTERN",
    help="Models, such as org/*, that the registry may fetch from its upstream because a client asks (--on-demand).",
)
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGUMENTS...]")
def serve(
    spec: str | None,
    host: str | None,
    port: int | None,
    prefill: int,
    decode: int,
    gpus: str | None,
    logs: bool,
    start_timeout: float | None,
    on_demand: bool,
    memory: str | None,
    gpu_memory: str | None,
    idle_s: float,
    warm_s: float | None,
    wait_s: float,
    fetch: tuple[str, ...],
    vllm_arguments: tuple[str, ...],
) -> None:
    """Serve a model of the registry with vLLM behind the router, until Ctrl-C.

    Mounts the filesystem at $HELIOS_HOME/mnt unless that is done, starts vLLM on the commit that REVISION (default:
    main) names now, and prints the router's URL once the model answers. A worker that ends is started again.
    Arguments after -- go to vLLM.

    With --prefill and --decode there are several workers: some compute prompts, the others answer with what those have
    computed.

    With --on-demand no model is named: the URL is printed at once, a request for a model of the registry starts its
    vLLM and waits for it. What all of them take together is bounded, the least recently used one goes first.
    """
    from helios.config import load_from_process
    from helios.errors import UsageError
    from helios.home import Home
    from helios.launch.plan import Wish
    from helios.launch.serve import Group, Wishes, serve_on_demand
    from helios.launch.serve import serve as run
    from helios.launch.serving import START_TIMEOUT_S
    from helios.launch.signals import stopped_by_signals

    start_timeout_s = start_timeout or START_TIMEOUT_S
    config = load_from_process({"router": {"host": host, "port": port}})
    home = Home.from_env(os.environ)
    if on_demand:
        if spec is not None and not spec.startswith("-"):
            raise UsageError("--on-demand serves what clients ask for", hint=f"Leave {spec} out.")
        if prefill or decode or gpus or logs:
            raise UsageError(
                "--prefill, --decode, --gpu and --logs are for a model that is named",
                hint="Write helios serve ORG/NAME, or leave them out.",
            )
        if warm_s is not None and not idle_s:
            raise UsageError(
                "--warm is for models that go when nobody uses them", hint="Add --idle SECONDS, or leave it out."
            )
        arguments = vllm_arguments if spec is None else (spec, *vllm_arguments)  # it came after --
        sizes = parse_size("--memory", memory), parse_size("--gpu-memory", gpu_memory)
        with stopped_by_signals():
            wishes = Wishes(
                *sizes, idle_s, idle_s if warm_s is None else warm_s, wait_s, fetch, arguments, start_timeout_s
            )
            serve_on_demand(home, config, wishes)
    if memory or gpu_memory or idle_s or warm_s is not None or fetch:
        raise UsageError(
            "--memory, --gpu-memory, --idle, --warm and --fetch are for models that clients name",
            hint="Write helios serve --on-demand, or leave them out.",
        )
    if spec is None:
        raise UsageError("no model is named", hint="Write helios serve ORG/NAME, or helios serve --on-demand.")
    repo, revision = parse_spec(spec, "models")
    group = Group(Wish(prefill, decode, _numbers(gpus)), vllm_arguments, start_timeout_s, logs)
    with stopped_by_signals():
        run(home, config, repo, revision, group)


def _numbers(gpus: str | None) -> tuple[int, ...]:
    from helios.errors import UsageError

    parts = [] if gpus is None else gpus.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise UsageError(f"{gpus!r} is no list of GPUs", hint="Write --gpu 0,1 with the numbers that nvidia-smi shows.")
    return tuple(map(int, parts))
