"""``helios csi``: the CSI driver."""

from __future__ import annotations

import os
from pathlib import Path

import click

from helios.errors import HeliosError, UsageError


@click.command()
@click.option("--endpoint", required=True, metavar="unix:///PATH", help="Socket the driver serves on.")
@click.option("--node-id", metavar="N", help="This node's name in Kubernetes; needed but for --mode controller.")
@click.option(
    "--mode",
    type=click.Choice(["all", "node", "controller"]),
    default="all",
    show_default=True,
    help="Publish volumes on this node, make volumes for the cluster, or both.",
)
@click.option("--mount", type=Path, metavar="MOUNTPOINT", help="The mount that volumes are taken from.")
@click.option("--kubelet-dir", type=Path, metavar="DIR", help="The kubelet's directory (default: /var/lib/kubelet).")
def csi(endpoint: str, node_id: str | None, mode: str, mount: Path | None, kubelet_dir: Path | None) -> int:
    """Run the CSI driver until Ctrl-C or SIGTERM; prints the socket's path when it answers.

    Volumes of pods on this node come from the mount of this HELIOS_HOME; publishing them needs root, because it mounts.
    """
    if mode == "controller":
        node_id = None
    elif not node_id:
        raise UsageError("--node-id is missing: this node's name in Kubernetes, at most 256 characters")
    elif len(node_id) > 256:
        raise UsageError("--node-id has more than 256 characters")
    from helios import logs
    from helios.config import load_from_process
    from helios.home import Home

    try:
        from csi.server import run, socket_of
    except ImportError as error:
        if error.name == "csi.csi_pb2" or "csi_pb2" in str(error):
            raise HeliosError(
                "the driver's messages are not compiled in this checkout", hint="`make setup` does it."
            ) from None
        raise HeliosError(
            f"the CSI driver needs the package {error.name}", hint="pip install 'helios-llm[csi]'"
        ) from None
    places = {"mount": _absolute(mount), "kubelet": _absolute(kubelet_dir)}
    config = load_from_process({"csi": places})
    logs.setup(config.log)
    path = socket_of(endpoint)
    home, controller = Home.from_env(os.environ), mode != "node"
    return run(config, home, endpoint, lambda: click.echo(str(path)), node_id=node_id, controller=controller)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else os.path.abspath(path)
