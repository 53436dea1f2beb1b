"""Artifacts of compiled kernels: sealed, checked, complete, bounded."""

import hashlib
import math
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import IntegrityError
from helios.launch.compile_artifact import (
    Entry,
    Index,
    check,
    fingerprint,
    seal,
    settled,
    snapshot,
    unseal,
    worth_keeping,
)

SECRET = b"s" * 32
FACTS = '{"engine":"vllm"}'
PATHS = st.from_regex(re.compile(r"[a-z0-9_.]{0,5}[a-z0-9_]", re.ASCII), fullmatch=True)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def filled(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def taken(tmp_path, cache, before=None, lower=None, most=1 << 20, since=math.inf):
    number = len(list(tmp_path.glob("staging*")))
    staging = tmp_path / f"staging{number}"
    staging.mkdir()
    return snapshot(cache, before, lower, FACTS, staging, most, since), staging


@given(st.dictionaries(PATHS, st.integers(0, 1 << 40), max_size=5))
def test_what_was_sealed_is_read_back(sizes):
    index = Index(FACTS, {path: Entry("0" * 64, size) for path, size in sizes.items()})
    assert unseal(seal(index, SECRET), SECRET, FACTS) == index


@given(st.data())
def test_no_changed_or_cut_index_is_believed(data):
    sealed = seal(Index(FACTS, {"a": Entry("0" * 64, 1)}), SECRET)
    at = data.draw(st.integers(0, len(sealed) - 1))
    flipped = sealed[:at] + bytes([sealed[at] ^ data.draw(st.integers(1, 255))]) + sealed[at + 1 :]
    for bad in (flipped, sealed[:at]):
        with pytest.raises(IntegrityError):
            unseal(bad, SECRET, FACTS)


def test_a_seal_of_another_secret_or_for_other_facts_does_not_count():
    sealed = seal(Index(FACTS, {}), SECRET)
    with pytest.raises(IntegrityError, match=r"no seal of this node's key"):
        unseal(sealed, b"t" * 32, FACTS)
    with pytest.raises(IntegrityError, match="another model, engine or device"):
        unseal(sealed, SECRET, "{}")
    assert fingerprint(SECRET) != fingerprint(b"t" * 32)


def test_a_sealed_index_with_a_path_that_leaves_the_directory_is_refused():
    with pytest.raises(IntegrityError, match="does not decode"):
        unseal(seal(Index(FACTS, {"../x": Entry("0" * 64, 1)}), SECRET), SECRET, FACTS)


def test_a_snapshot_is_what_the_index_says(tmp_path):
    cache = filled(tmp_path / "cache", {"a/kernel.so": b"so", "model": b"pickle"})
    index, staging = taken(tmp_path, cache)
    check(staging, index, sha256)
    assert index.files == {
        "a/kernel.so": Entry(hashlib.sha256(b"so").hexdigest(), 2),
        "model": Entry(hashlib.sha256(b"pickle").hexdigest(), 6),
    }


@pytest.mark.parametrize("damage", ["changed", "missing", "more", "link", "another link", "longer"])
def test_a_directory_that_is_not_what_the_index_says_is_found(tmp_path, damage):
    index, staging = taken(tmp_path, filled(tmp_path / "cache", {"a/b": b"1", "c": b"2"}))
    match damage:
        case "changed":
            (staging / "c").write_bytes(b"3")
        case "longer":
            (staging / "c").write_bytes(b"22")
        case "missing":
            (staging / "c").unlink()
        case "more":
            (staging / "a" / "evil.so").write_bytes(b"x")
        case "link":
            (staging / "c").unlink()
            (staging / "c").symlink_to("a/b")
        case "another link":
            (staging / "evil.so").symlink_to("/tmp/evil.so")
    with pytest.raises(IntegrityError):
        check(staging, index, sha256)


def test_locks_half_written_files_and_what_a_registry_keeps_back_stay_out(tmp_path):
    cache = filled(
        tmp_path / "cache",
        {
            "locks/x.lock": b"1",
            "model.123.tmp": b"1",
            "x.tmp.7": b"1",
            "w.bin": b"1",
            "t.PT": b"1",
            "empty": b"",
            "k": b"1",
        },
    )
    (cache / "link").symlink_to("k")
    os.mkfifo(cache / "pipe")
    index, _ = taken(tmp_path, cache)
    assert list(index.files) == ["k"]


def test_what_was_just_written_may_be_half_of_a_file_and_stays_out(tmp_path):
    cache = filled(tmp_path / "cache", {"a.so": b"whole", "b.so": b"ha"})
    os.utime(cache / "a.so", (100, 100))
    os.utime(cache / "b.so", (200, 200))
    assert not settled(cache, 150)
    index, staging = taken(tmp_path, cache, since=150)
    assert list(index.files) == ["a.so"]
    check(staging, index, sha256)
    (cache / "x.lock").write_bytes(b"1")
    assert settled(cache, 250), "locks are written all the time"


def test_names_that_no_repository_takes_stay_out(tmp_path):
    filled(tmp_path, {"a\\b": b"1"})
    assert not worth_keeping("a\\b", (tmp_path / "a\\b").stat())


def test_nothing_new_is_nothing_to_publish(tmp_path):
    lower = filled(tmp_path / "lower", {"a": b"1"})
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "a").write_bytes(b"1")
    os.utime(cache / "a", ns=(0, (lower / "a").stat().st_mtime_ns))
    before = Index(FACTS, {"a": Entry(sha256(lower / "a"), 1)})
    assert taken(tmp_path, cache, before, lower)[0] is None
    (cache / "locks.lock").write_bytes(b"1")
    assert taken(tmp_path, cache, before, lower)[0] is None
    (cache / "b").write_bytes(b"2")
    index, staging = taken(tmp_path, cache, before, lower)
    assert list(index.files) == ["a", "b"]
    check(staging, index, sha256)


def test_a_file_that_was_replaced_is_new(tmp_path):
    lower = filled(tmp_path / "lower", {"a": b"1"})
    cache = filled(tmp_path / "cache", {"a": b"2"})
    os.utime(cache / "a", ns=(0, 1))
    index, _ = taken(tmp_path, cache, Index(FACTS, {"a": Entry(sha256(lower / "a"), 1)}), lower)
    assert index.files["a"].sha256 == hashlib.sha256(b"2").hexdigest()


def test_where_old_and_new_are_too_much_the_old_go_and_new_ones_that_are_alone_are_refused(tmp_path):
    lower = filled(tmp_path / "lower", {"old": b"x" * 60})
    cache = filled(tmp_path / "cache", {"old": b"x" * 60, "new": b"y" * 60})
    os.utime(cache / "old", ns=(0, (lower / "old").stat().st_mtime_ns))
    before = Index(FACTS, {"old": Entry(sha256(lower / "old"), 60)})
    index, staging = taken(tmp_path, cache, before, lower, most=100)
    assert list(index.files) == ["new"]
    check(staging, index, sha256)
    with pytest.raises(IntegrityError, match="limit_mib"):
        taken(tmp_path, cache, before, lower, most=50)
