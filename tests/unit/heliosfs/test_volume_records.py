"""Volume records and their files: what is written is read again, nothing else is believed."""

import errno
import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import HeliosError, IntegrityError, InvalidInput, NoSpace, Unavailable
from helios.names import check_ref
from heliosfs.store.manifest import canonical
from heliosfs.tiers.pins import NAMES
from heliosfs.volumes.files import VolumeFiles
from heliosfs.volumes.record import MAGIC, MAGIC_2, USUAL, VolumeRecord, check_volume_id, frozen_refs
from tests.support.mutation import mutate

C1 = "1" * 40
MANIFEST = b"a manifest's bytes"
DIGEST = hashlib.sha256(MANIFEST).hexdigest()


def record(volume="pvc-1", revision="main", commit=C1, manifest=DIGEST):
    return VolumeRecord(volume, "models/org/name", commit, revision, manifest, 1, frozen_refs(revision, commit), 2)


def summed(text):
    """As in a file: the sha256 follows."""
    return text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def is_ref(text):
    try:
        return bool(check_ref(text))
    except InvalidInput:
        return False


def hexadecimal(digits):
    return st.text("0123456789abcdef", min_size=digits, max_size=digits)


IDS = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", fullmatch=True)
REVISIONS = st.from_regex(r"[a-z][a-z/.]{0,20}", fullmatch=True).filter(is_ref) | hexadecimal(40)


@st.composite
def records(draw):
    commit, revision = draw(hexadecimal(40)), draw(REVISIONS)
    return VolumeRecord(
        draw(IDS),
        draw(st.sampled_from(["models/org/name", "models/gpt2", "datasets/org/name"])),
        commit,
        revision,
        draw(hexadecimal(64)),
        draw(st.integers(0, (1 << 63) - 1)),
        frozen_refs(revision, commit),
        draw(st.integers(0, (1 << 63) - 1)),
        draw(st.sampled_from(sorted(NAMES))),
    )


# --- the format ------------------------------------------------------------------------------------------------------


@given(records())
def test_a_record_survives_the_round_trip(made):
    assert VolumeRecord.decode(made.encode()) == made


@given(records(), st.data())
def test_a_changed_record_is_refused(made, data):
    changed = mutate(data, made.encode())
    if changed != made.encode():
        with pytest.raises(IntegrityError):
            VolumeRecord.decode(changed)


def test_the_golden_record_is_read_and_written():
    """docs/format.md: what later versions must read."""
    golden = (Path(__file__).parents[2] / "golden/v1/pvc-1.volume").read_bytes()
    commit = "52673c5d519832a792278d18ec54d7b67782710e"
    read = VolumeRecord.decode(golden)
    assert (read.id, read.repo, read.commit, read.revision) == ("pvc-1", "models/org/name", commit, "v1.0")
    assert read.refs == {"v1.0": commit, "main": commit}
    assert (read.time, read.created) == (1_750_000_000, 1_750_000_002)
    assert read.priority == "critical"
    assert read.encode() == golden


def test_the_golden_record_with_a_class_is_read_and_written():
    golden = (Path(__file__).parents[2] / "golden/v2/pvc-1.volume").read_bytes()
    of_before = VolumeRecord.decode((Path(__file__).parents[2] / "golden/v1/pvc-1.volume").read_bytes())
    assert golden.startswith(b"helios-volume 2\n")
    assert VolumeRecord.decode(golden) == msgspec.structs.replace(of_before, priority="pinned")
    assert VolumeRecord.decode(golden).encode() == golden


@given(records())
def test_a_helios_of_before_reads_every_record_of_the_usual_class(made):
    assert made.encode().startswith(MAGIC if made.priority == USUAL else MAGIC_2)


