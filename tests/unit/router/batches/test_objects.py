"""The store in a directory, and what a sweep removes from it."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from helios.config import BatchSettings, StoreOptions
from helios.errors import IntegrityError, NotFound, UsageError
from router.batches import service
from router.batches.objects import DirectoryObjects, check_store, open_objects
from router.batches.records import FileRecord, Who, batch_of, encode, file_of, new_id
from router.batches.shelf import Shelf
from router.batches.sweep import ORPHANED_S, Sweep
from tests.unit.router.batches.test_machine import new


def test_of_several_who_replace_an_object_one_does(tmp_path: Path) -> None:
    DirectoryObjects(tmp_path).put("a/b", b"0")
    won: list[int] = []

    def change(number: int) -> None:
        store = DirectoryObjects(tmp_path)
        for _ in range(20):
            data, tag = store.get("a/b")
            if store.replace("a/b", b"%d" % (int(data) + 1), tag) is not None:
                won.append(number)

    threads = [threading.Thread(target=change, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert int(DirectoryObjects(tmp_path).get("a/b").data) == len(won) >= 20
    assert DirectoryObjects(tmp_path).list("a") == ["a/b"]
    assert [name for name in os.listdir(tmp_path / "a") if name != "b"] == []


def test_what_is_not_there(tmp_path: Path) -> None:
    store = DirectoryObjects(tmp_path / "new")
    with pytest.raises(NotFound):
        store.get("x")
    store.put("x", b"1")
    tag = store.get("x").tag
    store.delete("x")
    store.delete("x")
    assert store.replace("x", b"2", tag) is None
    assert store.list("none") == []


@pytest.mark.parametrize("address", ["s3://", "s3://B", "ftp://bucket", "s3://bucket/../x", "s3://bucket/a b"])
def test_a_store_that_can_t_be(address: str) -> None:
    with pytest.raises(UsageError, match=r"router\.batches\.store"):
        check_store(BatchSettings(store=address))


def test_settings_that_can_t_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"router\.batches\.store"):
        check_store(BatchSettings(store=str(tmp_path / "file")))
    with pytest.raises(UsageError, match=r"router\.batches\.lease_s must be more than 0"):
        service.check(BatchSettings(lease_s=0))
    check_store(BatchSettings(store="az://container/prefix"))
    store = open_objects(BatchSettings(store="gs://bucket/a/b/", store_options=StoreOptions()))
    assert store.name == "gs://bucket/a/b"  # nothing is asked before it is used


def test_records_of_another_version_are_refused() -> None:
    record = FileRecord(id="file-1", tenant="-", filename="a", purpose="batch", created_at=1)
    assert file_of(encode(record), "k") == record
    assert batch_of(encode(new()), "k") == new()
    for data in (encode(record).replace(b'"version":1', b'"version":2'), b"", b"{}"):
        with pytest.raises(IntegrityError, match="no record of a file"):
            file_of(data, "k")


def test_a_sweep_removes_what_is_over_its_time_and_what_nobody_names(tmp_path: Path) -> None:
    async def scene() -> None:
        shelf = Shelf(DirectoryObjects(tmp_path))
        start, kept = 1e9, []
        for life in (10, 10**7, None):
            identity = new_id("file-", start)
            part = await shelf.write_part("acme", identity, "0", b"x")
            expires = None if life is None else int(start) + life
            record = FileRecord(
                id=identity, tenant="acme", filename="f", purpose="batch", created_at=int(start), expires_at=expires,
                parts=[part],
            )  # fmt: skip
            await shelf.add_file(record)
            kept += [identity] if life != 10 else []
        ids = {"output_file_id": new_id("file-", start), "error_file_id": new_id("file-", start), "who": Who("acme")}
        running = new(id=new_id("batch_", start), **ids)
        await shelf.add_batch(running)
        await shelf.write_part("acme", running.output_file_id, "0", b"of a batch that is not over")
        await shelf.write_part("acme", new_id("file-", start), "0", b"interrupted")
        over = new(id=new_id("batch_", start), status="completed")
        await shelf.add_batch(over)
        await shelf.close_batch("acme", over.id)
        young = start + ORPHANED_S - 1
        await Sweep(shelf, 1e9, lambda: young).sweep()
        assert len(await shelf.keys("v1/content")) == 4
        await Sweep(shelf, ORPHANED_S, lambda: young + 2).sweep()
        left = {key.split("/")[3] for key in await shelf.keys("v1/content")}
        assert left == {*kept, running.output_file_id}
        assert await shelf.file_ids("acme") == sorted(kept)
        assert await shelf.batch_ids("acme") == [running.id]
        shelf.close()

    asyncio.run(scene())
