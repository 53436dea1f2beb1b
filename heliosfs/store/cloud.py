"""The first engine of cloud stores: S3, GCS and Azure Blob through obstore (Rust's object_store).

Its calls block without the GIL, retry what may be retried with growing pauses, and end: reads well before a node's
deadline (``MountSettings.request_deadline_s``), parts of uploads later. S3 gets the sha256 of every request's body and
refuses other bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from helios.errors import HeliosError, NotFound, Unavailable
from heliosfs.store.remote import refused, told

PARTS: Final = 4
"""Parts of one upload that are under way at a time; each is held in memory."""

PART: Final = 16 << 20
"""Bytes of a part, where the object is not so large that it would need too many."""

MOST_PARTS: Final = 9000
"""S3 takes 10,000 parts, Azure 50,000."""

READ: Final = {"connect_timeout": "4s", "read_timeout": "8s", "timeout": "60s"}
READ_RETRIES_S: Final = 15.0
WRITE: Final = {"connect_timeout": "4s", "read_timeout": "60s", "timeout": "120s"}
WRITE_RETRIES_S: Final = 170.0
"""Longest that a request is tried again and again, in seconds: signatures of a request last for some minutes."""
REMOVE_S: Final = 10.0
REMOVE: Final = {"connect_timeout": "4s", "read_timeout": "8s", "timeout": f"{REMOVE_S:.0f}s"}
REMOVE_RETRIES_S: Final = 10.0
"""The same for a removal. Together they are the longest that one takes: a registry has others wait meanwhile, and must
be done before the database takes it for dead (registry/burial.py). What can't be removed is removed later."""

CUT_OFF: Final = 2
AT_ONCE_S: Final = 1.0
"""So often is a removal repeated that failed within so many seconds: the longest that one takes stays what it is."""


