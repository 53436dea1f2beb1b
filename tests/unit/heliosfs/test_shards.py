"""Which weight files follow another one, and in which order."""

from __future__ import annotations

import json

import pytest

from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from heliosfs.tree.shards import MAX_NAMES, following, indexes, read_index
from heliosfs.tree.snapshot import Snapshot

SET = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
PARTS = ["a.safetensors", "b10.safetensors", "b9.safetensors"]


def model(*paths: str) -> Snapshot:
    entry = FileEntry("a" * 64, 10, "b" * 40, "c" * 64)
    return Snapshot(RepoId.parse("o/m"), "d" * 40, 0, dict.fromkeys(paths, entry))


def index(*files: str) -> frozenset[str]:
    return read_index(json.dumps({"metadata": {}, "weight_map": {f"t{n}": f for n, f in enumerate(files)}}).encode())


def test_the_other_shards_of_a_set_follow_in_loading_order() -> None:
    snapshot = model(*SET, "pytorch_model-00001-of-00003.bin", "sub/model-00001-of-00003.safetensors", "a.json")
    assert following(snapshot, SET[1]) == [SET[2], SET[0]]
    assert following(snapshot, "sub/model-00001-of-00003.safetensors") == []
    assert following(model("consolidated.00.pth", "consolidated.01.pth"), "consolidated.00.pth") == [
        "consolidated.01.pth"
    ]


def test_alternatives_are_not_shards() -> None:
    names = ["m-Q4_0.gguf", "m-Q8_0.gguf", "model.safetensors", "model-00001-of-00001.safetensors", "a-00001-of-2.json"]
    assert [following(model(*names), name) for name in names] == [[]] * len(names)
    names = ["config.json", "model.safetensors", "model.fp16.safetensors", "model.fp16.bin"]
    assert [following(model(*names), name) for name in names] == [[]] * len(names)
    assert following(model("sd_1.safetensors", "sd_2.safetensors"), "sd_1.safetensors") == []


def test_what_an_index_names_follows_in_the_order_of_the_names() -> None:
    """As vLLM takes them: numbers by value, whatever the order in the index; nothing else, and nothing that is gone."""
    snapshot = model(*PARTS, "other.safetensors", "config.json", "sub/a.safetensors")
    named = [index("b10.safetensors", "gone.safetensors", "a.safetensors", "b9.safetensors", "config.json")]
    assert following(snapshot, "a.safetensors", named) == ["b9.safetensors", "b10.safetensors"]
    assert following(snapshot, "b9.safetensors", named) == ["b10.safetensors", "a.safetensors"]
    assert following(snapshot, "other.safetensors", named) == []
    assert following(snapshot, "sub/a.safetensors", named) == []


def test_an_index_joins_a_set_and_what_has_no_number() -> None:
    snapshot = model(*SET, "mtp.safetensors", "consolidated.safetensors", "config.json")
    named = [index("mtp.safetensors", *SET)]
    assert following(snapshot, SET[0], named) == [*SET[1:], "mtp.safetensors"]
    assert following(snapshot, "mtp.safetensors", named) == SET
    assert following(snapshot, "consolidated.safetensors", named) == []
    assert following(snapshot, SET[0], [index("mtp.safetensors")]) == SET[1:], "their numbers say it, too"


def test_parts_in_a_models_directory_follow_where_no_index_is() -> None:
    """Loaders take every safetensors file of a directory with a config.json; a variant has parts of its own."""
    paths = ["unet/config.json", "unet/a.safetensors", "unet/b.safetensors", "unet/a.fp16.safetensors"]
    snapshot = model(*paths, "unet/b.fp16.safetensors", "vae/config.json", "vae/a.safetensors", "top.safetensors")
    assert following(snapshot, "unet/a.safetensors") == ["unet/b.safetensors"]
    assert following(snapshot, "unet/b.fp16.safetensors") == ["unet/a.fp16.safetensors"]
    assert following(snapshot, "vae/a.safetensors") == []
    assert following(snapshot, "unet/a.safetensors", [frozenset()]) == [], "there is an index, and it makes no sense"


def test_indexes_are_found_beside_the_file() -> None:
    names = ["model.safetensors.index.json", "consolidated.safetensors.index.json", "m.safetensors.index.fp16.json"]
    snapshot = model(
        *names, "unet/d.safetensors.index.json", "unet/a.safetensors", "a.safetensors", "a.bin", "index.json"
    )
    assert sorted(indexes(snapshot, "a.safetensors")) == sorted(names)
    assert indexes(snapshot, "unet/a.safetensors") == ["unet/d.safetensors.index.json"]
    assert indexes(snapshot, "a.bin") == []
    assert indexes(model("a.safetensors", "b.safetensors.index.json/file"), "a.safetensors") == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"t": 1}}',
        b'{"weight_map": {"t": null}}',
        b'{"weight_map": "a.safetensors"}',
        b'{"weight_map": {"t": "\xff"}}',
        b'{"weight_map": {"t": "a.safetensors"}} x',
        b'{"x": ' + b"[" * 100_000,
        json.dumps({"weight_map": {"t": "a" * 300}}).encode(),
        json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(MAX_NAMES + 1)}}).encode(),
    ],
)
def test_an_index_that_makes_no_sense_names_nothing(data: bytes) -> None:
    assert read_index(data) == frozenset()
