"""Encrypted domains: what the engine keeps tells nothing, comes back whole, and is believed only if it is unchanged."""

from __future__ import annotations

import base64
import copy
import errno
import hmac
import itertools
import pickle
import random
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import hypothesis.strategies as st
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from helios.config import DomainSettings
from helios.errors import IntegrityError, InvalidInput, NoSpace, NotFound, UsageError
from helios.names import RepoId
from heliosfs.store import sealing
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keyring import seal_objects
from heliosfs.store.keys import blob_key, commit_key, pack_key
from heliosfs.store.objects import ObjectStore
from heliosfs.store.replicated import ReplicatedStore
from heliosfs.store.sealed import SealedStore
from heliosfs.store.sealing import BLOCK, DomainKey
from heliosfs.store.selfcheck import check_content
from tests.conftest import LogErrors
from tests.support.damage import flip
from tests.support.engines import read, staged

KEY, OTHER = DomainKey(bytes(range(32))), DomainKey(bytes(range(1, 33)))
BLOB = blob_key("acme", "ab" * 32)
GOLDEN = Path(__file__).parents[2] / "golden" / "v1"
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5, 65 * BLOCK + 1]


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def inner(tmp_path: Path) -> Iterator[DirectoryStore]:
    store = DirectoryStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def store(inner: DirectoryStore) -> SealedStore:
    return SealedStore(inner, {"acme": [KEY]})


def the_file(inner: DirectoryStore) -> Path:
    (info,) = inner.list("acme/")
    return inner.root / info.key


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["file", "bytes"])
def test_what_was_stored_comes_back(store: SealedStore, inner: DirectoryStore, size: int, way: str) -> None:
    data = noise(size)
    if way == "file":
        path = staged(store, data)
        store.put_file(BLOB, path)
        assert not path.exists()
    else:
        store.put_bytes(BLOB, data)
    assert store.info(BLOB).size == size
    assert read(store, BLOB) == data
    assert [(info.key, info.size) for info in store.list("acme/blobs/")] == [(BLOB, size)]
    assert the_file(inner).stat().st_size == sealing.sealed_size(size)
    assert sealing.plain_size(sealing.sealed_size(size)) == size
    assert [path for path in inner.staging().iterdir() if path.name != ".lock"] == []
    check_content(the_file(inner).relative_to(inner.root).as_posix(), the_file(inner))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_range(store: SealedStore, data: st.DataObject) -> None:
    content = noise(3 * BLOCK + 777)
    store.put_bytes(BLOB, content)
    low = data.draw(st.integers(0, len(content)))
    high = data.draw(st.integers(low, len(content)))
    buffer = bytearray(high - low)
    store.read_into(BLOB, low, memoryview(buffer))
    assert buffer == content[low:high]
    with pytest.raises(IntegrityError, match="ends at byte"):
        store.read_into(BLOB, low, memoryview(bytearray(len(content) - low + 1)))


def test_the_engine_sees_neither_contents_nor_names(store: SealedStore, inner: DirectoryStore) -> None:
    secret = b"a secret weight " * 10_000
    record = commit_key("acme", RepoId.parse("acme/hidden-name"), "1" * 40)
    store.put_file(BLOB, staged(store, secret))
    store.put_bytes(record, b"helios-commit 1\n{}")
    store.put_bytes("public/registry/owner", b"plain")
    for path in inner.root.rglob("*"):
        if path.is_file() and "acme" in path.parts:
            assert b"secret" not in path.read_bytes()
            assert b"helios-commit" not in path.read_bytes()
            for name in ("hidden", "ab" * 8, "1" * 10):
                assert name not in str(path.relative_to(inner.root))
    assert {info.key for info in store.list("")} == {BLOB, record, "public/registry/owner"}
    assert {info.key for info in store.list("acme/")} == {BLOB, record}
    assert (inner.root / "public/registry/owner").read_bytes() == b"plain"
    assert store.open_local(BLOB) is None
    assert store.signed_urls([BLOB], 60) is None


def test_long_names_are_taken(store: SealedStore) -> None:
    record = commit_key("acme", RepoId.parse(f"{'o' * 90}/{'n' * 90}", "datasets"), "1" * 40)
    store.put_bytes(record, b"x")
    assert [info.key for info in store.list("acme/commits/")] == [record]
    assert read(store, record) == b"x"


