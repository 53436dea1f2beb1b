"""The body of a commit: what clients send is read however it is cut into pieces, anything else is refused."""

import contextlib
import json
from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import InvalidInput
from registry.hub.upload.ndjson import (
    MAX_LINE,
    MAX_REGULAR,
    CommitBody,
    Content,
    Copy,
    Delete,
    Header,
    Stored,
)

SHA = "a" * 64
HEAD = {"key": "header", "value": {"summary": "One", "description": "more", "parentCommit": "b" * 40}}
TABLE = [
    ({"key": "file", "value": {"path": "a/ü", "content": b64encode(b"x\0").decode(), "encoding": "base64"}},
     Content("a/ü", b"x\0")),
    ({"key": "file", "value": {"path": "a", "content": "grüß"}}, Content("a", "grüß".encode())),
    ({"key": "file", "value": {"path": "a", "content": "", "encoding": "base64"}}, Content("a", b"")),
    ({"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": SHA, "size": 5}}, Stored("a", SHA, 5)),
    ({"key": "lfsFile", "value": {"path": "a", "oid": SHA, "new": True}}, Stored("a", SHA, None)),
    ({"key": "deletedFile", "value": {"path": "a"}}, Delete("a", False)),
    ({"key": "deletedFolder", "value": {"path": "a/b/"}}, Delete("a/b", True)),
    ({"key": "copyFile", "value": {"path": "a", "srcPath": "b", "srcRevision": "v1"}}, Copy("a", "b", "v1")),
]  # fmt: skip


def read(data: bytes, size: int = 1 << 30) -> tuple[Header, list]:
    body = CommitBody()
    found = [body.read(line) for at in range(0, len(data), size) for line in body.lines(data[at : at + size])]
    found.append(body.read(body.rest()))
    return body.end(), [operation for operation in found if operation is not None]


def lines(*items: object) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


@given(st.lists(st.sampled_from(TABLE), max_size=6), st.integers(1, 200), st.booleans(), st.booleans())
def test_however_it_arrives(rows, size, last_newline, windows):
    data = lines(HEAD, *(row[0] for row in rows))
    data = data if last_newline else data[:-1]
    data = data.replace(b"\n", b"\r\n") if windows else data
    header, found = read(data, size)
    assert header == Header("One\n\nmore", "b" * 40)
    assert found == [row[1] for row in rows]


def test_a_header_alone():
    assert read(lines({"key": "header", "value": {"summary": "x"}})) == (Header("x", None), [])


BAD = [
    (b"", "starts with a header"),
    (b"\n\n", "starts with a header"),
    (lines(TABLE[0][0]), "header comes first"),
    (lines({"key": "header", "value": {}}), "line 1 of the commit is malformed"),
    (lines({"key": "header", "value": {"summary": "x", "parentCommit": "main"}}), "not a commit"),
    (lines({"key": "header", "value": {"summary": "x" * 100_000}}), "longer than"),
    (lines(HEAD, {"key": "chmod", "value": {}}), "no operation 'chmod'"),
    (lines(HEAD) + b"{\n", "line 2 of the commit is malformed"),
    (lines(HEAD) + b"\xff\n", "line 2 of the commit is malformed"),
    (lines(HEAD) + b"[" * 100_000, "line 2 of the commit is malformed"),
    (lines(HEAD, {"key": "file", "value": {"path": "a", "content": "?", "encoding": "base64"}}), "malformed"),
    (lines(HEAD, {"key": "file", "value": {"path": "a", "content": "x", "encoding": "rot13"}}), "malformed"),
    (lines(HEAD, {"key": "file", "value": {"path": "../a", "content": ""}}), "'..'"),
    (lines(HEAD, {"key": "file", "value": {"path": "/a", "content": ""}}), "absolute"),
    (lines(HEAD, {"key": "file", "value": {"path": "a\0", "content": ""}}), "control character"),
    (lines(HEAD, {"key": "file", "value": {"path": "\ud800", "content": ""}}), "line 2"),
    (lines(HEAD, {"key": "lfsFile", "value": {"path": "a", "oid": "A" * 64}}), "not a sha256"),
    (lines(HEAD, {"key": "lfsFile", "value": {"path": "a", "oid": SHA, "algo": "md5"}}), "malformed"),
    (lines(HEAD, {"key": "deletedFolder", "value": {"path": "/"}}), "empty"),
    (lines(HEAD, {"key": "copyFile", "value": {"path": "a", "srcPath": "../b"}}), "'..'"),
    (lines(HEAD, {"key": "file", "value": {"path": "a", "content": "x" * (MAX_REGULAR + 1)}}), "use LFS"),
    (lines(HEAD) + b'"' + b"x" * (MAX_LINE + 10), "longer than"),
]


@pytest.mark.parametrize(("data", "what"), BAD, ids=[what for _, what in BAD])
def test_what_is_wrong_is_said_with_its_line(data, what):
    with pytest.raises(InvalidInput, match=what):
        read(data)
    with pytest.raises(InvalidInput):
        read(data, 1 << 16)


@given(st.binary(max_size=300))
def test_nothing_breaks_it(data):
    for text in (data, lines(HEAD) + data):
        with contextlib.suppress(InvalidInput):
            read(text, 50)
