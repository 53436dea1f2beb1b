"""The client for programs on trio.

async with heliosfs.client.aio.connect() as store:
    model = await store.resolve("org/name@main")
    await model.warm()
    async with model.tensors() as tensors, tensors.stream() as stream:
        async for info, data in stream:
            ...
"""

from heliosfs.client.file import File
from heliosfs.client.model import Model
from heliosfs.client.store import Store, connect
from heliosfs.client.tensors import Tensors

__all__ = ["File", "Model", "Store", "Tensors", "connect"]