def test_the_same_again_changes_nothing_and_other_content_is_refused(store: SealedStore, inner: DirectoryStore) -> None:
    store.put_file(BLOB, staged(store, noise(100_000)))
    before = the_file(inner).read_bytes()
    store.put_file(BLOB, staged(store, noise(100_000)))
    store.put_bytes(BLOB, noise(100_000))
    assert the_file(inner).read_bytes() == before
    with pytest.raises(IntegrityError):
        store.put_file(BLOB, staged(store, noise(99_999)))
    with pytest.raises(IntegrityError):
        store.put_bytes(BLOB, noise(100_000, 2))
    assert read(store, BLOB) == noise(100_000)


def test_two_objects_with_one_content_have_nothing_in_common(store: SealedStore, inner: DirectoryStore) -> None:
    both = BLOB, pack_key("acme", "0" * 32)
    for key in both:
        store.put_bytes(key, bytes(1000))
    one, two = ((inner.root / KEY.seal_key(key)).read_bytes() for key in both)
    assert one[24:] != two[24:]
    assert one[sealing.HEAD_SIZE : -sealing.END_SIZE] != two[sealing.HEAD_SIZE : -sealing.END_SIZE]


# --- what somebody changed ---

PARTS = {
    "magic": 0, "version": 4, "flags": 6, "key id": 8, "salt": 30, "block size": 56, "tag of the head": 70,
    "first block": sealing.HEAD_SIZE + 5, "tag of a block": sealing.HEAD_SIZE + BLOCK + 3,
    "last block": sealing.HEAD_SIZE + 2 * (BLOCK + sealing.TAG) + 3,
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_is_found(store: SealedStore, inner: DirectoryStore, part: str) -> None:
    data = noise(2 * BLOCK + 100)
    store.put_bytes(BLOB, data)
    flip(the_file(inner), PARTS[part])
    with pytest.raises(IntegrityError):
        read(store, BLOB)
    with pytest.raises(IntegrityError):
        check_content(the_file(inner).relative_to(inner.root).as_posix(), the_file(inner))
    if part == "last block":
        buffer = bytearray(BLOCK)
        store.read_into(BLOB, 0, memoryview(buffer))
        assert buffer == data[:BLOCK], "what is not damaged can be read"


@pytest.mark.parametrize("how", ["cut at a block", "blocks swapped", "one block twice", "cut short", "longer"])
def test_blocks_stay_where_they_are(store: SealedStore, inner: DirectoryStore, how: str) -> None:
    store.put_bytes(BLOB, noise(3 * BLOCK))
    file, block = the_file(inner), BLOCK + sealing.TAG
    raw = file.read_bytes()
    head, body, end = raw[: sealing.HEAD_SIZE], raw[sealing.HEAD_SIZE : -sealing.END_SIZE], raw[-sealing.END_SIZE :]
    one, two, three = (body[start : start + block] for start in range(0, len(body), block))
    changed = {
        "cut at a block": one + two,
        "blocks swapped": two + one + three,
        "one block twice": one + two + two,
        "cut short": one + two + three[:-1],
        "longer": one + two + three + b"x",
    }[how]
    file.chmod(0o600)
    file.write_bytes(head + changed + end)
    with pytest.raises(IntegrityError):
        read(store, BLOB)


def test_one_object_can_t_stand_in_for_another(store: SealedStore, inner: DirectoryStore) -> None:
    other = blob_key("acme", "cd" * 32)
    store.put_bytes(BLOB, b"mine")
    store.put_bytes(other, b"them")
    mine, them = inner.root / KEY.seal_key(BLOB), inner.root / KEY.seal_key(other)
    them.chmod(0o600)
    them.write_bytes(mine.read_bytes())
    assert read(store, BLOB) == b"mine"
    with pytest.raises(IntegrityError):
        read(store, other)


def test_a_stranger_in_the_domain_is_named(store: SealedStore, inner: DirectoryStore) -> None:
    inner.put_bytes(OTHER.seal_key(BLOB), b"x" * 200)
    with pytest.raises(IntegrityError, match="none of the keys"):
        list(store.list("acme/blobs/"))
    with pytest.raises(NotFound, match=BLOB):
        read(store, BLOB)


def test_a_copy_repairs_another(tmp_path: Path, expected_log_errors: LogErrors) -> None:
    expected_log_errors("a copy is damaged")
    inner = ReplicatedStore([tmp_path / "one", tmp_path / "two"])
    store = SealedStore(inner, {"acme": [KEY]})
    data = noise(2 * BLOCK + 5)
    store.put_bytes(BLOB, data)
    for place in (3, 30, sealing.HEAD_SIZE + BLOCK + 100):
        path = tmp_path / "one" / KEY.seal_key(BLOB)
        path.chmod(0o600)
        flip(path, place)
        fresh = SealedStore(inner, {"acme": [KEY]})
        good = data[BLOCK : BLOCK + 300]
        assert fresh.heal(BLOB, BLOCK, 300, lambda found, good=good: bytes(found) == good)  # type: ignore[misc]
        assert read(fresh, BLOB) == data
        inner.tidy()
    inner.close()


def test_what_another_process_wrote_anew_is_read(store: SealedStore, inner: DirectoryStore) -> None:
    record = commit_key("acme", RepoId.parse("acme/m"), "1" * 40)
    other = SealedStore(inner, {"acme": [KEY]})
    store.put_bytes(record, b"first")
    assert read(store, record) == b"first"
    other.delete(record)
    other.put_bytes(record, b"other")
    assert read(store, record) == b"other"
    other.delete(record)
    with pytest.raises(NotFound, match="commits/models/acme/m"):
        store.read_into(record, 0, memoryview(bytearray(5)))


def test_a_full_disk_is_said_and_leaves_nothing(
    store: SealedStore, inner: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = staged(store, noise(3 * BLOCK)), itertools.count()

    def full(target: BinaryIO, data: bytes) -> None:
        if next(written):
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write(data)

    with monkeypatch.context() as patch:
        patch.setattr("heliosfs.store.sealed._write", full)
        with pytest.raises(NoSpace, match="encrypt"):
            store.put_file(BLOB, path)
    assert [found.name for found in inner.staging().iterdir() if found.name != ".lock"] == [path.name]
    assert list(store.list("acme/")) == []
    store.put_file(BLOB, path)
    assert read(store, BLOB) == noise(3 * BLOCK)


def test_many_at_a_time(store: SealedStore) -> None:
    """Writers of one object, writers of others, readers."""
    keys = [blob_key("acme", f"{number:02x}" * 32) for number in range(8)]

    def work(number: int) -> bool:
        key, data = keys[number % 8], noise(2 * BLOCK + number % 8, number % 8)
        store.put_file(key, staged(store, data, f"f{number}"))
        return read(store, key) == data

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(32)))
    assert sorted(info.key for info in store.list("acme/blobs/")) == keys


