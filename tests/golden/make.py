"""Makes the golden files beside it. Run by hand, and only to ADD files for a new version of a format.

Existing files are never rewritten: they say what was written once and must be readable for ever. Their content is small
and follows from this script alone; docs/format.md explains it byte for byte. `metadata.db` is the exception: the first
registry wrote it, before its tables had migrations (tests/unit/registry/test_migrations.py), `repeats.xet` is what
hf-xet 1.8.0 made (tests/unit/xet/test_cutter.py), and registries wrote the bundles
(tests/unit/registry_transfer/test_bundle.py).

    python tests/golden/make.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
from blake3 import blake3

from helios.names import RepoId
from heliosfs.store import codec, pack, sealing
from heliosfs.store.content import BlobContent, CommitContent
from heliosfs.store.front import lines, missed, waiting
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


def front_lines() -> list[tuple[str, str]]:
    """What a front store's journal says; its last line is torn."""
    blob, pack_ = blob_key("public", "ab" * 32), pack_key("public", "cd" * 16)
    record, recipe = commit_key("public", RepoId.parse("org/name"), "1" * 40), recipe_key("public", "ef" * 32)
    return [("+", blob), ("+", pack_), ("-", record), (".", pack_), ("=", record), ("-", recipe)]


def missed_lines() -> list[tuple[str, str]]:
    """What the list of what a front store missed says; its last line is torn."""
    blob, pack_ = blob_key("public", "ab" * 32), pack_key("public", "cd" * 16)
    return [("?", blob), ("!", blob), ("?", pack_)]


def encoded_chunks() -> list[bytes]:
    """What the chunks of `v2/encoded.pack` are, which lie there in each of the codecs, in the order of their numbers.

    The numbers have an exponent of few values and a mantissa that looks random, as weights do. The last two chunks are
    no whole number of elements.
    """
    noise = hashlib.shake_256(b"golden").digest(6000)
    text = b'{"model.layers.%d": "model-00001-of-00002.safetensors"}'
    bf16 = b"".join(bytes([n, 0x3C + n % 2]) for n in noise[:2000]) + b"\x01"
    f32 = b"".join(noise[3 * n : 3 * n + 3] + bytes([0xBC + n % 2]) for n in range(1000)) + b"\x01\x02\x03"
    return [noise[:100], b"\n".join(text % n for n in range(30)), bf16, f32]


def encoded_files() -> dict[str, bytes]:
    """The golden files of version 2 of packs. Other versions of zstd write other frames: none is made twice."""
    chunks, at = encoded_chunks(), pack_key("public", "ffeeddccbbaa99887766554433221100")
    packed, entries, places = bytearray(pack.head(encoded=True)), [], []
    for name, chunk in zip(codec.CODECS, chunks, strict=True):
        data = codec.encode(name, chunk) or chunk
        entries.append(pack.PackEntry(blake3(chunk).digest(), len(packed), len(chunk), len(data), name))
        places.append(ChunkLocation(at, len(packed), len(chunk), len(data), name))
        packed += data
    packed += pack.tail(entries)
    recipe = recipe_of(b"".join(chunks), [len(chunk) for chunk in chunks])
    placement = Placement.build(recipe, places, 2, 300, lambda key: (f"/api/v1/objects/{key}", len(packed)))
    return {
        "v2/encoded.pack": bytes(packed),
        "v2/encoded.recipe": recipe.encode(),
        "v2/encoded-placement.json": placement.encode(),
    }


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
    pinned = msgspec.structs.replace(volume, priority="pinned")
    return {
        "v2/pvc-1.volume": pinned.encode(),
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
        "v1/front.waiting": waiting.HEAD + b"".join(lines.encode(*line) for line in front_lines()) + b"0123",
        "v1/front.missed": missed.head("0123456789abcdef" * 2)
        + b"".join(lines.encode(*line) for line in missed_lines())
        + b"0123",
        "v1/expected.json": json.dumps(expected, indent=1, ensure_ascii=False).encode() + b"\n",
    }


def sealed_files() -> dict[str, bytes]:
    """`v1/two-chunks.pack` as an encrypted domain has it, under the key 00 01 … 1f; its key there, and the key's id."""
    key, at = sealing.DomainKey(bytes(range(32))), pack_key("acme", "00112233445566778899aabbccddeeff")
    content = files()["v1/two-chunks.pack"]
    head = key.head(at, blake3(content).digest())
    sealed = head + sealing.seal_block(key.opened(at, head), 0, content, last=True)
    return {
        "v1/sealed.pack": sealed + blake3(sealed).digest(),
        "v1/sealed.name": key.seal_key(at).encode() + b"\n",
        "v1/sealed.key-id": key.id.encode() + b"\n",
    }


if __name__ == "__main__":
    for name, data in (files() | encoded_files() | sealed_files()).items():
        path = HERE / name
        if path.exists():
            print(f"{name}: {'unchanged' if path.read_bytes() == data else 'DIFFERS, kept as it is'}")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            print(f"{name}: written, {len(data)} bytes")
