"""Ingest: what is stored, how, and what is shared."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from helios.errors import IntegrityError, InvalidInput
from helios.metrics import RegistryMetrics
from heliosfs.store import pack
from heliosfs.store.chunking import LARGE
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import blob_key, recipe_key
from heliosfs.store.manifest import git_blob_oid, lfs_pointer
from heliosfs.store.recipe import MAX_BLOB, MAX_CHUNK, Recipe
from registry.ingest import FileSource, Ingest, IngestedBlob
from tests.support.ingest import Bytes, MemoryIndex, audit, reader, safetensors, seeded, stored_bytes

MIB = 1 << 20


def gguf_file(path: Path, tensors: dict[str, int], template: str) -> bytes:
    """A file by ggml's own writer: tensors of so many bytes each."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template(template)
    writer.add_token_list([f"word{n}" for n in range(1000)])
    for number, (name, size) in enumerate(tensors.items()):
        writer.add_tensor(name, np.frombuffer(seeded(size, number), dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


class Lab:
    """A store, an index and an ingest."""

    def __init__(self, root: Path) -> None:
        self.store = DirectoryStore(root)
        self.index = MemoryIndex()
        self.metrics = RegistryMetrics()
        self.ingest = Ingest(self.store, self.index, metrics=self.metrics)

    def put(self, path: str, data: bytes, most: int = 1 << 30, **options: object) -> IngestedBlob:
        blob = self.ingest.ingest(path, len(data), Bytes(data, most), **options)  # type: ignore[arg-type]
        self.check(data, blob)
        return blob

    def check(self, data: bytes, blob: IngestedBlob) -> None:
        """What must hold after every ingest, whatever way the blob was stored."""
        entry = blob.entry
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
        assert entry.size == len(data) == blob.new_bytes + blob.deduplicated_bytes
        assert Recipe.decode(blob.record, entry.recipe) == blob.recipe
        buffer = bytearray(len(blob.record))
        self.store.read_into(recipe_key("public", entry.recipe), 0, memoryview(buffer))
        assert buffer == blob.record
        opened = reader(self.store, blob.recipe, blob.locations)
        assert opened.verify() == len(blob.recipe)
        assert opened.read(0, len(data)) == data
        assert [p.name for p in self.store.staging().iterdir()] == [".lock"]
        assert [t.name for t in threading.enumerate() if t.name.startswith("ingest-")] == []


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path / "store")
    yield made
    audit(made.store)
    made.store.close()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, MAX_CHUNK - 1, MAX_CHUNK, MAX_CHUNK + 1, 9 * MIB + 4097])
def test_a_new_file_becomes_one_object_that_is_the_file(lab: Lab, size: int) -> None:
    data = seeded(size, 1)
    blob = lab.put("weights.bin", data, most=1_000_003)
    key = blob_key("public", blob.entry.sha256)
    assert (lab.store.root / key).read_bytes() == data
    assert [o.key for o in blob.objects] == [key, recipe_key("public", blob.entry.recipe)]
    assert {at.object_key for at in blob.locations} == ({key} if size else set())
    assert blob.new_bytes == size


def test_a_file_published_again_writes_nothing(lab: Lab) -> None:
    data = seeded(9 * MIB, 1)
    lab.put("a.bin", data)
    before = stored_bytes(lab.store)
    again = lab.put("other/name.bin", data)
    assert (again.new_bytes, again.deduplicated_bytes, again.objects) == (0, len(data), ())
    assert stored_bytes(lab.store) == before


def test_an_empty_file_published_again_writes_nothing(lab: Lab) -> None:
    lab.put("a.txt", b"")
    assert lab.put("b.txt", b"").objects == ()


