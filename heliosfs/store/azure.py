"""Azure Blob through adlfs, with a client of our own making below it.

adlfs finds the credentials, but makes a client that waits 15 s before it tries again and reaches no endpoint that is
not called after its account. The client it uses is an attribute of its own, so it gets another one. Large files go up
in blocks here: adlfs sends such of 4 MiB, of which an object has 50,000 at most, and leaves some running if one fails.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
from pathlib import Path
from typing import Any, Final

from heliosfs.store.cloud import PARTS, Place

RETRIES: Final = 4
"""So often is a request tried again: after up to 1 s, then some 2, 4 and 8 s."""


def filesystem(place: Place, options: dict[str, Any]) -> Any:
    """An adlfs filesystem. Raises ImportError, and what adlfs raises where there are no credentials."""
    import fsspec

    fs = fsspec.filesystem("abfs", account_name=place.account or None, **options)
    from azure.storage.blob.aio import BlobServiceClient, ExponentialRetry

    credential: Any = fs.credential
    if credential is None and fs.account_key is not None:
        credential = {"account_name": fs.account_name, "account_key": fs.account_key}
    url = place.endpoint or f"https://{fs.account_name}.blob.core.windows.net"
    if credential is None and fs.sas_token is not None:
        url += "?" + fs.sas_token.removeprefix("?")
    fs.service_client = BlobServiceClient(
        account_url=url,
        credential=credential,
        retry_policy=ExponentialRetry(initial_backoff=0, increment_base=2, retry_total=RETRIES, random_jitter_range=1),
        connection_timeout=4,
        read_timeout=20,
        logging_enable=False,
    )
    return fs


LARGE: Final = 1 << 20
"""aiohttp, below, is loath to take more bytes at once."""


async def create(fs: Any, path: str, data: bytes) -> None:
    """Write a small object. Raises FileExistsError where there is one."""
    if len(data) <= LARGE:
        await fs._pipe_file(path, data, mode="create")
        return
    from azure.core import MatchConditions
    from azure.core.exceptions import ResourceExistsError, ResourceModifiedError
    from azure.storage.blob import BlobBlock

    container, _, name = path.partition("/")
    block = base64.b64encode(b"%08d" % 0).decode()
    async with fs.service_client.get_blob_client(container, name) as blob:
        await blob.stage_block(block, io.BytesIO(data), length=len(data))
        try:
            await blob.commit_block_list([BlobBlock(block)], match_condition=MatchConditions.IfMissing)
        except (ResourceExistsError, ResourceModifiedError):
            raise FileExistsError(path) from None


async def upload(fs: Any, path: str, source: Path, size: int, part: int) -> None:
    """Send a file in blocks of ``part`` bytes, some at a time; it becomes visible with the last call. What the first
    block that fails raised is raised when no other is under way."""
    from azure.storage.blob import BlobBlock

    container, _, name = path.partition("/")
    starts = range(0, size, part)
    blocks = [base64.b64encode(b"%08d" % number).decode() for number in range(len(starts))]
    turn = asyncio.Semaphore(PARTS)
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        async with fs.service_client.get_blob_client(container, name) as blob:

            async def send(block: str, start: int) -> None:
                async with turn:
                    data = await asyncio.to_thread(os.pread, fd, min(part, size - start), start)
                    await blob.stage_block(block, io.BytesIO(data), length=len(data))

            try:
                async with asyncio.TaskGroup() as tasks:
                    for block, start in zip(blocks, starts, strict=True):
                        tasks.create_task(send(block, start))
            except* Exception as errors:
                raise errors.exceptions[0] from None
            await blob.commit_block_list([BlobBlock(block) for block in blocks])
    finally:
        os.close(fd)
