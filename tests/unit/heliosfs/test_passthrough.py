"""Where passthrough is possible, and what a mount says of it."""

from __future__ import annotations

import errno

import pytest

from heliosfs.fuse.passthrough import FULL, LASTING, Passthrough


def test_a_refusal_is_of_one_filesystem() -> None:
    known = Passthrough()
    assert known.reason == FULL
    assert known.refused(7, "overlay at /", errno.ELOOP)
    assert not known.possible(7)
    assert known.possible(8), "another tier"
    assert known.reason == (
        "a keeper, and passthrough but for files on overlay at / (it lies on top of another filesystem): "
        "these are read through the mount's process"
    )


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENFILE, errno.EIO, errno.ENOSPC])
def test_a_refusal_of_a_moment_is_forgotten(code: int) -> None:
    known = Passthrough()
    assert not known.refused(7, "ext4 at /", code)
    assert known.possible(7)
    assert known.reason == FULL


def test_all_that_is_refused_is_named_once() -> None:
    known = Passthrough()
    for code in LASTING:
        known.refused(7, "overlay at /", code)
    known.refused(8, "ecryptfs at /home", errno.ELOOP)
    assert known.reason.count("overlay at /") == known.reason.count("ecryptfs at /home") == 1


def test_a_kernel_that_does_not_offer_it() -> None:
    known = Passthrough()
    known.offered = False
    assert not known.possible(7)
    assert "offers no passthrough" in known.reason