# --- keys ---


def test_a_former_key_reads_and_the_new_one_writes(inner: DirectoryStore) -> None:
    before = SealedStore(inner, {"acme": [KEY]})
    before.put_bytes(BLOB, b"old")
    after = SealedStore(inner, {"acme": [OTHER, KEY]})
    assert read(after, BLOB) == b"old"
    after.put_bytes(BLOB, b"old")
    after.put_file(BLOB, staged(after, b"old"))
    with pytest.raises(IntegrityError):
        after.put_bytes(BLOB, b"new")
    with pytest.raises(IntegrityError):
        after.put_file(BLOB, staged(after, b"longer"))
    new = blob_key("acme", "cd" * 32)
    after.put_bytes(new, b"new")
    assert sorted(info.key for info in after.list("acme/blobs/")) == [BLOB, new]
    with pytest.raises(NotFound):
        before.info(new)
    after.delete(BLOB)
    assert [info.key for info in after.list("acme/")] == [new]


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    secret = "0123456789abcdef" * 4
    key = DomainKey(bytes.fromhex(secret))
    for text in (repr(key), str(key), f"{key}", repr([key]), key.id):
        assert secret not in text
        assert secret[:16] not in text
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied"):
            call(key)
    (tmp_path / "key").write_text(secret[:-1] + "x")
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, DomainSettings(key_file=str(tmp_path / "key")))
    assert secret[:16] not in f"{caught.value.message} {caught.value.hint}"


def opened(root: Path, its: DomainSettings | None, environ: dict[str, str] | None = None) -> ObjectStore:
    """The store below a directory, opened with these keys for acme, as at a registry's start."""
    objects = DirectoryStore(root / "store")
    try:
        found, mark = seal_objects(objects, {} if its is None else {"acme": its}, environ or {}, ["acme", "public"])
        mark()
    except BaseException:
        objects.close()
        raise
    return found


def key_file(root: Path, name: str, digit: str) -> str:
    path = root / name
    path.write_text(digit * 64 + "\n")
    return str(path)


