"""Golden files: what was written once is read for ever, and what is written today is the same, byte for byte."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from helios.errors import IntegrityError
from helios.names import RepoId
from heliosfs.store import codec, keys, pack
from heliosfs.store.content import CommitContent
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.front import lines, missed, waiting
from heliosfs.store.manifest import CommitRecord, Manifest, git_blob_oid, local_commit
from heliosfs.store.placement import PlacedBlob, Placement
from heliosfs.store.recipe import Recipe
from registry.ingest import Ingest
from tests.golden.make import encoded_chunks, example, front_lines, missed_lines
from tests.support.ingest import MemoryIndex

GOLDEN = Path(__file__).parents[2] / "golden/v1"
FORMAT = (Path(__file__).parents[3] / "docs/format.md").read_text()


@pytest.fixture(scope="module")
def expected() -> Any:
    return json.loads((GOLDEN / "expected.json").read_bytes())


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def golden_2(name: str) -> bytes:
    return (GOLDEN.parent / "v2" / name).read_bytes()


@pytest.mark.parametrize("name", ["tensors", "plain", "empty"])
def test_recipes(expected: Any, name: str) -> None:
    want = expected["recipes"][name]
    recipe = Recipe.decode(golden(f"{name}.recipe"), want["digest"])
    assert (recipe.blob, recipe.size) == (want["blob"], want["size"])
    assert [{"id": id_.hex(), "length": length} for id_, length in recipe.chunks()] == want["chunks"]
    assert Recipe.build(recipe.blob, recipe.chunks()).encode() == golden(f"{name}.recipe")


def test_a_journal_of_a_front_store() -> None:
    data = golden("front.waiting")
    *_, record = [key for op, key in front_lines() if op == "="]
    found = waiting.parse(data)
    assert {key.split("/")[1]: op.value for key, op in found.items()} == {"blobs": "+", "commits": "=", "recipes": "-"}
    assert found[record] is waiting.Op.REPLACE
    assert waiting.HEAD + b"".join(lines.encode(*line) for line in front_lines()) + b"0123" == data


def test_a_list_of_what_a_front_store_missed() -> None:
    data, id_ = golden("front.missed"), "0123456789abcdef" * 2
    found = missed.parse(data, id_)
    assert {key.split("/")[1]: sure for key, sure in found.items()} == {"blobs": True, "packs": False}
    assert missed.head(id_) + b"".join(lines.encode(*line) for line in missed_lines()) + b"0123" == data


def test_the_example_is_cut_into_the_golden_recipe(tmp_path: Path, expected: Any) -> None:
    """The worked example of docs/format.md, by the real ingest."""
    data = example()
    assert hashlib.sha256(data).hexdigest() == expected["recipes"]["tensors"]["blob"]
    with DirectoryStore(tmp_path) as store:
        blob = Ingest(store, MemoryIndex()).ingest("model.safetensors", len(data), io.BytesIO(data))
    assert blob.record == golden("tensors.recipe")
    assert blob.entry == Manifest.decode(golden("manifest")).files["model.safetensors"]


def test_the_manifest(expected: Any) -> None:
    manifest = Manifest.decode(golden("manifest"), expected["manifest"])
    assert list(manifest.files) == ["config.json", "läs mig.txt", "model.safetensors", "tools/convert.sh"]
    config = manifest.files["config.json"]
    assert config.git_oid == git_blob_oid(b'{"model_type": "llama"}\n')
    assert (config.size, config.lfs, config.executable) == (24, False, False)
    assert config.recipe == expected["recipes"]["plain"]["digest"]
    assert manifest.files["model.safetensors"].lfs is True
    assert manifest.files["tools/convert.sh"].executable is True
    assert manifest.encode() == golden("manifest")
    assert manifest.digest == expected["manifest"]
    assert local_commit(RepoId.parse("org/name"), manifest.digest) == expected["commit"]


def test_commit_records(expected: Any) -> None:
    first, second = CommitRecord.decode(golden("first.commit")), CommitRecord.decode(golden("second.commit"))
    assert first == CommitRecord(
        "models/org/name", expected["commit"], expected["manifest"], "Ada <ada@example.org>", 1_750_000_000
    )
    assert second.message == 'Two "lines"\nof message'
    assert (second.author, second.parent, second.time) == ("Zoë", expected["commit"], 1_750_000_001)
    assert second.lineage == {"upstream": "https://huggingface.co"}
    assert (first.encode(), second.encode()) == (golden("first.commit"), golden("second.commit"))


def test_the_pack(expected: Any) -> None:
    data = golden("two-chunks.pack")
    trailer = data[-pack.TRAILER_SIZE :]
    offset, length = pack.index_span(trailer, len(data))
    entries = pack.parse(data[: pack.HEAD_SIZE], data[offset : offset + length], trailer, len(data))
    for entry, want in zip(entries, expected["pack"], strict=True):
        content = data[entry.offset : entry.offset + entry.length]
        assert content.decode() == want["content"]
        assert blake3(content).digest() == entry.id == bytes.fromhex(want["id"])
    assert pack.head() + b"the first chunkthe second" + pack.tail(entries) == data


def test_the_placement(expected: Any) -> None:
    placement = Placement.decode(golden("placement.json"))
    placed = PlacedBlob(Recipe.decode(golden("tensors.recipe")), placement)
    places = [placed.locate(i) for i in range(5)]
    found = [(at.object_key, at.offset, at.length) for at in places]
    assert all((at.encoded_length, at.codec, at.key) == (at.length, "none", None) for at in places)
    blob, packed = expected["keys"]["blob"], expected["keys"]["pack"]
    assert found == [
        (blob, 0, 304),
        (blob, 304, 3_145_728),
        (packed, 4096, 16_384),
        (blob, 3_162_416, 4_194_304),
        (blob, 7_356_720, 2_097_152),
    ]
    assert (placement.version, placement.lease_s) == (3, 300)
    assert Placement.decode(placement.encode()) == placement


def test_the_encoded_pack(expected: Any) -> None:
    """Each codec, as zstd 1.5.7 wrote it."""
    data = golden_2("encoded.pack")
    trailer = data[-pack.TRAILER_SIZE :]
    offset, length = pack.index_span(trailer, len(data))
    entries = pack.parse(data[: pack.HEAD_SIZE], data[offset : offset + length], trailer, len(data))
    assert [entry.codec for entry in entries] == ["none", "zstd", "planes2-zstd", "planes4-zstd"]
    for entry, want in zip(entries, encoded_chunks(), strict=True):
        stored = memoryview(data)[entry.offset : entry.offset + entry.encoded_length]
        assert codec.decode(entry.codec, stored, entry.length) == want
        assert blake3(want).digest() == entry.id
    assert pack.head(encoded=True) + data[pack.HEAD_SIZE : offset] + pack.tail(entries) == data


def test_the_encoded_placement() -> None:
    placement = Placement.decode(golden_2("encoded-placement.json"))
    placed = PlacedBlob(Recipe.decode(golden_2("encoded.recipe")), placement)
    data = golden_2("encoded.pack")
    for index, want in enumerate(encoded_chunks()):
        at = placed.locate(index)
        stored = memoryview(data)[at.offset : at.offset + at.encoded_length]
        assert codec.decode(at.codec, stored, at.length) == want
    assert Placement.decode(placement.encode()) == placement


def test_the_content_of_a_commit(expected: Any) -> None:
    content = CommitContent.decode(golden("content.json"))
    (blob,) = content.blobs
    assert blob.recipe == golden("tensors.recipe")
    assert blob.digest == expected["recipes"]["tensors"]["digest"]
    assert blob.placement == Placement.decode(golden("placement.json"))
    assert CommitContent.decode(content.encode()) == content
    assert CommitContent.decode(b'{"blobs": [], "later": 1}').blobs == []
    for bad in (b'{"blobs": [], "format": 2}', b"{}", b"[]", b'{"blobs": [{"recipe": "?"}]}', b"\xff"):
        with pytest.raises(IntegrityError):
            CommitContent.decode(bad)


def test_object_keys(expected: Any) -> None:
    blob, recipe = expected["recipes"]["tensors"]["blob"], expected["recipes"]["tensors"]["digest"]
    dataset_commit = "0123456789abcdef0123456789abcdef01234567"
    assert expected["keys"] == {
        "blob": keys.blob_key("public", blob),
        "pack": keys.pack_key("public", "00112233445566778899aabbccddeeff"),
        "recipe": keys.recipe_key("public", recipe),
        "manifest": keys.manifest_key("public", expected["manifest"]),
        "commit": keys.commit_key("public", RepoId.parse("org/name"), expected["commit"]),
        "commit of a dataset": keys.commit_key("public", RepoId.parse("squad", "datasets"), dataset_commit),
    }


def test_the_document_shows_the_golden_files(expected: Any) -> None:
    """docs/format.md names every golden file, and its examples are what is in them."""
    names = {path.name for path in GOLDEN.iterdir()} - {"expected.json"}
    assert set(re.findall(r"`v1/([^`]+)`", FORMAT)) == names
    flat = re.sub(r"\s", "", FORMAT)
    assert golden("plain.recipe").hex() in flat
    assert expected["commit"] in FORMAT
    for chunk in expected["recipes"]["tensors"]["chunks"]:
        assert f"`{chunk['id'][:16]}`" in FORMAT
        assert f"{chunk['length']:,}" in FORMAT
