"""``helios operator`` as a process: what it says, its pages, and what it leaves when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import aiohttp

from tests.fakes.kubernetes import ApiServer, kubeconfig


async def started(home, file, *arguments):
    """The process, and its first line."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "helios", "operator", "--kubeconfig", str(file), "--listen", "127.0.0.1:0", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"HELIOS_HOME": str(home.root), "HELIOS_REGISTRY__URLS": "http://127.0.0.1:9"},
    )  # fmt: skip
    async with asyncio.timeout(60):
        line = (await child.stdout.readline()).decode().strip()
    return child, line


def test_it_leads_says_so_and_gives_its_lease_back(helios_home, tmp_path):
    async def run():
        server, file = ApiServer(), tmp_path / "kubeconfig"
        await server.open()
        file.write_text(kubeconfig(server))
        child, url = await started(helios_home, file)
        try:
            async with aiohttp.ClientSession() as session, asyncio.timeout(60):

                async def page(path):
                    async with session.get(url + path) as answer:
                        return answer.status, await answer.text()

                assert await page("/healthz") == (200, "ok\n")
                while "helios_operator_leading 1.0" not in (await page("/metrics"))[1]:
                    await asyncio.sleep(0.05)
                (lease,) = server.all("leases")
                assert lease["spec"]["holderIdentity"]
                while await page("/readyz") != (200, "ok\n"):
                    await asyncio.sleep(0.05)
            child.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                assert await child.wait() == 0
            (lease,) = server.all("leases")
            assert lease["spec"]["holderIdentity"] == ""
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
            await server.close()
        assert server.complaints == []

    asyncio.run(run())


def test_settings_that_cannot_work_are_wrong_usage(helios_home, tmp_path, monkeypatch):
    monkeypatch.setenv("HELIOS_OPERATOR__RENEW_S", "20")

    async def run():
        child, line = await started(helios_home, tmp_path / "nothing")
        _, said = await child.communicate()
        return await child.wait(), line, said.decode()

    code, line, said = asyncio.run(run())
    assert (code, line) == (2, "")
    assert "2 x retry < renew < lease" in said
