"""Every engine of the object store, opened on something real, for tests that all of them must pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heliosfs.store import cloud, remote, through_fsspec
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.objects import ObjectStore
from heliosfs.store.opening import open_objects
from heliosfs.store.replicated import ReplicatedStore
from tests.support.cloud_servers import Server, azurite, credentials, gcs, moto, some_prefix

ENGINES = (
    "directory", "replicated", "s3 obstore", "s3 fsspec", "azure obstore", "azure fsspec", "gcs obstore",
    "s3 obstore front through", "s3 obstore front back",
)  # fmt: skip
SERVERS = {"s3": moto, "azure": azurite, "gcs": gcs}

Open = Callable[[Path], contextlib.AbstractContextManager[ObjectStore]]
"""Opens a new, empty store that has its local files below a directory."""


SMALL_PART = 5 << 20
"""The smallest part of an upload that S3 takes."""


def small_parts(patch: pytest.MonkeyPatch) -> None:
    """Let objects go up in parts that are quickly made."""
    patch.setattr(remote, "SINGLE", SMALL_PART)
    patch.setattr(cloud, "PART", SMALL_PART)
    patch.setattr(through_fsspec, "PART", SMALL_PART)


@contextlib.contextmanager
def engine(name: str, root: Path) -> Iterator[Open]:
    """The engine, and its server while the block runs."""
    with contextlib.ExitStack() as stack:
        name, _, writes = name.partition(" front ")
        kind, _, library = name.partition(" ")
        server: Server | None = None
        if kind in SERVERS:
            server = stack.enter_context(SERVERS[kind](root))
            stack.enter_context(credentials(server))

        @contextlib.contextmanager
        def opening(below: Path) -> Iterator[ObjectStore]:
            below.mkdir(parents=True, exist_ok=True)
            if server is not None:
                more = {"front": str(below / "front"), "front_writes": writes} if writes else {}
                settings = server.settings(prefix=some_prefix(), engine=library, **more)
                store: ObjectStore = open_objects(settings, below / "none", below / "staging")  # type: ignore[arg-type]
            elif kind == "replicated":
                store = ReplicatedStore([below / "one", below / "two", below / "three"])
            else:
                store = DirectoryStore(below / "store")
            with contextlib.closing(store):
                yield store

        yield opening


def read(store: ObjectStore, key: str) -> bytes:
    """A whole object."""
    buffer = bytearray(store.info(key).size)
    store.read_into(key, 0, memoryview(buffer))
    return bytes(buffer)


def staged(store: ObjectStore, data: bytes, name: str = "file") -> Path:
    """A finished file in the store's staging directory."""
    path = store.staging() / name
    path.write_bytes(data)
    return path
