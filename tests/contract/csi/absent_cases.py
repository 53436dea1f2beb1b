"""Specs that csi-sanity skips where a driver does not report a capability. Here it is looked that this driver does not,
and that the call is really not there."""

from __future__ import annotations

from pathlib import Path

import grpc

from tests.contract.csi.world import CASES, World

SPECS = [
    line for line in Path(__file__).with_name("specs.txt").read_text().splitlines() if line and not line.startswith("#")
]

ABSENT = {
    # how a spec's name begins: (the capability that it needs, the call)
    "ListSnapshots": ("Controller.LIST_SNAPSHOTS", "Controller/ListSnapshots"),
    "GetSnapshot": ("Controller.GET_SNAPSHOT", "Controller/GetSnapshot"),
    "CreateSnapshot": ("Controller.CREATE_DELETE_SNAPSHOT", "Controller/CreateSnapshot"),
    "DeleteSnapshot": ("Controller.CREATE_DELETE_SNAPSHOT", "Controller/DeleteSnapshot"),
    "ExpandVolume": ("Controller.EXPAND_VOLUME", "Controller/ControllerExpandVolume"),
    "ModifyVolume": ("Controller.MODIFY_VOLUME", "Controller/ControllerModifyVolume"),
    "GroupController": ("Plugin.GROUP_CONTROLLER_SERVICE", "GroupController/CreateVolumeGroupSnapshot"),
    "Controller Service [Controller Server] ControllerPublishVolume": (
        "Controller.PUBLISH_UNPUBLISH_VOLUME",
        "Controller/ControllerPublishVolume",
    ),
    "Controller Service [Controller Server] ControllerUnpublishVolume": (
        "Controller.PUBLISH_UNPUBLISH_VOLUME",
        "Controller/ControllerUnpublishVolume",
    ),
    "Controller Service [Controller Server] volume lifecycle": (
        "Controller.PUBLISH_UNPUBLISH_VOLUME",
        "Controller/ControllerPublishVolume",
    ),
    "Node Service NodeStageVolume": ("Node.STAGE_UNSTAGE_VOLUME", "Node/NodeStageVolume"),
    "Node Service NodeUnstageVolume": ("Node.STAGE_UNSTAGE_VOLUME", "Node/NodeUnstageVolume"),
    "Node Service NodeExpandVolume": ("Node.EXPAND_VOLUME", "Node/NodeExpandVolume"),
}


def _register(name: str, needs: str, method: str) -> None:
    def run(world: World) -> None:
        assert needs not in world.capabilities()
        assert world.call_unknown(method) == grpc.StatusCode.UNIMPLEMENTED

    CASES[name] = run


for _name in SPECS:
    for _begin, (_needs, _method) in ABSENT.items():
        if _name.startswith(_begin):
            _register(_name, _needs, _method)
