"""The second engine of cloud stores: fsspec. S3 through s3fs, which is botocore underneath, Azure Blob through adlfs.

Their asyncio parts run in fsspec's own loop thread; calls here block, with a deadline each. GCS goes the same way where
gcsfs is installed, which Helios' tests do not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from helios.errors import HeliosError, IntegrityError, NotFound, Unavailable
from heliosfs.store import azure
from heliosfs.store.cloud import MOST_PARTS, PART, PARTS, Place
from heliosfs.store.remote import refused, told

READ_S: Final = 25.0
"""Longest wait for one read, in seconds."""

WRITE_S: Final = 600.0
"""Longest wait for a write, in seconds, for each so many bytes of it:"""

WRITE_STEP: Final = 1 << 30

GRACE_S: Final = 5.0
"""How long a call that was cancelled may take to end, in seconds."""

REFUSALS: Final = frozenset({errno.EACCES, errno.EPERM})


class FsspecBucket:
    """A ``Bucket`` through fsspec."""

    def __init__(self, place: Place) -> None:
        """Raises Unavailable where the library for the service is missing, or there are no credentials."""
        self.name, self._place = place.name, place
        self._root = place.bucket + (f"/{place.prefix}" if place.prefix else "")
        self._chain: Any = None
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        with self._guard("can't be used"):
            try:
                self._fs = self._open(options)
            except ImportError as error:
                hint = "Install what is missing, or use obstore."
                raise Unavailable(f"{place.name}: {told(error)}", hint=hint) from None

    def _open(self, options: dict[str, Any]) -> Any:
        import fsspec

        place = self._place
        if place.scheme == "az":
            return azure.filesystem(place, options)
        if place.scheme == "s3":
            from heliosfs.store.aws import Chain

            self._chain = Chain()
            return fsspec.filesystem("s3", **options, **_s3(place, self._chain))
        if place.endpoint:
            options["endpoint_url"] = place.endpoint
        return fsspec.filesystem("gs", **options)

    def create(self, key: str, data: bytes) -> bool:
        with self._guard(f"does not take {key}"):
            try:
                if self._place.scheme == "az":
                    self._run(azure.create, WRITE_S, self._fs, self._path(key), data)
                else:
                    self._run(self._fs._pipe_file, WRITE_S, self._path(key), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if not _taken(error):
                    raise
                return False
        return True

    def upload(self, key: str, path: Path, size: int) -> None:
        part = max(PART, -(-size // MOST_PARTS))
        limit = WRITE_S * (1 + size // WRITE_STEP)
        with self._guard(f"does not take {key}"):
            if self._place.scheme == "az":
                self._run(azure.upload, limit, self._fs, self._path(key), path, size, part)
            else:
                self._run(self._fs._put_file, limit, str(path), self._path(key), chunksize=part, max_concurrency=PARTS)

    def size(self, key: str) -> int:
        with self._guard(f"does not tell of {key}", key):
            found = self._run(self._fs._info, READ_S, self._path(key))
        if found["type"] != "file":
            raise NotFound(f"the object {key} is not in {self.name}")
        return int(found["size"])

    def read(self, key: str, offset: int, count: int) -> memoryview:
        with self._guard(f"does not give {key}", key):
            try:
                data: bytes = self._run(self._fs._cat_file, READ_S, self._path(key), start=offset, end=offset + count)
            except Exception as error:  # each service's own, unknown here
                text = str(error)
                if "did not match calculated checksum" in text:
                    raise IntegrityError(f"{self.name} gave other bytes of {key} than its checksum says") from None
                if "not satisfiable" not in text and "InvalidRange" not in text:
                    raise
                data = b""
        return memoryview(data)

    def delete(self, key: str) -> None:
        with self._guard(f"does not remove {key}"), contextlib.suppress(FileNotFoundError):
            self._run(self._fs._rm_file, READ_S, self._path(key))

    def list(self, directory: str) -> Iterator[tuple[str, int]]:
        where = f"{self._root}/{directory}".rstrip("/")
        with self._guard("can't be listed"), contextlib.suppress(FileNotFoundError):
            found = self._run(self._fs._find, WRITE_S, where, detail=True)
            for path in sorted(found):
                yield path.removeprefix(f"{self._root}/"), int(found[path]["size"])

    def sign(self, keys: Sequence[str], expires_s: float) -> Sequence[str] | None:
        with self._guard("can't sign addresses"):
            return [self._fs.sign(self._path(key), expiration=round(expires_s)) for key in keys]

    def abandon(self, older_than_s: float) -> int:
        if self._chain is None:
            return 0
        from heliosfs.store.aws import abandon_at

        return abandon_at(self._chain, self._place, older_than_s)

    def check(self) -> None:
        with self._guard("does not answer"):
            self._run(self._fs._find, READ_S, self._path("public/registry"))  # says who is refused
            if not self._run(self._fs._exists, READ_S, self._place.bucket):
                raise Unavailable(f"{self.name} is not there", hint="Make the bucket first.")

    def close(self) -> None:
        """The client's connections are closed in fsspec's loop."""
        if self._place.scheme == "az":
            self._run(self._fs.service_client.close, READ_S)
        if self._chain is not None and (client := getattr(self._fs, "_s3", None)) is not None:
            self._fs.close_session(self._fs.loop, client)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _run(self, call: Any, limit_s: float, *args: Any, **kwargs: Any) -> Any:
        """Run a coroutine in fsspec's loop; one that takes too long is cancelled there."""
        within = asyncio.wait_for(call(*args, **kwargs), limit_s)
        return asyncio.run_coroutine_threadsafe(within, self._fs.loop).result(limit_s + GRACE_S)

    @contextlib.contextmanager
    def _guard(self, what: str, key: str | None = None) -> Iterator[None]:
        """Turn fsspec's and the services' errors into ours; with ``key`` what is missing is that object."""
        try:
            yield
        except HeliosError:
            raise
        except FileNotFoundError as error:
            if key is None:
                raise Unavailable(f"{self.name} is not there: {told(error)}", hint="Make the bucket first.") from None
            raise NotFound(f"the object {key} is not in {self.name}") from None
        except OSError as error:  # TimeoutError is one
            if error.errno in REFUSALS:
                raise refused(self.name, error) from None
            raise Unavailable(f"{self.name} {what}: {told(error)}") from None
        except Exception as error:  # each service's library has its own
            if getattr(error, "status_code", 0) in (401, 403):
                raise refused(self.name, error) from None
            raise Unavailable(f"{self.name} {what}: {told(error)}") from None


def _s3(place: Place, chain: Any) -> dict[str, Any]:
    client = {"region_name": place.region or chain.region or "us-east-1"}
    if place.endpoint:
        client["endpoint_url"] = place.endpoint
    config = {
        "signature_version": "s3v4",
        "connect_timeout": 4,
        "read_timeout": 8,
        "retries": {"max_attempts": 5, "mode": "standard"},
    }
    return {"client_kwargs": client, "config_kwargs": config}


def _taken(error: BaseException) -> bool:
    """Whether a conditional write found an object there."""
    text = str(error)
    return "PreconditionFailed" in text or "pre-conditions you specified did not hold" in text
