"""The token that clients send: from the environment or a file, to the configured registries alone."""

from __future__ import annotations

import os

import pytest

from helios.errors import UsageError
from helios.tokens import LOOK_AGAIN_S, TokenFile, token_of


def test_the_environment_wins_over_the_file(tmp_path):
    (tmp_path / "token").write_text("hls_file\n")
    assert token_of(str(tmp_path / "token"), {})() == "hls_file"
    assert token_of(str(tmp_path / "token"), {"HELIOS_TOKEN": " hls_env "})() == "hls_env"
    assert token_of("", {"HF_TOKEN": "hf_other"})() is None, "another service's token is not ours to send"


def test_a_file_that_is_replaced_is_read_again(tmp_path):
    now = [0.0]
    path = tmp_path / "token"
    path.write_text("one")
    token = TokenFile(path, clock=lambda: now[0])
    path.write_text("two")
    assert token() == "one"
    now[0] += LOOK_AGAIN_S
    assert token() == "two"
    os.unlink(path)
    now[0] += LOOK_AGAIN_S
    assert token() == "two", "while it is being replaced the last one counts"


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"a\nb", b"\xff", "ü".encode(), b"a\0b", b"x" * 5000])
def test_what_is_no_token_is_refused(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(UsageError):
        token_of(str(tmp_path / "token"), {})
    with pytest.raises(UsageError, match="can't be read"):
        token_of(str(tmp_path / "none"), {})
