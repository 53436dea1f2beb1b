"""What every engine of the object store must do, against real directories and real servers, beside a dictionary."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from helios.errors import IntegrityError, InvalidInput, NotFound, Unavailable
from heliosfs.store.keys import blob_key
from heliosfs.store.objects import ObjectStore
from heliosfs.store.sealed import SealedStore
from heliosfs.store.sealing import BLOCK, DomainKey
from tests.support.engines import ENGINES, SMALL_PART, Open, engine, read, small_parts, staged

KEYS = [
    "other/b/1", "public/a-b/1", "public/a.b", "public/a/1", "public/a/10", "public/a/2/x", "public/a0/1",
    "public/b/1",
]  # fmt: skip
PREFIXES = [
    "",
    "p",
    "public/",
    "public/a",
    "public/a/",
    "public/a/1",
    "public/a/2/",
    "public/a/2/x",
    "none/",
    "other/b",
]
BIG = random.Random(1).randbytes(2 * SMALL_PART + 1_000_007)
"""More than two parts of an upload."""


@pytest.fixture(scope="module", params=ENGINES)
def opening(request, tmp_path_factory):
    with engine(request.param, tmp_path_factory.mktemp("engine")) as found:
        yield found


@pytest.fixture
def store(opening: Open, tmp_path: Path):
    with opening(tmp_path / "local") as opened:
        yield opened


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def left(store: ObjectStore) -> list[str]:
    return [path.name for path in store.staging().iterdir() if path.name != ".lock"]


def test_like_a_dictionary(opening: Open, tmp_path: Path) -> None:
    numbers = itertools.count()
    with opening(tmp_path / "first") as first:
        near = first.local is not None
        assert first.near("public/a/1") == near

    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.held = opening(tmp_path / str(next(numbers)))
            self.store = self.held.__enter__()
            self.model: dict[str, bytes] = {}

        def teardown(self) -> None:
            if hasattr(self, "held"):
                self.held.__exit__(None, None, None)

        def put(self, key: str, data: bytes, write, same) -> None:
            there = self.model.get(key)
            if there is not None and not same(there, data):
                with pytest.raises(IntegrityError):
                    write()
            else:
                write()
                self.model.setdefault(key, data)

        @rule(key=st.sampled_from(KEYS), data=st.binary(max_size=3))
        def put_bytes(self, key: str, data: bytes) -> None:
            self.put(key, data, lambda: self.store.put_bytes(key, data), lambda a, b: a == b)

        @rule(key=st.sampled_from(KEYS), data=st.sampled_from([b"", b"a", b"ab", b"abc"]))
        def put_file(self, key: str, data: bytes) -> None:
            there = self.model.get(key, data)
            if len(there) == len(data) and there != data:
                return  # by one size; whether the content is looked at too is the engine's affair
            path = staged(self.store, data)
            self.put(key, data, lambda: self.store.put_file(key, path), lambda a, b: a == b)
            path.unlink(missing_ok=True)

        @rule(key=st.sampled_from(KEYS))
        def delete(self, key: str) -> None:
            self.store.delete(key)
            self.model.pop(key, None)

        @rule(key=st.sampled_from(KEYS), offset=st.integers(0, 4), count=st.integers(0, 4))
        def read_some(self, key: str, offset: int, count: int) -> None:
            buffer = memoryview(bytearray(count))
            if key not in self.model:
                with pytest.raises(NotFound, match=key):
                    self.store.read_into(key, offset, buffer)
            elif offset + count > len(self.model[key]) and count:
                with pytest.raises(IntegrityError, match="ends at byte"):
                    self.store.read_into(key, offset, buffer)
            else:
                self.store.read_into(key, offset, buffer)
                assert buffer == self.model[key][offset : offset + count]

        @rule(prefix=st.sampled_from(PREFIXES))
        def listing(self, prefix: str) -> None:
            wanted = [(key, len(self.model[key])) for key in sorted(self.model) if key.startswith(prefix)]
            assert [(info.key, info.size) for info in self.store.list(prefix)] == wanted

        @rule(key=st.sampled_from(KEYS))
        def info(self, key: str) -> None:
            if key in self.model:
                assert self.store.info(key).size == len(self.model[key])
            else:
                with pytest.raises(NotFound, match=key):
                    self.store.info(key)

        @invariant()
        def nothing_is_left(self) -> None:
            if hasattr(self, "store"):
                assert [name for name in left(self.store) if not name.startswith(("probe", "repair"))] == []

    slow = settings(
        max_examples=15 if near else 4, stateful_step_count=25, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Machine, settings=slow)


def test_a_large_object(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)
    key = blob_key("public", hashlib.sha256(BIG).hexdigest())
    path = staged(store, BIG)
    store.put_file(key, path)
    assert not path.exists()
    assert store.info(key).size == len(BIG)
    assert read(store, key) == BIG
    for offset, count in ((0, 1), (len(BIG) - 1, 1), (SMALL_PART - 3, 7), (100, 9 << 20)):
        buffer = bytearray(count)
        store.read_into(key, offset, memoryview(buffer))
        assert buffer == BIG[offset : offset + count]
    store.put_file(key, staged(store, BIG))
    with pytest.raises(IntegrityError, match="already in"):
        store.put_file(key, staged(store, BIG[:-1]))
    (store.staging() / "file").unlink(missing_ok=True)
    assert read(store, key) == BIG


def test_an_encrypted_domain(store: ObjectStore) -> None:
    sealed, data = SealedStore(store, {"acme": [DomainKey(bytes(32))]}), BIG[: 5 * BLOCK + 7]
    key = blob_key("acme", hashlib.sha256(data).hexdigest())
    sealed.mark_keys()
    sealed.put_file(key, staged(sealed, data))
    sealed.put_file(key, staged(sealed, data))
    sealed.put_bytes("acme/commits/models/acme/m/" + "1" * 40, data[:100])
    assert (sealed.info(key).size, read(sealed, key)) == (len(data), data)
    buffer = bytearray(70_000)
    sealed.read_into(key, BLOCK - 5, memoryview(buffer))
    assert buffer == data[BLOCK - 5 : BLOCK - 5 + 70_000]
    assert [info.key for info in sealed.list("acme/blobs/")] == [key]
    assert not sealed.heal(key, 10, 20, lambda found: False)
    assert sealed.signed_urls([key], 60) is None
    for info in store.list("acme/"):
        assert data[:32] not in read(store, info.key)
    sealed.delete(key)
    with pytest.raises(NotFound, match=key):
        sealed.info(key)
    sealed.check_keys(["acme"])


def test_signed_addresses_are_for_one_object_and_ranges_of_it(store: ObjectStore) -> None:
    store.put_bytes("public/a/1", b"0123456789")
    until(lambda: not store.waits("public/a/1"))
    urls = store.signed_urls(["public/a/1", "public/b/1"], 60)
    if store.local is not None:
        assert urls is None
        return
    assert urls is not None
    assert len(urls) == 2
    request = urllib.request.Request(urls[0], headers={"range": "bytes=3-5"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert (answer.status, answer.read()) == (206, b"345")
    assert list(store.signed_urls([], 60)) == []


def test_local_files_where_there_are_such(store: ObjectStore) -> None:
    store.put_bytes("public/a/1", b"one")
    file = store.open_local("public/a/1")
    assert (file is None) == (not store.near("public/a/1"))
    if file is not None:
        with file:
            assert file.read() == b"one"
    if store.local is not None:
        assert file is not None
        assert (store.local / "public/a/1").read_bytes() == b"one"
        with pytest.raises(NotFound):
            store.open_local("public/a/2")


@pytest.mark.parametrize("count", [1000, 1_200_000])
def test_many_at_a_time(store: ObjectStore, count: int) -> None:
    """Sixteen threads write eight objects, each two of them one; all are right, and there once."""
    failures = []

    def work(number: int) -> None:
        try:
            data = bytes([number % 8]) * count
            store.put_file(f"public/m/{number % 8}", staged(store, data, f"f{number}"))
            assert read(store, f"public/m/{number % 8}") == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert [info.key for info in store.list("public/m/")] == [f"public/m/{n}" for n in range(8)]


def test_a_second_look_at_bytes_that_are_right(store: ObjectStore) -> None:
    store.put_bytes("public/a/1", b"0123456789")
    assert not store.heal("public/a/1", 2, 3, lambda data: bytes(data) == b"xxx")
    healed = store.heal("public/a/1", 2, 3, lambda data: bytes(data) == b"234")
    assert healed or store.local is not None
    assert read(store, "public/a/1") == b"0123456789"


def test_no_key_leaves_the_store(store: ObjectStore) -> None:
    calls: list[Callable[[str], object]] = [
        lambda key: store.put_bytes(key, b""),
        lambda key: store.info(key),
        lambda key: store.read_into(key, 0, memoryview(bytearray(1))),
        lambda key: store.delete(key),
        lambda key: store.put_file(key, staged(store, b"x")),
    ]
    for key in ("", "public", "/public/a", "public/../a", "public//a", "public/.a", "public/a b", "a" * 70):
        for call in calls:
            with pytest.raises(InvalidInput):
                call(key)
    for prefix in ("/", "../", "public/../"):
        with pytest.raises(InvalidInput):
            list(store.list(prefix))


def test_it_answers_until_it_is_closed(store: ObjectStore) -> None:
    store.check()
    assert store.tidy() == 0
    directory = store.staging()
    staged(store, b"left")
    store.close()
    assert not directory.exists()
    with pytest.raises(Unavailable):
        store.staging()
