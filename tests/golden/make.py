"""Makes the golden files beside it. Run by hand, and only to ADD files for a new version of a format.

Existing files are never rewritten: they say what was written once and must be readable for ever. Their content is small
and follows from this script alone; docs/format.md explains it byte for byte. `metadata.db` is the exception: the first
registry wrote it, before its tables had migrations (tests/unit/registry/test_migrations.py), and `repeats.xet` is what
hf-xet 1.8.0 made (tests/unit/xet/test_cutter.py).

    python tests/golden/make.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from blake3 import blake3

from helios.names import RepoId
from heliosfs.store import pack
from heliosfs.store.content import BlobContent, CommitContent
from heliosfs.store.keys import blob_key, commit_key, manifest_key, pack_key, recipe_key
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest, git_blob_oid, lfs_pointer, local_commit
from heliosfs.store.placement import ChunkLocation, Placement
from heliosfs.store.recipe import Recipe
from heliosfs.tiers.sums import Sums, Tally
from heliosfs.volumes.record import VolumeRecord, frozen_refs

HERE = Path(__file__).parent
MIB = 1 << 20
EXAMPLE_HEADER = (
    b'{"a":{"dtype":"BF16","shape":[1024,1536],"data_offsets":[0,3145728]},'
    b'"a_norm":{"dtype":"BF16","shape":[4096],"data_offsets":[3145728,3153920]},'
    b'"b_norm":{"dtype":"BF16","shape":[4096],"data_offsets":[3153920,3162112]},'
    b'"b":{"dtype":"BF16","shape":[2048,1536],"data_offsets":[3162112,9453568]}}'
)


def example() -> bytes:
    """The worked example of docs/format.md: tensor number n (from 1) is filled with the byte n."""
    header = EXAMPLE_HEADER + b" " * (-len(EXAMPLE_HEADER) % 8)
    tensors = [(1, 3 * MIB), (2, 8192), (3, 8192), (4, 6 * MIB)]
    return len(header).to_bytes(8, "little") + header + b"".join(bytes([fill]) * size for fill, size in tensors)


def recipe_of(data: bytes, lengths: list[int]) -> Recipe:
    chunks = []
    start = 0
    for length in lengths:
        chunks.append((blake3(data[start : start + length]).digest(), length))
        start += length
    assert start == len(data)
    return Recipe.build(hashlib.sha256(data).hexdigest(), chunks)


def files() -> dict[str, bytes]:
    """Every golden file of version 1."""
    weights, config = example(), b'{"model_type": "llama"}\n'
    head = weights.index(b"\x01" * 8)
    tensors = recipe_of(weights, [head, 3 * MIB, 2 * 8192, 4 * MIB, 2 * MIB])
    plain = recipe_of(config, [len(config)])
    empty = recipe_of(b"", [])
    manifest = Manifest(
        {
            "model.safetensors": FileEntry(
                tensors.blob,
                len(weights),
                git_blob_oid(lfs_pointer(tensors.blob, len(weights))),
                tensors.digest,
                lfs=True,
            ),
            "config.json": FileEntry(plain.blob, len(config), git_blob_oid(config), plain.digest),
            "tools/convert.sh": FileEntry(empty.blob, 0, git_blob_oid(b""), empty.digest, executable=True),
            "läs mig.txt": FileEntry(empty.blob, 0, git_blob_oid(b""), empty.digest),
        }
    )
    repo = RepoId.parse("org/name")
    commit = local_commit(repo, manifest.digest)
    first = CommitRecord(str(repo), commit, manifest.digest, "Ada <ada@example.org>", 1_750_000_000)
    second = CommitRecord(
        "datasets/squad", "0123456789abcdef0123456789abcdef01234567", manifest.digest, "Zoë", 1_750_000_001,
        'Two "lines"\nof message', commit, {"upstream": "https://huggingface.co"},
    )  # fmt: skip
    chunks = [b"the first chunk", b"the second"]
    entries = []
    packed = bytearray(pack.head())
    for chunk in chunks:
        entries.append(pack.PackEntry(blake3(chunk).digest(), len(packed), len(chunk), len(chunk)))
        packed += chunk
    packed += pack.tail(entries)
    pack_at = pack_key("public", "00112233445566778899aabbccddeeff")
    whole = blob_key("public", tensors.blob)
    places = [ChunkLocation(whole, tensors.span(i)[0], n, n) for i, (_, n) in enumerate(tensors.chunks())]
    places[2] = ChunkLocation(pack_at, 4096, 16384, 16384)
    sizes = {whole: len(weights), pack_at: 67_109_712}
    placement = Placement.build(tensors, places, 3, 300, lambda key: (f"/api/v1/objects/{key}", sizes[key]))
    tally = Tally(tensors)
    for index in range(len(tensors)):
        start, end = tensors.span(index)
        tally.note(index, memoryview(weights)[start:end])
    volume = VolumeRecord(
        "pvc-1", str(repo), commit, "v1.0", manifest.digest, first.time, frozen_refs("v1.0", commit), 1_750_000_002
    )  # fmt: skip
    expected = {
        "commit": commit,
        "manifest": manifest.digest,
        "recipes": {
            name: {
                "digest": r.digest, "blob": r.blob, "size": r.size,
                "chunks": [{"id": i.hex(), "length": n} for i, n in r.chunks()],
            }
            for name, r in (("tensors", tensors), ("plain", plain), ("empty", empty))
        },
        "pack": [
            {"id": e.id.hex(), "offset": e.offset, "length": e.length, "content": c.decode()}
            for e, c in zip(entries, chunks, strict=True)
        ],
        "keys": {
            "blob": whole, "pack": pack_at, "recipe": recipe_key("public", tensors.digest),
            "manifest": manifest_key("public", manifest.digest), "commit": commit_key("public", repo, commit),
            "commit of a dataset": commit_key("public", RepoId.parse("squad", "datasets"), second.commit),
        },
    }  # fmt: skip
    return {
        "v1/tensors.recipe": tensors.encode(),
        "v1/plain.recipe": plain.encode(),
        "v1/empty.recipe": empty.encode(),
        "v1/manifest": manifest.encode(),
        "v1/first.commit": first.encode(),
        "v1/second.commit": second.encode(),
        "v1/two-chunks.pack": bytes(packed),
        "v1/placement.json": placement.encode(),
        "v1/content.json": CommitContent([BlobContent(tensors.encode(), placement)]).encode(),
        "v1/pvc-1.volume": volume.encode(),
        "v1/tensors.sums": tally.sums().encode(),
        "v1/plain-unknown.sums": Sums(plain).encode(),
        "v1/expected.json": json.dumps(expected, indent=1, ensure_ascii=False).encode() + b"\n",
    }


if __name__ == "__main__":
    for name, data in files().items():
        path = HERE / name
        if path.exists():
            print(f"{name}: {'unchanged' if path.read_bytes() == data else 'DIFFERS, kept as it is'}")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            print(f"{name}: written, {len(data)} bytes")
