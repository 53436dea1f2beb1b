"""A writable view over files that are not: the same whether the kernel overlays them or they are copied."""

import errno
import os
import stat

import pytest

from helios import mounts
from helios.errors import Unavailable
from helios.launch import overlay


@pytest.fixture(params=["overlayfs", "copy"])
def how(request, monkeypatch):
    if request.param == "copy":
        monkeypatch.setattr(overlay, "_overlay", lambda lower, place: "an overlayfs can't be mounted: no")
    elif os.geteuid() != 0:
        pytest.skip("only root mounts an overlayfs")
    return request.param


@pytest.fixture
def lower(tmp_path):
    root = tmp_path / "lower, with: odd\\ signs"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "kernel.so").write_bytes(b"old")
    (root / "gone").write_bytes(b"gone")
    for path in (root / "deep" / "kernel.so", root / "gone"):
        path.chmod(0o444)
    return root


def opened(lower, base, how):
    view = overlay.writable(lower, base, "one")
    if how == "overlayfs" and view.why_copied:
        view.close()
        pytest.skip(view.why_copied)
    assert bool(view.why_copied) == (how == "copy")
    return view


def test_everything_can_be_changed_and_nothing_below_is(tmp_path, lower, how):
    view = opened(lower, tmp_path / "base", how)
    try:
        kernel = view.path / "deep" / "kernel.so"
        assert kernel.stat().st_mtime_ns == (lower / "deep" / "kernel.so").stat().st_mtime_ns
        with kernel.open("ab") as file:
            file.write(b"+new")
        (view.path / "fresh.tmp").write_bytes(b"fresh")
        (view.path / "fresh.tmp").replace(view.path / "fresh")
        (view.path / "gone").unlink()
        assert kernel.read_bytes() == b"old+new"
        assert sorted(os.listdir(view.path)) == ["deep", "fresh"]
    finally:
        view.close()
    assert (lower / "deep" / "kernel.so").read_bytes() == b"old"
    assert sorted(os.listdir(lower)) == ["deep", "gone"]
    assert os.listdir(tmp_path / "base") == []
    view.close()


def test_what_a_killed_owner_left_is_taken_down_and_what_lives_is_not(tmp_path, lower, how):
    base = tmp_path / "base"
    dead = opened(lower, base, how)
    os.close(dead._lock.fileno())  # as the kernel does it for the dead
    alive = overlay.writable(lower, base, "two")
    try:
        overlay.repair(base)
        assert not (base / "one").exists()
        assert (alive.path / "deep" / "kernel.so").read_bytes() == b"old"
        with pytest.raises(Unavailable, match="in use"):
            overlay.writable(lower, base, "two")
    finally:
        alive.close()
    assert not any(entry.mountpoint.is_relative_to(base) for entry in mounts.mount_table())


def test_a_view_that_can_not_be_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(overlay, "_overlay", lambda lower, place: "no")
    with pytest.raises(OSError, match="no such"):
        overlay.writable(tmp_path / "no such", tmp_path / "base", "one")
    assert os.listdir(tmp_path / "base") == []


def test_paths_too_long_for_the_kernel_are_copied(tmp_path):
    deep = tmp_path
    while len(os.fsencode(deep)) < 3700:
        deep = deep / ("d" * 200)
    assert "too long" in overlay._overlay(deep, deep)


def test_copied_files_are_the_owners_to_change(tmp_path, lower, monkeypatch):
    monkeypatch.setattr(overlay, "_overlay", lambda lower, place: "no")
    view = overlay.writable(lower, tmp_path / "base", "one")
    try:
        assert stat.S_IMODE((view.path / "gone").stat().st_mode) & 0o200
    finally:
        view.close()


def test_an_overlayfs_that_can_not_be_written_to_is_not_used(tmp_path, lower, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root mounts an overlayfs")

    def read_only(view):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(overlay, "_try_out", read_only)
    view = overlay.writable(lower, tmp_path / "base", "one")
    try:
        assert "can't be written to: Read-only file system" in view.why_copied or "can't be mounted" in view.why_copied
        assert not any(entry.mountpoint.is_relative_to(tmp_path) for entry in mounts.mount_table())
        (view.path / "deep" / "kernel.so").write_bytes(b"new")
    finally:
        view.close()
    assert (lower / "deep" / "kernel.so").read_bytes() == b"old"


def test_repair_takes_the_locks_of_the_dead_and_does_not_stop_at_one_that_stays(tmp_path, lower, monkeypatch):
    base = tmp_path / "base"
    (base / "a").mkdir(parents=True)
    (base / "b").mkdir()
    (base / "of one that was killed early.lock").touch()
    real = overlay._remove

    def stays(place):
        if place.name == "a":
            raise OSError("it is busy")
        real(place)

    monkeypatch.setattr(overlay, "_remove", stays)
    with pytest.raises(OSError, match="it is busy"):
        overlay.repair(base)
    assert os.listdir(base) == ["a"]