class Place:
    """Where a bucket is and how its service is reached; ``prefix`` has no slash at its ends."""

    def __init__(self, scheme: str, bucket: str, prefix: str, endpoint: str, region: str, account: str) -> None:
        self.scheme, self.bucket, self.prefix = scheme, bucket, prefix
        self.endpoint, self.region, self.account = endpoint, region, account

    @property
    def name(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


class CloudBucket:
    """A ``Bucket`` through obstore."""

    def __init__(self, place: Place) -> None:
        """Raises Unavailable where there are no credentials, or the configuration makes no sense."""
        self.name, self._place = place.name, place
        make = {"s3": _s3, "gs": _gcs, "az": _azure}[place.scheme]
        self._chain: Any = None
        if place.scheme == "s3":
            from heliosfs.store.aws import Chain

            self._chain = Chain()
        with self._guard("can't be used"):
            self._reading = make(place, self._chain, READ, READ_RETRIES_S)
            self._writing = make(place, self._chain, WRITE, WRITE_RETRIES_S)
            self._removing = make(place, self._chain, REMOVE, REMOVE_RETRIES_S)

    def create(self, key: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._guard(f"does not take {key}"):
            try:
                obstore.put(self._writing, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            except FileNotFoundError as error:
                raise self._gone(error) from None
        return True

    def upload(self, key: str, path: Path, size: int) -> None:
        import obstore

        part = max(PART, -(-size // MOST_PARTS))
        with self._guard(f"does not take {key}"):
            try:
                obstore.put(self._writing, key, path, use_multipart=True, chunk_size=part, max_concurrency=PARTS)
            except FileNotFoundError as error:
                raise self._gone(error) from None

    def size(self, key: str) -> int:
        import obstore

        with self._guard(f"does not tell of {key}", key):
            return int(obstore.head(self._reading, key)["size"])

    def read(self, key: str, offset: int, count: int) -> memoryview:
        import obstore
        from obstore.exceptions import GenericError

        with self._guard(f"does not give {key}", key):
            try:
                return memoryview(obstore.get_range(self._reading, key, start=offset, length=count))
            except GenericError as error:
                if " 416 " in str(error) or "but object was only" in str(error):
                    return memoryview(b"")
                raise

    def delete(self, key: str) -> None:
        """object_store takes a removal on GCS for one that must not happen twice, so it doesn't repeat one that was
        cut off. Here a name is content: it may."""
        import obstore
        from obstore.exceptions import GenericError

        with self._guard(f"does not remove {key}"), contextlib.suppress(FileNotFoundError):
            since = time.monotonic()
            for last in (False,) * CUT_OFF + (True,):
                try:
                    obstore.delete(self._removing, key)
                    return
                except GenericError:
                    if last or time.monotonic() - since > AT_ONCE_S:
                        raise

    def list(self, directory: str) -> Iterator[tuple[str, int]]:
        import obstore

        with self._guard("can't be listed"):
            for page in obstore.list(self._reading, directory.rstrip("/") or None, chunk_size=1000):
                for meta in page:
                    yield meta["path"], meta["size"]

    def sign(self, keys: Sequence[str], expires_s: float) -> Sequence[str]:
        import obstore

        with self._guard("can't sign addresses"):
            return list(obstore.sign(self._reading, "GET", list(keys), timedelta(seconds=round(expires_s))))

    def abandon(self, older_than_s: float) -> int:
        """Azure drops parts that were never committed itself, after a week; GCS needs a lifecycle rule."""
        if self._chain is None:
            return 0
        from heliosfs.store.aws import abandon_at

        return abandon_at(self._chain, self._place, older_than_s)

    def check(self) -> None:
        next(self.list("public/registry/"), None)

    def close(self) -> None:
        """obstore closes its connections with the objects."""

    def _gone(self, error: BaseException) -> Unavailable:
        """On a write it is the bucket that is missing."""
        return Unavailable(f"{self.name} is not there: {told(error)}", hint="Make the bucket or container first.")

    @contextlib.contextmanager
    def _guard(self, what: str, key: str | None = None) -> Iterator[None]:
        """Turn obstore's errors into ours; with ``key`` what is missing is that object.

        The cause is left out: its text may hold signatures.
        """
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except HeliosError:
            raise
        except FileNotFoundError as error:
            if key is None:
                raise self._gone(error) from None
            raise NotFound(f"the object {key} is not in {self.name}") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise refused(self.name, error) from None
        except (BaseError, OSError, ValueError) as error:
            raise Unavailable(f"{self.name} {what}: {told(error)}") from None


def _options(place: Place, timeouts: dict[str, str], retries_s: float) -> dict[str, Any]:
    pauses = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=3), "base": 2}
    return {
        "prefix": place.prefix or None,
        "client_options": {**timeouts, **({"allow_http": True} if place.endpoint.startswith("http://") else {})},
        "retry_config": {"max_retries": 8, "retry_timeout": timedelta(seconds=retries_s), "backoff": pauses},
    }


def _s3(place: Place, chain: Any, timeouts: dict[str, str], retries_s: float) -> Any:
    from obstore.store import S3Store

    config = {"checksum_algorithm": "sha256"}
    if place.endpoint:
        config["endpoint"] = place.endpoint
    if region := place.region or chain.region:
        config["region"] = region
    options = _options(place, timeouts, retries_s)
    return S3Store(place.bucket, config=config, credential_provider=chain, **options)


def _gcs(place: Place, _chain: Any, timeouts: dict[str, str], retries_s: float) -> Any:
    from obstore.store import GCSStore

    config = {"base_url": place.endpoint} if place.endpoint else {}
    return GCSStore(place.bucket, config=config, **_options(place, timeouts, retries_s))


def _azure(place: Place, _chain: Any, timeouts: dict[str, str], retries_s: float) -> Any:
    from obstore.store import AzureStore

    config = {}
    if place.endpoint:
        config["endpoint"] = place.endpoint
    if place.account:
        config["account_name"] = place.account
    return AzureStore(container_name=place.bucket, config=config, **_options(place, timeouts, retries_s))
