"""How a process reaches its cluster."""

import asyncio

import pytest

from helios.cluster import cluster_client
from helios.errors import UsageError


def test_a_kubeconfig_that_is_none_says_so(tmp_path):
    async def connect():
        async with cluster_client(kubeconfig=str(tmp_path / "none")):
            pass

    with pytest.raises(UsageError, match="can't be read"):
        asyncio.run(connect())
