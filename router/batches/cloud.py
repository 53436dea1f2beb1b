"""Files and batches in S3, GCS or Azure Blob, through obstore (Rust's object_store).

Conditional writes are the services' own: If-Match with the ETag on S3 and Azure, the generation on GCS. One whose
answer got lost and that is sent again finds its own object there; so after a refusal the object is looked at, and where
it is what was to be written, it was. Credentials come from the environment or the instance's role, as obstore finds
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import Any, Final

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

from helios.config import StoreOptions
from helios.errors import NotFound, Unavailable
from router.batches.objects import Stored, Tag

CLIENT: Final = {"connect_timeout": "4s", "read_timeout": "20s", "timeout": "60s"}
RETRY_S: Final = 15.0
"""Longest that a request is sent again and again, in seconds: less than a lease."""


class CloudObjects:
    """A store in a bucket. It is made when it is first used, so that a router without credentials serves all else."""

    def __init__(self, scheme: str, bucket: str, prefix: str, options: StoreOptions) -> None:
        self.name = f"{scheme}://{bucket}" + (f"/{prefix}" if prefix else "")
        self._place = scheme, bucket, prefix, options

    @cached_property
    def _store(self) -> Any:
        return _make(*self._place)

    def get(self, key: str) -> Stored:
        with self._guard(key):
            found = obstore.get(self._store, key)
            meta = found.meta
            return Stored(bytes(found.bytes()), Tag(meta["e_tag"], meta["version"]))

    def put(self, key: str, data: bytes) -> None:
        with self._guard():
            obstore.put(self._store, key, data, use_multipart=False)

    def replace(self, key: str, data: bytes, tag: Tag) -> Tag | None:
        with self._guard():
            try:
                given = {"e_tag": tag.etag, "version": tag.version}
                mode = {name: value for name, value in given.items() if value is not None}
                put = obstore.put(self._store, key, data, mode=mode, use_multipart=False)
                return Tag(put["e_tag"], put["version"])
            except (PreconditionError, FileNotFoundError):
                pass
        try:
            found = self.get(key)
        except NotFound:
            return None
        return found.tag if found.data == data else None

    def delete(self, key: str) -> None:
        with self._guard():
            with suppress(FileNotFoundError):
                obstore.delete(self._store, key)

    def list(self, directory: str) -> list[str]:
        with self._guard():
            return sorted(meta["path"] for page in obstore.list(self._store, directory) for meta in page)

    @contextmanager
    def _guard(self, key: str | None = None) -> Iterator[None]:
        """obstore's errors as ours. Their text is left out: it may hold signatures."""
        try:
            yield
        except FileNotFoundError:
            if key is not None:
                raise NotFound(f"there is no {key} in {self.name}") from None
            raise Unavailable(f"{self.name} is not there", hint="Make the bucket or container first.") from None
        except (BaseError, OSError, ValueError) as error:
            raise Unavailable(f"{self.name} can't be used: {type(error).__name__}") from None


def _make(scheme: str, bucket: str, prefix: str, options: StoreOptions) -> Any:
    pauses = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=3), "base": 2}
    plain = {"allow_http": True} if options.endpoint.startswith("http://") else {}
    common = {
        "prefix": prefix or None,
        "client_options": {**CLIENT, **plain},
        "retry_config": {"max_retries": 5, "retry_timeout": timedelta(seconds=RETRY_S), "backoff": pauses},
    }
    endpoint = options.endpoint
    if scheme == "s3":
        given = {"endpoint": endpoint, "region": options.region}
        return S3Store(bucket, config={name: value for name, value in given.items() if value}, **common)
    if scheme == "gs":
        return GCSStore(bucket, config={"base_url": endpoint} if endpoint else {}, **common)
    given = {"endpoint": endpoint, "account_name": options.account}
    return AzureStore(container_name=bucket, config={name: value for name, value in given.items() if value}, **common)