def test_a_missing_or_wrong_key_is_said_at_the_start_and_damages_nothing(tmp_path: Path) -> None:
    one, two = (key_file(tmp_path, digit, digit) for digit in "12")
    store = opened(tmp_path, DomainSettings(key_file=one))
    store.put_bytes(BLOB, b"mine")
    store.close()
    before = sorted(path for path in (tmp_path / "store").rglob("*"))
    for wrong in (None, DomainSettings(key_file=two)):
        with pytest.raises(UsageError, match="encrypted with a key that is not here"):
            opened(tmp_path, wrong)
    assert sorted(path for path in (tmp_path / "store").rglob("*")) == before
    rotated = opened(tmp_path, DomainSettings(key_file=two, old_key_files=[one]))
    assert read(rotated, BLOB) == b"mine"
    rotated.close()
    with pytest.raises(UsageError, match="encrypted with a key that is not here"):
        opened(tmp_path, DomainSettings(key_file=one))  # the new one is in use from its first start on
    opened(tmp_path, DomainSettings(key_env="K", old_key_files=[one]), {"K": "2" * 64}).close()


def test_a_domain_with_objects_gets_no_key(tmp_path: Path) -> None:
    plain = opened(tmp_path, None)
    plain.put_bytes(BLOB, b"plain")
    plain.close()
    with pytest.raises(UsageError, match="before it had a key"):
        opened(tmp_path, DomainSettings(key_file=key_file(tmp_path, "1", "1")))


