"""Models of a Helios registry without a mount: what a model loader uses.

    with heliosfs.client.connect() as store:
        model = store.resolve("org/name@main")
        model.warm()
        with model.open("config.json") as file:
            text = bytes(file.read())
        with model.tensors() as tensors:
            for info, data in tensors.stream():
                ...

Bytes are fetched once a machine, verified chunk by chunk against the commit's manifest before anybody sees them, and
kept in the local cache. ``heliosfs.client.aio`` is the same for programs on trio. docs/client.md is the guide.
"""

from heliosfs.client.sync import File, Model, Store, Tensors, connect
from heliosfs.client.values import (
    Closed,
    FileInfo,
    FileStatus,
    Progress,
    StoreStatus,
    TensorInfo,
    Warmed,
)
from heliosfs.warming import WarmProgress

__all__ = [
    "Closed",
    "File",
    "FileInfo",
    "FileStatus",
    "Model",
    "Progress",
    "Store",
    "StoreStatus",
    "TensorInfo",
    "Tensors",
    "WarmProgress",
    "Warmed",
    "connect",
]