@pytest.mark.parametrize("priority", [USUAL, "urgent", "", None, 3])
def test_a_record_of_version_2_has_another_class_than_the_usual_one(priority):
    text = record().encode()[:-66].removeprefix(MAGIC)
    again = MAGIC_2 + canonical({**msgspec.json.decode(text), "priority": priority})
    with pytest.raises(IntegrityError, match=r"canonical|class|decode"):
        VolumeRecord.decode(summed(again))


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "a/b"},
        {"id": ".hidden"},
        {"repo": "org/name"},
        {"commit": "1" * 39},
        {"manifest": "F" * 64},
        {"revision": "a..b"},
        {"refs": {"main": "2" * 40}},
        {"refs": {"../x": C1}},
        {"time": -1},
        {"created": 1 << 63},
        {"more": 1},
    ],
)
def test_a_record_with_bad_values_is_refused(changes):
    good = {
        **{"id": "v", "repo": "models/o/m", "commit": C1, "revision": "main", "manifest": DIGEST},
        **{"time": 1, "refs": {"main": C1}, "created": 1},
    }
    VolumeRecord.decode(summed(MAGIC + canonical(good)))
    with pytest.raises(IntegrityError, match=r"volume|decode"):
        VolumeRecord.decode(summed(MAGIC + canonical(good | changes)))


def test_a_record_that_is_not_canonical_is_refused():
    text = record().encode()[:-66]
    with pytest.raises(IntegrityError, match="canonical"):
        VolumeRecord.decode(summed(text.replace(b",", b", ")))


def test_a_record_of_a_newer_version_says_so():
    with pytest.raises(IntegrityError, match="newer"):
        VolumeRecord.decode(record().encode().replace(b"helios-volume 1", b"helios-volume 3"))


@pytest.mark.parametrize("text", ["a", "pvc-0d9c7f3e", "-x", "_", "A.b_c-d", "x" * 128])
def test_good_ids(text):
    assert check_volume_id(text) == text


@pytest.mark.parametrize("text", ["", ".", "..", ".a", "a/b", "a\n", "a b", "é", "a\0", "x" * 129])
def test_bad_ids(text):
    with pytest.raises(InvalidInput):
        check_volume_id(text)


def test_main_is_always_there_and_the_asked_ref_too():
    assert frozen_refs("main", C1) == {"main": C1}
    assert frozen_refs("v1", C1) == {"v1": C1, "main": C1}
    assert frozen_refs("2" * 40, C1) == {"main": C1}
    assert frozen_refs("main/x", C1) == {"main/x": C1}


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    files = VolumeFiles(tmp_path / "volumes")
    files.load()
    return files


def test_what_was_written_is_there_after_a_restart(files, tmp_path):
    files.write(record("a"), MANIFEST)
    files.write(record("b", "v1"), MANIFEST)
    again = VolumeFiles(tmp_path / "volumes")
    assert again.load().records == {"a": record("a"), "b": record("b", "v1")}
    assert again.manifest(DIGEST) == MANIFEST


def test_what_was_removed_is_gone(files, tmp_path):
    files.write(record("a"), MANIFEST)
    files.remove("a", DIGEST)
    files.remove("a", DIGEST)
    assert VolumeFiles(tmp_path / "volumes").load().records == {}
    assert files.manifest(DIGEST) is None


