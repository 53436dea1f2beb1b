"""What files and batches need of a store, of each that there is: above all that of several writers one wins."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helios.config import BatchSettings, StoreOptions
from helios.errors import NotFound, Unavailable
from router.batches.cloud import CloudObjects
from router.batches.objects import Objects, open_objects
from tests.support.cloud_servers import azurite, credentials, gcs, moto, some_prefix

CLOUDS = {"s3": moto, "azure": azurite, "gcs": gcs}


@pytest.fixture(scope="module", params=["directory", *CLOUDS])
def settings(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchSettings]:
    path = tmp_path_factory.mktemp("store")
    if request.param not in CLOUDS:
        yield BatchSettings(store=str(path / "store"))
        return
    with CLOUDS[request.param](path) as server, credentials(server):
        options = StoreOptions(endpoint=server.endpoint(), region=server.region, account=server.account)
        yield BatchSettings(store=server.store, store_options=options)


@pytest.fixture
def objects(settings: BatchSettings, tmp_path: Path) -> Objects:
    """A store that is empty."""
    place = some_prefix() if "://" in settings.store else tmp_path.name
    return open_objects(BatchSettings(store=f"{settings.store}/{place}", store_options=settings.store_options))


def test_what_was_put_is_there_until_it_is_deleted(objects: Objects) -> None:
    with pytest.raises(NotFound):
        objects.get("a/b/one")
    assert objects.list("a") == []
    for name in ("a/b/two", "a/b/one", "a/c", "ab/c"):
        objects.put(name, name.encode())
    objects.put("a/c", b"")
    assert [objects.get(name).data for name in ("a/b/one", "a/c")] == [b"a/b/one", b""]
    assert objects.list("a") == ["a/b/one", "a/b/two", "a/c"]
    assert objects.list("a/b") == ["a/b/one", "a/b/two"]
    objects.delete("a/b/one")
    objects.delete("a/b/one")
    assert objects.list("a") == ["a/b/two", "a/c"]


def test_a_large_part_comes_back_whole(objects: Objects) -> None:
    data = bytes(range(256)) * (9 << 12)  # 9 MiB: more than one part, where a service has such
    objects.put("a", data)
    assert objects.get("a").data == data


def test_an_object_is_replaced_only_as_it_was_read(objects: Objects) -> None:
    objects.put("a", b"1")
    first = objects.get("a").tag
    second = objects.replace("a", b"2", first)
    assert second is not None
    assert objects.replace("a", b"3", first) is None  # somebody was there before
    again = objects.replace("a", b"2", first)  # in the cloud that may be its own, whose answer got lost
    assert (again is not None) == isinstance(objects, CloudObjects)
    third = objects.replace("a", b"4", objects.get("a").tag)
    assert third is not None
    assert objects.get("a") == (b"4", third)
    objects.delete("a")
    assert objects.replace("a", b"5", third) is None
    with pytest.raises(NotFound):
        objects.get("a")


def test_of_writers_that_come_together_one_wins_each_time(objects: Objects) -> None:
    objects.put("a", b"0 nobody")

    def add(writer: int) -> None:
        for _ in range(200):
            found = objects.get("a")
            if objects.replace("a", b"%d %d" % (int(found.data.split()[0]) + 1, writer), found.tag) is not None:
                return
        raise AssertionError("it never won")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(12)))
    assert objects.get("a").data.split()[0] == b"12"


def test_a_bucket_that_is_missing_is_named_without_secrets_and_a_directory_is_made(settings: BatchSettings) -> None:
    scheme, cloud, _ = settings.store.partition("://")
    store = f"{scheme}://nobodys" if cloud else f"{scheme}/new/one"
    objects = open_objects(BatchSettings(store=store, store_options=settings.store_options))
    if not cloud:
        objects.put("a", b"1")
        return
    with pytest.raises(Unavailable, match=f"^{store} ") as caught:
        objects.put("a", b"1")
    assert "TellNobody" not in str(caught.value)
