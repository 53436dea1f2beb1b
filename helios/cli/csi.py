"""``helios csi``: its contract stands, the driver comes with its own version."""

from __future__ import annotations

import click

from helios.errors import HeliosError


@click.command()
@click.option("--endpoint", required=True, metavar="unix:///PATH", help="Socket the driver serves on.")
@click.option("--node-id", required=True, metavar="N", help="This node's name in Kubernetes.")
def csi(endpoint: str, node_id: str) -> None:
    """Run the CSI driver. Not there yet: this version exits 1 and says so."""
    raise HeliosError(
        f"the CSI driver is not part of this version (asked for {endpoint} on node {node_id})",
        hint="`helios mount` mounts the models on this machine.",
    )
