"""The blob store against the real registry: publish, read back, fill, over TCP, the unix socket and a slow link."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import trio
from safetensors.numpy import save_file

from helios.config import Config
from helios.embedded import attach
from helios.embedded import running as running_embedded
from helios.errors import IntegrityError
from helios.home import Home
from helios.metrics import MountMetrics
from helios.names import RepoId
from helios.publish import publish
from helios.registry_client import RegistryClient
from heliosfs.blobs import BlobRef, open_store
from heliosfs.store.manifest import Manifest
from tests.support.registry import Running, running_registry
from tests.support.slow_link import SlowLink
from tests.support.stores import filled, read, roomy, running

MIB = 1 << 20
BASE, TUNED = RepoId.parse("team/base"), RepoId.parse("team/tuned")


def save(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {f"layers.{n}.w": rng.standard_normal((1536, 1024), np.float32) for n in range(6)}
    return out | {f"layers.{n}.norm": rng.standard_normal(1024, np.float32) for n in range(6)}


@pytest.fixture
def models(tmp_path: Path) -> dict[RepoId, Path]:
    """A base and a fine-tune of it: the tuned one's chunks lie partly in the base's object, partly in a pack."""
    base = weights(1)
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", base | {"layers.2.w": base["layers.2.w"] + 1, "layers.4.w": base["layers.4.w"] * 2})
    return {BASE: tmp_path / "base", TUNED: tmp_path / "tuned"}


@pytest.fixture
def registry(helios: Any) -> Iterator[Running]:
    with running_registry(helios) as found:
        yield found


def published(registry: Running, models: dict[RepoId, Path]) -> dict[tuple[RepoId, str], BlobRef]:
    """Publish the models; their files by repository and path, as the mount would ask for them."""
    with closing(registry.client(registry.socket)) as client:
        return published_with(client, models)


def published_with(client: RegistryClient, models: dict[RepoId, Path]) -> dict[tuple[RepoId, str], BlobRef]:
    out = {}
    for repo, directory in models.items():
        publish(client, directory, repo, "main", message="", author="test")
        at = client.resolve(repo, "main")
        manifest = Manifest.decode(client.manifest(repo, at.commit), at.manifest)
        for path, entry in manifest.files.items():
            out[repo, path] = BlobRef(repo, at.commit, path, entry.sha256, entry.size, entry.recipe)
    return out


@pytest.mark.trio
@pytest.mark.parametrize("over", ["url", "socket"])
async def test_what_was_published_is_read_back(
    tmp_path: Path, registry: Running, models: dict[RepoId, Path], over: str
) -> None:
    wants = await trio.to_thread.run_sync(published, registry, models)
    async with running(tmp_path / "cache", [getattr(registry, over)]) as store:
        for (repo, path), want in wants.items():
            data = (models[repo] / path).read_bytes()
            handle = await store.open(want)
            rng = random.Random(1)
            for _ in range(10):
                offset = rng.randrange(want.size)
                assert await handle.read(offset, 300_000) == data[offset : offset + 300_000]
            await filled(store, want)
            assert await handle.read(0, want.size) == data
            await handle.close()
        assert store.usage().tiers["l1"].blob_bytes == sum(
            want.size for want in {w.sha256: w for w in wants.values()}.values()
        )


@pytest.mark.trio
async def test_a_damaged_object_in_the_store(
    tmp_path: Path,
    registry: Running,
    helios_home: Home,
    models: dict[RepoId, Path],
    expected_log_errors: Callable[[str], None],
) -> None:
    """Bit rot under the registry: those bytes are never read, all others are; once they are right they are read."""
    expected_log_errors("a chunk is corrupt")
    wants = await trio.to_thread.run_sync(published, registry, models)
    want = wants[BASE, "model.safetensors"]
    data = (models[BASE] / "model.safetensors").read_bytes()
    registry.expect_errors(f"a chunk in the store is damaged.*{want.sha256}")
    stored = next(path for path in helios_home.store.rglob(want.sha256) if path.is_file())
    stored.chmod(0o644)
    at = 20 * MIB

    def flip() -> None:
        with stored.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))

    flip()
    async with running(tmp_path / "cache", [registry.url]) as store:
        with pytest.raises(IntegrityError, match=r"models/team/base model\.safetensors at byte .* is corrupt"):
            await read(store, want, at, 10)
        assert await read(store, want, 0, 5000) == data[:5000]
        assert await read(store, want, want.size - 10, 10) == data[-10:]
        flip()
        assert await read(store, want, at, 10) == data[at : at + 10]
        await filled(store, want)
        assert await read(store, want, 0, want.size) == data


@pytest.mark.trio
async def test_the_registry_is_killed_and_started_again(
    tmp_path: Path, registry: Running, helios: Any, models: dict[RepoId, Path]
) -> None:
    """Readers and the fill go on as soon as it is back at its place."""
    wants = await trio.to_thread.run_sync(published, registry, models)
    want = wants[TUNED, "model.safetensors"]
    data = (models[TUNED] / "model.safetensors").read_bytes()
    at = urlsplit(registry.url)
    with SlowLink(at.hostname or "", at.port or 0, 15e6) as link:
        async with running(tmp_path / "cache", [link.url]) as store:
            handle = await store.open(want)
            assert await handle.read(0, 100) == data[:100]
            await trio.to_thread.run_sync(registry.kill)
            link.throttle.rate = None
            with running_registry(helios) as again:
                new = urlsplit(again.url)
                link.retarget(new.hostname or "", new.port or 0)
                assert await handle.read(want.size - 100, 100) == data[-100:]
                await filled(store, want)
                assert await handle.read(0, want.size) == data
                await handle.close()


@pytest.mark.trio
async def test_first_and_last_byte_over_a_slow_link(
    tmp_path: Path, registry: Running, models: dict[RepoId, Path]
) -> None:
    wants = await trio.to_thread.run_sync(published, registry, models)
    want = wants[BASE, "model.safetensors"]
    data = (models[BASE] / "model.safetensors").read_bytes()
    at = urlsplit(registry.url)
    with SlowLink(at.hostname or "", at.port or 0, 8e6) as link:
        async with running(tmp_path / "cache", [link.url]) as store:
            handle = await store.open(want)
            # The edges come at once; the middle may be in a range that the fill has just asked for, behind others.
            for offset, most in ((0, 8 * MIB), (want.size - 1, 8 * MIB), (want.size // 2, want.size * 2 // 3)):
                before = link.passed
                assert await handle.read(offset, 1) == data[offset : offset + 1]
                assert link.passed - before < most, "its own chunk and what was under way, not the file"
            assert not store.status(want.sha256).complete
            await handle.close()


@pytest.mark.trio
async def test_the_embedded_registry_dies_while_a_file_is_read(
    tmp_path: Path, helios: Any, helios_home: Home, models: dict[RepoId, Path]
) -> None:
    """A mount with everything in the kernel's cache but bytes still brings it back."""
    with attach(Config(), helios_home) as attached:
        wants = await trio.to_thread.run_sync(published_with, attached.client(), models)
        want = wants[BASE, "model.safetensors"]
        data = (models[BASE] / "model.safetensors").read_bytes()
        record = running_embedded(helios_home)
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        store = open_store(tmp_path / "cache", [attached.base], roomy(), MountMetrics(), attached.ensure)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            assert await read(store, want, 5000, 100) == data[5000:5100]
            await filled(store, want)
            nursery.cancel_scope.cancel()
        store.close()
