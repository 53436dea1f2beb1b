"""Chooses the engine of an object store from its address.

    /path                        a directory (directory.py), or several that hold the same (replicated.py)
    s3://bucket/prefix           S3, or what speaks its protocol
    gs://bucket/prefix           Google Cloud Storage
    az://container/prefix        Azure Blob Storage

In front of the last three there may be a bounded store on a fast local disk (front/).

Credentials are no settings: they come from the environment, configuration files or the role of the instance, as each
service's own tools find them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from helios.config import RegistrySettings
from helios.errors import UsageError
from helios.metrics import RegistryMetrics
from heliosfs.store.objects import ObjectStore

SCHEMES: Final = ("s3", "gs", "az")

MAX_PREFIX: Final = 200
"""Longest prefix in a bucket: with the longest key there is (some 400 bytes) it stays below every service's limit."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]\Z")
_PREFIX = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*\Z")
_ENDPOINT = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?\Z")


def open_objects(
    settings: RegistrySettings, directory: Path, staging: Path, metrics: RegistryMetrics | None = None
) -> ObjectStore:
    """The store that the settings name; ``directory`` is where it is by default, ``staging`` where files are written
    that go to the cloud. Close it when done. Raises UsageError, Unavailable, NoSpace, IntegrityError.
    """
    first = settings.store_directory(directory)
    if first is not None:
        if settings.front:
            raise UsageError(f"registry.front is for a store in the cloud: {first} is a directory already")
        if settings.replicas and settings.database:
            raise UsageError(
                "registry.replicas is for a registry of one process: each would repair what another one writes",
                hint="Processes that share a database (registry.database) keep objects in the cloud or one directory.",
            )
        return _directories(first, [Path(path) for path in settings.replicas])
    if settings.replicas:
        raise UsageError(f"registry.replicas are directories: {settings.store} keeps copies of its own")
    return _behind_front(settings, _remote(settings, staging), staging, metrics or RegistryMetrics())


def _behind_front(
    settings: RegistrySettings, cloud: ObjectStore, staging: Path, metrics: RegistryMetrics
) -> ObjectStore:
    from heliosfs.store.front.disk import Memory, leave
    from heliosfs.store.front.near import Near
    from heliosfs.store.front.store import FrontStore

    try:
        if settings.front and settings.front_writes == "back" and settings.database:
            raise UsageError(
                'registry.front_writes = "back" is for a registry of one process: others would not see what waits here',
                hint='Processes that share a database (registry.database) write with front_writes = "through".',
            )
        if settings.front_limit_gib < 0 or not 0 <= settings.front_min_free < 1:
            raise UsageError("registry.front_limit_gib is at least 0, registry.front_min_free a share from 0 to 1")
        memory = Memory(staging.parent / "front.json")
        if not settings.front:
            leave(memory, cloud.describe())
            return cloud
        limit = int(settings.front_limit_gib * (1 << 30)) or None
        near = Near(Path(settings.front), cloud.describe(), memory, limit, settings.front_min_free, metrics)
        back, send_near = settings.front_writes == "back", settings.redirect == "absent"
        return FrontStore(cloud, near, metrics, back=back, send_near=send_near)
    except BaseException:
        cloud.close()
        raise


def _directories(first: Path, others: Sequence[Path]) -> ObjectStore:
    from heliosfs.store.directory import DirectoryStore

    if not others:
        return DirectoryStore(first)
    from heliosfs.store.replicated import ReplicatedStore

    return ReplicatedStore([first, *others])


def _remote(settings: RegistrySettings, staging: Path) -> ObjectStore:
    from heliosfs.store.cloud import CloudBucket, Place
    from heliosfs.store.remote import RemoteStore

    scheme, _, rest = settings.store.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    if scheme not in SCHEMES:
        raise UsageError(f"registry.store: {scheme}:// is none of {', '.join(f'{s}://' for s in SCHEMES)}")
    if not _BUCKET.match(bucket):
        raise UsageError(f"registry.store: {bucket[:80]!r} is no name of a bucket; write {scheme}://bucket/prefix")
    if prefix and (not _PREFIX.match(prefix) or len(prefix) > MAX_PREFIX):
        raise UsageError(
            f"registry.store: the prefix {prefix[:80]!r} is not made of letters, digits and . _ - /",
            hint=f"It has at most {MAX_PREFIX} of them.",
        )
    options = settings.store_options
    if options.endpoint and not _ENDPOINT.match(options.endpoint):
        raise UsageError("registry.store_options.endpoint is no address like https://host:port, without user and query")
    place = Place(scheme, bucket, prefix, options.endpoint.rstrip("/"), options.region, options.account)
    try:
        if settings.store_engine == "fsspec":
            from heliosfs.store.through_fsspec import FsspecBucket

            return RemoteStore(FsspecBucket(place), staging, read_back=settings.store_read_back)
        return RemoteStore(CloudBucket(place), staging, read_back=settings.store_read_back)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "az": "azure"}[scheme]
        raise UsageError(
            f"registry.store: {scheme}:// needs {error.name}, which is not installed",
            hint=f"pip install 'helios-llm[{extra}]'",
        ) from None
