"""What the fake API server claims, asked of a real one: the scenarios of tests/support/api_scenarios.py."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from helios.cluster import cluster_client
from tests.support.api_scenarios import SCENARIOS, Api, Scenario
from tests.support.control_plane import ControlPlane


@pytest.mark.parametrize("run", SCENARIOS, ids=lambda run: run.__name__)
def test_scenario(run: Scenario, cluster: ControlPlane, tmp_path: Path) -> None:
    namespace = re.sub("_", "-", run.__name__)[:60]

    async def go() -> None:
        async with cluster_client(kubeconfig=str(cluster.kubeconfig(tmp_path / "kubeconfig"))) as (client, _):
            await Api(client).prepared(namespace)
            await run(Api(client), namespace)

    asyncio.run(go())
