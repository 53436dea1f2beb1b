"""A process that fills a blob is killed; the next one fetches only what is missing."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from heliosfs.tiers import bitmap
from heliosfs.tiers.directory import TierDirectory
from tests.support.origin import Made, Origin
from tests.support.stores import filled, running, until

MIB = 1 << 20
SIZE = 96 * MIB

FILLER = """
import sys
from pathlib import Path
import trio
from helios.names import RepoId
from heliosfs.blobs import BlobRef
from heliosfs.fetch import settle
from tests.support.stores import filled, running
settle.FLUSH_AGE_S = 0.1
settle.FLUSH_BYTES = 8 << 20
cache, url, sha256, size, recipe = sys.argv[1:]
want = BlobRef(RepoId.parse("test/model"), "c" * 40, "model.safetensors", sha256, int(size), recipe)
async def main():
    async with running(Path(cache), [url]) as store:
        await store.open(want)
        print("open", flush=True)
        await filled(store, want, 600)
trio.run(main)
"""


@pytest.mark.trio
async def test_sigkill_while_filling(tmp_path: Path) -> None:
    rng = random.Random(3)
    with Origin(rate=40e6) as origin:
        want = origin.add(Made(SIZE))
        journal = tmp_path / "partial" / f"{want.sha256}.map"
        refetched = 0
        local = 0
        for _ in range(3):
            before = await trio.to_thread.run_sync(origin.settled)
            args = [str(tmp_path), origin.url, want.sha256, str(want.size), want.recipe_digest]
            process = subprocess.Popen([sys.executable, "-c", FILLER, *args], stdout=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            size = journal.stat().st_size if journal.exists() else len(bitmap.start(origin.recipe(want)))
            await until(lambda size=size: journal.exists() and journal.stat().st_size > size)  # type: ignore[misc]
            await trio.sleep(rng.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            with TierDirectory("l1", tmp_path) as l1:
                kept = l1.held(want.sha256)[0]
            assert kept >= local, "what was recorded stays"
            refetched += await trio.to_thread.run_sync(origin.settled) - before - (kept - local)
            local = kept
        assert 0 < local < SIZE
        origin.throttle.rate = None
        before = await trio.to_thread.run_sync(origin.settled)
        async with running(tmp_path, [origin.url]) as store:
            assert store.status(want.sha256).local_bytes == local
            handle = await store.open(want)
            started = time.monotonic()
            await filled(store, want)
            assert time.monotonic() - started < 30
            assert origin.sent() - before == SIZE - local, "only what was missing"
            for offset in range(0, SIZE, 3 * MIB):
                assert await handle.read(offset, MIB) == origin.data(want, offset, MIB)
            await handle.close()
        assert refetched < 3 * 40 * MIB
