"""The few FUSE messages that the channel reads or changes, byte by byte (linux/fuse.h)."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliosfs.fuse import protocol

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


def init_request(flags: int, flags2: int | None) -> bytes:
    body = struct.pack("<IIII", 7, 45, 131072, flags)
    if flags2 is not None:
        body += struct.pack("<I11I", flags2, *[0] * 11)
    return protocol.REQUEST.pack(40 + len(body), protocol.INIT, 2, 0, 0, 0, 0, 0, 0) + body


def init_reply(length: int = 64) -> bytes:
    """What libfuse 3.14 answers."""
    body = struct.pack("<IIIIHHIIHHII", 7, 31, 131072, 0x40000009, 12, 9, 1048576, 1, 256, 0, 1, 0).ljust(64, b"\0")
    return protocol.REPLY.pack(16 + length, 0, 2) + body[:length]


NATIVE = protocol.Offer(7, 45, 131072, protocol.FUSE_INIT_EXT, protocol.FUSE_PASSTHROUGH | protocol.FUSE_HAS_RESEND)


def test_an_offer_is_read() -> None:
    offer = protocol.parse_init(init_request(protocol.FUSE_INIT_EXT | 1, protocol.FUSE_PASSTHROUGH))
    assert (offer.major, offer.minor, offer.max_readahead) == (7, 45, 131072)
    assert offer.passthrough
    assert NATIVE.passthrough


def test_an_old_kernels_offer_has_no_second_word() -> None:
    offer = protocol.parse_init(init_request(1, None))
    assert (offer.flags2, offer.passthrough) == (0, False)


def test_passthrough_and_resending_are_added_where_they_are_offered() -> None:
    out = protocol.agree(init_reply(), NATIVE)
    assert protocol.REPLY.unpack_from(out) == (80, 0, 2)
    assert len(out) == 80
    fields = struct.unpack_from("<IIIIHHIIHHII", out, 16)
    assert fields[:3] == (7, 31, 131072)
    assert fields[3] == 0x40000009
    assert fields[4:6] == (protocol.MAX_BACKGROUND, protocol.MAX_BACKGROUND * 3 // 4)
    assert fields[6:10] == (4096, 1, 256, 0)
    assert fields[10] == 1 | protocol.FUSE_PASSTHROUGH | protocol.FUSE_HAS_RESEND
    assert fields[11] == 1, "the stack depth that passthrough needs"


def test_nothing_is_added_that_is_not_offered() -> None:
    out = protocol.agree(init_reply(), protocol.Offer(7, 38, 131072, 1, 0))
    assert struct.unpack_from("<I", out, 16 + 32)[0] == 1


@pytest.mark.parametrize("reply", [protocol.failure(2, errno.EPROTO), init_reply(24)])
def test_other_init_replies_stay_as_they_are(reply: bytes) -> None:
    assert protocol.agree(reply, NATIVE) == reply


@given(U64, U64, U32)
def test_reads_are_read(fh: int, offset: int, size: int) -> None:
    body = struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0)
    request = protocol.REQUEST.pack(40 + len(body), protocol.READ, 9, 5, 0, 0, 0, 0, 0) + body
    assert protocol.parse_read(request) == (fh, offset, size)
    assert protocol.parse_handle(request) == fh


@given(U64, U64, st.booleans(), st.integers(0, 2**31 - 1))
def test_an_open_gets_its_backing_file(unique: int, fh: int, keep: bool, backing: int) -> None:
    reply = protocol.opened(unique, fh, keep=keep, backing=backing)
    assert protocol.REPLY.unpack_from(reply) == (32, 0, unique)
    flags = 0x20 | (0x80 if backing else 0x02 if keep else 0)
    assert protocol.parse_open(reply) == (fh, flags)
    assert struct.unpack_from("<i", reply, 28) == (backing,)


def test_errors_and_the_resend_notice() -> None:
    assert protocol.REPLY.unpack(protocol.failure(7)) == (16, -errno.EIO, 7)
    assert protocol.REPLY.unpack(protocol.resend()) == (16, 7, 0), "unique 0: a notification, error: its code"


@given(U64, U64, U32)
def test_a_listing_that_is_kept_keeps_its_handle_and_flags(unique: int, fh: int, flags: int) -> None:
    reply = protocol.REPLY.pack(32, 0, unique) + struct.pack("<QIi", fh, flags, 0)
    kept = protocol.with_listing_kept(reply)
    assert kept[:24] == reply[:24]
    assert protocol.parse_open(kept) == (fh, flags | 0b1010)