def test_an_expected_blob_that_is_known_needs_no_room_at_all(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    data = seeded(9 * MIB, 1)
    digest = lab.put("a.bin", data).entry.sha256
    monkeypatch.setattr("registry.ingest.writer.StagedFile", None)
    assert lab.put("a.bin", data, expect_sha256=digest).objects == ()


def test_a_partly_known_file_stores_only_its_new_chunks_in_packs(lab: Lab) -> None:
    base = seeded(24 * MIB, 1)
    lab.put("base.bin", base)
    changed = base[: 8 * MIB] + seeded(4 * MIB, 2) + base[12 * MIB :] + seeded(5 * MIB, 3)
    blob = lab.put("tuned.bin", changed)
    assert (blob.new_bytes, blob.deduplicated_bytes) == (9 * MIB, 20 * MIB)
    kinds = [o.key.split("/")[1] for o in blob.objects]
    assert kinds == ["packs", "recipes"]
    assert not (lab.store.root / blob_key("public", blob.entry.sha256)).exists()


def test_packs_take_no_chunk_once_they_are_full(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack.TARGET == 64 * MIB
    monkeypatch.setattr(pack, "TARGET", 10 * MIB)
    base = seeded(8 * MIB, 1)
    lab.put("base.bin", base)
    new = seeded(20 * MIB, 2)
    blob = lab.put("tuned.bin", base + new)
    overhead = pack.HEAD_SIZE + pack.TRAILER_SIZE
    sizes = [o.size for o in blob.objects if "/packs/" in o.key]
    assert sizes == [overhead + n * (4 * MIB + pack.ENTRY_SIZE) for n in (3, 2)]
    assert blob.new_bytes == len(new)


def test_known_chunks_late_in_a_file_move_what_was_written_raw_into_packs(lab: Lab) -> None:
    tail = seeded(8 * MIB, 1)
    lab.put("base.bin", tail)
    blob = lab.put("tuned.bin", seeded(20 * MIB, 2) + tail)
    assert (blob.new_bytes, blob.deduplicated_bytes) == (20 * MIB, 8 * MIB)
    assert not (lab.store.root / blob_key("public", blob.entry.sha256)).exists()


def test_a_file_of_which_one_64th_is_known_stays_one_object(lab: Lab) -> None:
    """Tensors of 1 MiB are chunks: one known among 64 is fine, two are too many."""
    known = [seeded(MIB, i) for i in (1, 2)]
    lab.put("base.safetensors", safetensors({"a": known[0], "b": known[1]}))
    tensors = {f"t{i}": seeded(MIB, 10 + i) for i in range(64)}
    data = safetensors({**tensors, "t40": known[0]})
    blob = lab.put("one.safetensors", data)
    assert {o.key.split("/")[1] for o in blob.objects} == {"blobs", "recipes"}
    assert blob.new_bytes == len(data)
    other = {f"t{i}": seeded(MIB, 100 + i) for i in range(64)}
    data = safetensors({**other, "t40": known[0], "t50": known[1]}, header="another")
    blob = lab.put("two.safetensors", data)
    assert {o.key.split("/")[1] for o in blob.objects} == {"packs", "recipes"}
    assert blob.new_bytes == len(data) - 2 * MIB


def test_repeated_chunks_are_stored_once(lab: Lab) -> None:
    blob = lab.put("zeros.bin", bytes(28 * MIB))
    assert (blob.new_bytes, blob.deduplicated_bytes) == (4 * MIB, 24 * MIB)
    assert stored_bytes(lab.store) < 5 * MIB


def test_what_an_earlier_version_stored_stays_as_it_was_cut(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before large files were cut finer at their edges: the same file is known, and another shares all but the edges,
    which are stored once."""
    data = seeded(LARGE + 100_000, 1)
    with monkeypatch.context() as earlier:
        earlier.setattr("heliosfs.store.chunking.LARGE", 1 << 63)
        first = lab.put("model.gguf", data)
        assert len(first.recipe) == LARGE // MAX_CHUNK + 1
    before = stored_bytes(lab.store)
    again = lab.put("model.gguf", data)
    assert (again.entry.recipe, again.objects, again.new_bytes) == (first.entry.recipe, (), 0)
    assert lab.put("copy.gguf", data, expect_sha256=again.entry.sha256).objects == ()
    assert stored_bytes(lab.store) == before
    middle = 4 * MAX_CHUNK
    blob = lab.put("tuned.gguf", data[:middle] + seeded(MAX_CHUNK, 2) + data[middle + MAX_CHUNK :])
    assert blob.new_bytes == 2 * MAX_CHUNK, "the changed chunk and the first; the last is too short to be cut"
    other = lab.put("other.gguf", data[:middle] + seeded(MAX_CHUNK, 3) + data[middle + MAX_CHUNK :])
    assert other.new_bytes == MAX_CHUNK


def test_a_recipe_of_a_known_blob_that_is_damaged_is_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    data = seeded(LARGE, 1)
    with monkeypatch.context() as earlier:
        earlier.setattr("heliosfs.store.chunking.LARGE", 1 << 63)
        digest = lab.put("a.bin", data).entry.recipe
    path = lab.store.root / recipe_key("public", digest)
    record = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(record[:-1] + b"?")
    with pytest.raises(IntegrityError, match=digest):
        lab.ingest.ingest("a.bin", len(data), Bytes(data))
    path.write_bytes(record)


def test_a_gguf_file_with_other_metadata_shares_its_tensors(lab: Lab, tmp_path: Path) -> None:
    """A longer chat template moves every tensor; a wrong head makes it a plain file, not an error."""
    sizes = {f"blk.{n}.weight": 5 * MIB + 64 for n in range(6)}
    one = gguf_file(tmp_path / "one.gguf", sizes, template="short")
    two = gguf_file(tmp_path / "two.gguf", sizes, template="x" * 100_000)
    lab.put("one.gguf", one)
    blob = lab.put("two.gguf", two)
    assert blob.new_bytes == blob.recipe.span(0)[1] < 200_000
    broken = one[:16] + b"\xff" * 8 + one[24:]
    plain = lab.put("broken.gguf", broken)
    assert plain.recipe.span(0)[1] != lab.put("one.gguf", one).recipe.span(0)[1]


def test_a_fine_tune_costs_what_it_changes(lab: Lab) -> None:
    """Tensors of 6 MiB, norms of 8 KiB; three tensors and the metadata change: so does the header's length."""
    base = {}
    for layer in range(8):
        base[f"layers.{layer}.norm"] = seeded(8192, 100 + layer)
        base[f"layers.{layer}.weight"] = seeded(6 * MIB + 24, 200 + layer)
    one = safetensors(base, format="pt")
    tuned = {**base, **{f"layers.{i}.weight": seeded(6 * MIB + 24, 300 + i) for i in (1, 4)}}
    tuned["layers.5.norm"] = seeded(8192, 400)
    two = safetensors(tuned, format="pt", base_model="org/base", note="longer than before")
    lab.put("model.safetensors", one)
    before = stored_bytes(lab.store)
    blob = lab.put("model.safetensors", two)
    header = blob.recipe.span(0)[1]
    assert blob.new_bytes == 2 * (6 * MIB + 24) + 8192 + header
    growth = stored_bytes(lab.store) - before
    assert blob.new_bytes < growth < blob.new_bytes + 4096
    print(f"fine-tune of {len(two)} bytes: {blob.new_bytes} new, store grew by {growth}")


def test_chunks_do_not_depend_on_the_name(lab: Lab) -> None:
    """A safetensors file is cut by its tensors even without the extension, as in a Hub cache."""
    data = safetensors({"a": seeded(5 * MIB, 1), "b": seeded(100, 2)})
    one = lab.put("model.safetensors", data)
    two = lab.put("blobs/0123abcd", data)
    assert two.entry.recipe == one.entry.recipe
    assert two.objects == ()


def test_what_only_looks_like_safetensors_is_cut_plainly(lab: Lab) -> None:
    data = (20).to_bytes(8, "little") + b"{" + seeded(5 * MIB, 1)
    assert [end for _, end in lab.put("data.bin", data).recipe.chunks()] == [4 * MIB, len(data) - 4 * MIB]


@pytest.mark.parametrize(
    ("path", "content", "lfs"),
    [
        ("config.json", b"{}", False),
        ("README.md", "é".encode() * 5000, False),
        ("README.md", b"a" + "é".encode() * 5000, False),
        ("LICENSE", b"", False),
        ("latin.txt", "é".encode("latin-1"), True),
        ("nul.txt", b"a\0b", True),
        ("late.txt", b"a" * 9000 + b"\0", False),
        ("model.safetensors", safetensors({"a": b"x"}), True),
        ("tokenizer.MODEL", b"text", True),
        ("pytorch_model.bin", b"text", True),
        ("dir.bin/notes", b"text", False),
        ("big.json", b" " * (10 * MIB), True),
        ("nearly.json", b" " * (10 * MIB - 1), False),
    ],
)
def test_which_files_are_lfs(lab: Lab, path: str, content: bytes, lfs: bool) -> None:
    entry = lab.put(path, content).entry
    assert entry.lfs is lfs
    pointer = lfs_pointer(hashlib.sha256(content).hexdigest(), len(content))
    assert entry.git_oid == git_blob_oid(pointer if lfs else content)


def test_the_upstream_decides_about_lfs(lab: Lab) -> None:
    assert lab.put("config.json", b"{}", lfs=True).entry.lfs is True
    entry = lab.put("model.bin", b"abc", lfs=False).entry
    assert (entry.lfs, entry.git_oid) == (False, git_blob_oid(b"abc"))


def test_expected_hashes(lab: Lab) -> None:
    digest, oid = hashlib.sha256(b"{}").hexdigest(), git_blob_oid(b"{}")
    assert lab.put("a.json", b"{}", expect_git_oid=oid).entry.git_oid == oid
    odd_pointer = "0" * 40
    entry = lab.put("b.bin", b"{}", lfs=True, expect_sha256=digest, expect_git_oid=odd_pointer).entry
    assert entry.git_oid == odd_pointer


@pytest.mark.parametrize("size", [100, 9 * MIB])
@pytest.mark.parametrize("expect", [{"expect_sha256": "0" * 64}, {"expect_git_oid": "0" * 40}])
def test_unexpected_content_is_refused_and_leaves_nothing(lab: Lab, size: int, expect: dict[str, str]) -> None:
    with pytest.raises(IntegrityError, match=r"dir/a\.txt: its .* was expected"):
        lab.put("dir/a.txt", b"x" * size, **expect)
    assert list(lab.store.list("")) == []
    assert lab.index.blobs == {}


def test_the_executable_bit_is_kept(lab: Lab) -> None:
    assert lab.put("run.sh", b"#!/bin/sh\n", executable=True).entry.executable is True
    assert lab.put("run.sh", b"#!/bin/sh\n").entry.executable is False


@pytest.mark.parametrize("size", [10, 9 * MIB])
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_source_of_another_size_is_refused(lab: Lab, size: int, difference: int) -> None:
    data = seeded(size + difference, 1)
    message = "more than the" if difference > 0 else f"ended after {size - 1} of {size} bytes"
    with pytest.raises(InvalidInput, match=rf"^dir/a\.bin: {message}"):
        lab.ingest.ingest("dir/a.bin", size, Bytes(data))
    assert list(lab.store.list("")) == []


@pytest.mark.parametrize("size", [-1, 1 << 63, (1 << 63) - 1, MAX_BLOB + 1])
def test_impossible_sizes_are_refused(lab: Lab, size: int) -> None:
    """Before a list of so many chunks is made, which no memory holds."""
    with pytest.raises(InvalidInput, match="can't have"):
        lab.ingest.ingest("a.bin", size, Bytes(b"enough to be looked at"))


GOOD = safetensors({"a": seeded(2 * MIB, 1), "b": seeded(3 * MIB, 2)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD[:4], "no header; it is truncated"),
        (GOOD[:40], "header of [0-9]+ bytes is truncated"),
        (GOOD[:-1], "its tensors end at byte"),
        (GOOD + b"x", "its tensors end at byte"),
        (b"\xff" * 100, "claims"),
        (GOOD.replace(b"[2097152, 5242880]", b"[2097151, 5242880]"), "tensor 'b' has 3145729 bytes"),
        (safetensors({"a": b"x", "b": b"y"}).replace(b"[1, 2]", b"[0, 1]"), "tensor 'b' overlaps"),
        (b"", "no header"),
    ],
)
def test_a_malformed_safetensors_file_is_refused_with_its_name(lab: Lab, data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^sub/model\.safetensors: .*{message}"):
        lab.ingest.ingest("sub/model.safetensors", len(data), Bytes(data))
    assert list(lab.store.list("")) == []


def test_a_body_that_ends_inside_the_header(lab: Lab) -> None:
    with pytest.raises(InvalidInput, match=r"^m\.safetensors: ended after 30 of"):
        lab.ingest.ingest("m.safetensors", len(GOOD), Bytes(GOOD[:30]))


def test_a_header_longer_than_a_chunk(lab: Lab) -> None:
    tensors = {f"{'long' * 1000}{i}": b"" for i in range(1100)}
    data = safetensors({**tensors, "w": seeded(MIB, 1)})
    header = int.from_bytes(data[:8], "little") + 8
    assert header > MAX_CHUNK
    blob = lab.put("model.safetensors", data)
    assert [length for _, length in blob.recipe.chunks()] == [MAX_CHUNK, header - MAX_CHUNK, MIB]


def test_domains_share_nothing(lab: Lab) -> None:
    data = seeded(9 * MIB, 1)
    lab.put("a.bin", data)
    tenant = Ingest(lab.store, lab.index, "tenant-1")
    blob = tenant.ingest("a.bin", len(data), Bytes(data))
    assert blob.new_bytes == len(data)
    assert all(o.key.startswith("tenant-1/") for o in blob.objects)
    assert all(at.object_key.startswith("tenant-1/") for at in blob.locations)
    with pytest.raises(InvalidInput):
        Ingest(lab.store, lab.index, "../public")


def test_the_index_is_asked_in_batches(lab: Lab) -> None:
    norms = {f"t{i}": seeded(MIB, 10 + i) for i in range(130)}
    lab.put("a.safetensors", safetensors(norms))
    assert lab.index.calls <= 9  # of 1, 1, 2, 4... 64 chunks


def test_metrics_count_what_was_stored(lab: Lab) -> None:
    lab.put("a.bin", seeded(5 * MIB, 1))
    lab.put("b.bin", seeded(5 * MIB, 1))
    for result in ("new", "deduplicated"):
        value = lab.metrics.registry.get_sample_value("helios_registry_ingested_bytes_total", {"result": result})
        assert value == 5 * MIB


def test_many_at_once(lab: Lab) -> None:
    """More ingests than slabs, some of them of the same content."""
    contents = [seeded(5 * MIB + i % 7, i % 7) for i in range(24)]
    blobs: list[IngestedBlob | BaseException] = []

    def put(data: bytes) -> None:
        try:
            blobs.append(lab.ingest.ingest("a.bin", len(data), Bytes(data, most=100_000)))
        except BaseException as error:
            blobs.append(error)

    threads = [threading.Thread(target=put, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b for b in blobs if isinstance(b, BaseException)] == []
    assert len(lab.index.blobs) == 7
    for data in contents[:7]:
        lab.check(data, lab.index.blobs["public", hashlib.sha256(data).hexdigest()])


def test_file_sources(tmp_path: Path, lab: Lab) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(seeded(5 * MIB, 1))
    with FileSource(path) as source:
        assert source.size == 5 * MIB
        blob = lab.ingest.ingest("a.bin", source.size, source)
    lab.check(path.read_bytes(), blob)


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
def test_what_is_no_file_is_no_source(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InvalidInput, match=str(path)):
        FileSource(path)