@pytest.mark.parametrize(
    ("its", "match"),
    [
        (DomainSettings(), "needs a key"),
        (DomainSettings(key_file="x", key_env="y"), "one of them"),
        (DomainSettings(key_file="/nowhere/key"), "can't be read"),
        (DomainSettings(key_env="NOT_SET"), "NOT_SET is not set"),
        (DomainSettings(key_env="SHORT"), "holds no key"),
        (DomainSettings(key_env="GOOD", old_key_files=["/dev/null"]), "holds no key"),
    ],
)
def test_settings_without_a_key(tmp_path: Path, its: DomainSettings, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        opened(tmp_path, its, {"SHORT": "12", "GOOD": "1" * 64})


def test_a_malformed_domain_or_a_key_twice(tmp_path: Path) -> None:
    objects = DirectoryStore(tmp_path / "store")
    one = key_file(tmp_path, "1", "1")
    with pytest.raises(UsageError, match="is not a domain"):
        seal_objects(objects, {"A B": DomainSettings(key_file=one)}, {}, [])
    with pytest.raises(UsageError, match="given twice"):
        seal_objects(objects, {"acme": DomainSettings(key_file=one, old_key_files=[one])}, {}, [])
    objects.close()


# --- beside a dictionary ---

KEYS = [
    BLOB, blob_key("acme", "cd" * 32), blob_key("public", "ab" * 32), pack_key("acme", "0" * 32),
    commit_key("acme", RepoId.parse("acme/m"), "1" * 40), commit_key("acme", RepoId.parse("m"), "1" * 40),
    "acme/registry/owner", "public/registry/owner",
]  # fmt: skip
PREFIXES = ["", "acme/", "acme/blobs/", "acme/commits/", "acme/packs/", "acme/re", "public/", "none/", "a"]


@pytest.mark.parametrize("engine", ["directory", "replicated"])
def test_like_a_dictionary(tmp_path: Path, engine: str) -> None:
    numbers = itertools.count()

    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            root = tmp_path / str(next(numbers))
            self.inner = (
                DirectoryStore(root) if engine == "directory" else ReplicatedStore([root / "one", root / "two"])
            )
            self.model: dict[str, bytes] = {}
            self.keys = [KEY]
            self.open_again()

        @rule()
        def open_again(self) -> None:
            self.store = SealedStore(self.inner, {"acme": self.keys})

        @rule()
        def rotate(self) -> None:
            if len(self.keys) < 3:
                self.keys = [DomainKey(bytes([len(self.keys)]) * 32), *self.keys]
                self.open_again()

        def teardown(self) -> None:
            if hasattr(self, "inner"):
                self.inner.close()

        @rule(key=st.sampled_from(KEYS), size=st.sampled_from([0, 1, BLOCK, BLOCK + 1]), as_file=st.booleans())
        def put(self, key: str, size: int, as_file: bool) -> None:
            data = noise(size, len(key))
            there = self.model.get(key, data)
            path = staged(self.store, data) if as_file else None
            try:
                if path is None:
                    self.store.put_bytes(key, data)
                else:
                    self.store.put_file(key, path)
                assert there == data
                self.model[key] = data
            except IntegrityError:
                assert there != data
            finally:
                if path is not None:
                    path.unlink(missing_ok=True)

        @rule(key=st.sampled_from(KEYS))
        def delete(self, key: str) -> None:
            self.store.delete(key)
            self.model.pop(key, None)

        @rule(key=st.sampled_from(KEYS), offset=st.integers(0, 4), count=st.integers(0, BLOCK))
        def read_some(self, key: str, offset: int, count: int) -> None:
            buffer = memoryview(bytearray(count))
            if key not in self.model:
                with pytest.raises(NotFound, match=key):
                    self.store.read_into(key, offset, buffer)
            elif offset + count <= len(self.model[key]):
                self.store.read_into(key, offset, buffer)
                assert buffer == self.model[key][offset : offset + count]
            elif count:
                with pytest.raises(IntegrityError, match="ends at byte"):
                    self.store.read_into(key, offset, buffer)

        @rule(prefix=st.sampled_from(PREFIXES))
        def listing(self, prefix: str) -> None:
            wanted = [(key, len(self.model[key])) for key in sorted(self.model) if key.startswith(prefix)]
            assert sorted((info.key, info.size) for info in self.store.list(prefix)) == wanted

        @invariant()
        def sizes(self) -> None:
            for key in KEYS if hasattr(self, "store") else ():
                if key in self.model:
                    assert self.store.info(key).size == len(self.model[key])
                else:
                    with pytest.raises(NotFound, match=key):
                        self.store.info(key)

    slow = settings(max_examples=12, stateful_step_count=20, suppress_health_check=list(HealthCheck), database=None)
    run_state_machine_as_test(Machine, settings=slow)


def test_no_key_leaves_the_store(store: SealedStore) -> None:
    for key in ("acme", "acme/../x", "acme//a", "acme/blobs/../../x", "acme/blobs/a b"):
        for call in (store.info, store.delete, lambda key: store.put_bytes(key, b"")):
            with pytest.raises(InvalidInput):
                call(key)


# --- golden ---


def test_golden(tmp_path: Path) -> None:
    """Sealed by the first version: later ones read it, and seal it in the same way."""
    inner = DirectoryStore(tmp_path / "store")
    store = SealedStore(inner, {"acme": [KEY]})
    content = (GOLDEN / "two-chunks.pack").read_bytes()
    key = pack_key("acme", "00112233445566778899aabbccddeeff")
    name = (GOLDEN / "sealed.name").read_text().strip()
    assert KEY.seal_key(key) == name
    inner.put_bytes(name, (GOLDEN / "sealed.pack").read_bytes())
    assert read(store, key) == content
    store.put_bytes(key, content)
    store.delete(key)
    store.put_bytes(key, content)
    assert (inner.root / name).read_bytes() == (GOLDEN / "sealed.pack").read_bytes()
    assert KEY.id == (GOLDEN / "sealed.key-id").read_text().strip()
    inner.close()


def test_golden_by_the_document_alone() -> None:
    """docs/format.md, read by somebody who has no code of ours."""

    def derive(what: bytes, length: int, salt: bytes | None = None) -> bytes:
        return HKDF(SHA256(), length, salt, b"helios sealed object 1\0" + what).derive(bytes(range(32)))

    raw, name = (GOLDEN / "sealed.pack").read_bytes(), (GOLDEN / "sealed.name").read_text().strip()
    content = (GOLDEN / "two-chunks.pack").read_bytes()
    domain, sealed, kind, fan, text = name.split("/")
    assert (domain, sealed, kind, fan) == ("acme", "sealed", "packs", text[:2])
    hidden = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    rest = AESSIV(derive(b"names", 64)).decrypt(hidden, [b"acme/packs"])
    assert rest == b"00/00112233445566778899aabbccddeeff"
    key = b"acme/packs/" + rest
    magic, version, flags, id_, salt, block, zero, tag = struct.unpack("<4sHH16s32sI4s16s", raw[:80])
    assert (magic, version, flags, block, zero) == (b"HSEA", 1, 0, 65536, bytes(4))
    assert id_ == derive(b"id", 16)
    salts = derive(b"salts", 32)
    assert salt == hmac.digest(salts, b"salt\0" + key + b"\0" + blake3(content).digest(), "sha256")
    assert tag == hmac.digest(salts, b"head\0" + key + b"\0" + raw[:64], "sha256")[:16]
    nonce = bytes(7) + (0).to_bytes(4, "big") + b"\1"
    assert AESGCM(derive(b"object\0" + key, 32, salt)).decrypt(nonce, raw[80:-32], None) == content
    assert raw[-32:] == blake3(raw[:-32]).digest()
