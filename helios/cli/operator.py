"""``helios operator``: the Kubernetes operator."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--namespace", metavar="N", help="The one namespace whose objects are reconciled (default: all).")
@click.option("--kubeconfig", type=Path, metavar="FILE", help="Instead of the pod's service account.")
@click.option(
    "--listen", metavar="HOST:PORT", help="Where /metrics, /healthz and /readyz are served (default: nowhere)."
)
def operator(namespace: str | None, kubeconfig: Path | None, listen: str | None) -> int:
    """Run the Kubernetes operator until Ctrl-C or SIGTERM; prints its URL, or that it runs.

    Any number may run; one of them leads and works, and another one follows it within seconds.
    """
    from helios import logs
    from helios.config import load_from_process
    from orchestrator.assembly import whole
    from orchestrator.operator import run

    given = {"namespace": namespace, "kubeconfig": None if kubeconfig is None else str(kubeconfig), "listen": listen}
    config = load_from_process({"operator": given})
    logs.setup(config.log)
    return run(config.operator, lambda metrics: whole(config, metrics), lambda url: click.echo(url or "running"))