def test_manifests_that_no_volume_needs_any_more_are_kept_within_bounds(files, monkeypatch):
    def made(number, size=100):
        content = b"%d" % number * size
        return hashlib.sha256(content).hexdigest(), content

    def comes_and_goes(number, size=100):
        digest, content = made(number, size)
        files.write(record("v", manifest=digest), content)
        files.remove("v", digest)
        return digest

    monkeypatch.setattr("heliosfs.volumes.files.SPARE", 3)
    monkeypatch.setattr("heliosfs.volumes.files.SPARE_BYTES", 1000)
    gone = [comes_and_goes(number) for number in range(4)]
    assert [files.manifest(digest) is not None for digest in gone] == [False, True, True, True]
    again, content = made(1)
    files.write(record("again", manifest=again), b"not written, for the right one is there")
    assert files.manifest(again) == content
    large = comes_and_goes(5, 950)  # goes with all that were set aside before it
    assert [files.manifest(digest) is not None for digest in (*gone[2:], large)] == [False, False, True]
    assert files.manifest(again) == content, "a volume needs it"
    comes_and_goes(6, 2000)
    assert [files.manifest(made(*each)[0]) for each in ((5, 950), (6, 2000))] == [None, None]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: b"\0" * len(data),
        lambda data: data.replace(b'"main"', b'"mian"', 1),
        lambda data: data + b" " * (1 << 20),
        lambda data: record("another").encode(),
    ],
)
def test_a_damaged_record_is_named_and_stops_no_other(files, tmp_path, damage, caplog, expected_log_errors):
    expected_log_errors("a volume's record is damaged")
    files.write(record("good"), MANIFEST)
    files.write(record("bad"), MANIFEST)
    path = tmp_path / "volumes" / "bad.volume"
    path.write_bytes(damage(path.read_bytes()))
    loaded = VolumeFiles(tmp_path / "volumes").load()
    assert list(loaded.records) == ["good"]
    assert list(loaded.damaged) == ["bad"]
    assert [r.path for r in caplog.records if "damaged" in r.message] == [str(path)]
    assert path.exists(), "somebody may want to look at it"


def test_a_record_that_cannot_be_read_stops_no_other(files, tmp_path, expected_log_errors):
    expected_log_errors("a volume's record is damaged")
    files.write(record("good"), MANIFEST)
    (tmp_path / "volumes" / "bad.volume").mkdir()
    loaded = VolumeFiles(tmp_path / "volumes").load()
    assert (list(loaded.records), list(loaded.damaged)) == (["good"], ["bad"])


def test_a_damaged_manifest_is_not_given_and_is_written_again(files, tmp_path, caplog):
    files.write(record("a"), MANIFEST)
    (tmp_path / "volumes/manifests" / DIGEST).write_bytes(b"something else")
    assert files.manifest(DIGEST) is None
    assert "damaged" in caplog.text
    files.write(record("b"), MANIFEST)
    assert files.manifest(DIGEST) == MANIFEST


def test_what_interrupted_calls_left_goes_at_the_next_start(files, tmp_path):
    files.write(record("a"), MANIFEST)
    root = tmp_path / "volumes"
    (root / ".0011.tmp").write_bytes(b"half a record")
    (root / "manifests/.0011.tmp").write_bytes(b"half a manifest")
    (root / "manifests" / ("0" * 64)).write_bytes(b"of a volume whose record was not written")
    VolumeFiles(root).load()
    left = sorted(path.name for path in root.rglob("*") if path.is_file())
    assert left == sorted(["a.volume", DIGEST])


def test_no_manifest_goes_while_a_record_is_damaged(files, tmp_path, expected_log_errors):
    expected_log_errors("a volume's record is damaged")
    files.write(record("a"), MANIFEST)
    path = tmp_path / "volumes" / "a.volume"
    path.write_bytes(path.read_bytes().replace(b"volume 1", b"volume 3"))
    again = VolumeFiles(tmp_path / "volumes")
    again.load()
    assert again.manifest(DIGEST) == MANIFEST


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EIO, Unavailable)])
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_disk_that_fails_leaves_no_half_volume(files, tmp_path, monkeypatch, number, kind, call):
    files.write(record("old"), MANIFEST)

    def fails(fd):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr("heliosfs.store.syscalls.os.fsync", fails)
        else:
            patch.setattr("heliosfs.volumes.files.secrets.token_hex", fails)
        with pytest.raises(kind):
            files.write(record("new"), b"another manifest")
    root = tmp_path / "volumes"
    assert list(VolumeFiles(root).load().records) == ["old"]
    assert not list(root.rglob("*.tmp"))


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HeliosError, match="volumes"):
        VolumeFiles(tmp_path / "file/volumes").load()
