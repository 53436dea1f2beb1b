"""csi-sanity's cases of the Identity service."""

from __future__ import annotations

import re

from tests.contract.csi.world import World, case

SERVICE = "Identity Service"


@case(f"{SERVICE} GetPluginCapabilities should return appropriate capabilities")
def capabilities(world: World) -> None:
    found = world.client.GetPluginCapabilities().capabilities
    assert found
    for each in found:
        assert each.WhichOneof("type") == "service"
        assert each.service.type == each.service.CONTROLLER_SERVICE


@case(f"{SERVICE} Probe should return appropriate information")
def probe(world: World) -> None:
    answer = world.client.Probe()
    assert answer.HasField("ready")
    assert answer.ready.value


@case(f"{SERVICE} GetPluginInfo should return appropriate information")
def info(world: World) -> None:
    answer = world.client.GetPluginInfo()
    assert len(answer.name) <= 63
    assert re.fullmatch(r"[a-zA-Z][A-Za-z0-9._-]{0,61}[a-zA-Z]", answer.name)
    assert answer.vendor_version
