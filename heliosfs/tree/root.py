"""The top of the tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from heliosfs.tree.hub import Hub
from heliosfs.tree.nodes import Directory
from heliosfs.tree.repositories import Kind
from heliosfs.tree.source import FOREVER, Known
from heliosfs.tree.volumes import VolumeList, VolumesDirectory
from heliosfs.volumes.record import VolumeRecord


class NoVolumes:
    """A ``VolumeList`` of none."""

    def known(self) -> Known[Mapping[str, VolumeRecord]]:
        return Known({}, FOREVER)


NO_VOLUMES: Final = NoVolumes()


def root(volumes: VolumeList = NO_VOLUMES) -> Directory:
    """``/``: models by organisation, and the hidden directories."""
    hidden = [(".datasets", Kind("datasets")), (".hub", Hub()), (".volumes", VolumesDirectory(volumes))]
    return Kind("models", hidden)
