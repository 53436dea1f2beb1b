"""Tenants: who sees and writes what, and with which token."""

import hashlib
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.accepted import LOOK_AGAIN_S, Tokens
from helios.config import TenantSettings
from helios.errors import Forbidden, RepoNotFound, Unauthorized, UsageError
from helios.names import RepoId
from registry.access import BAD_CREDENTIALS, PUBLIC, Tenants

M = RepoId.parse


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def test_without_tenants_everything_is_open():
    access = Tenants({}).access(None, None)
    assert access == replace(PUBLIC, admin=True)
    for repo in (M("a/b"), M("solo"), M("a/b", "datasets")):
        assert access.visible(repo)
        assert access.writable(repo)


def test_what_a_tenant_owns_exists_for_nobody_else():
    tenants = Tenants({
        "acme": TenantSettings(owns=["acme/*"]),
        "rival": TenantSettings(sees=["*"], owns=["rival/*", "datasets/shared/*"]),
        "reader": TenantSettings(sees=["open/*", "acme/*"]),
    })  # fmt: skip
    outside, acme, rival, reader = (tenants.access(name, None) for name in (None, "acme", "rival", "reader"))
    assert [a.visible(M("acme/m")) for a in (outside, acme, rival, reader)] == [False, True, False, False]
    assert [a.visible(M("open/m")) for a in (outside, acme, rival, reader)] == [True, True, True, True]
    assert [a.visible(M("other/m")) for a in (outside, acme, rival, reader)] == [True, True, True, False]
    assert [a.visible(M("shared/d", "datasets")) for a in (outside, acme, rival)] == [False, False, True]
    assert rival.visible(M("shared/d"))
    assert not rival.writable(M("shared/d"))  # a model, where only datasets are owned
    assert [a.writable(M("open/m")) for a in (outside, acme, rival, reader)] == [True, False, False, False]
    assert [a.writable(M("acme/m")) for a in (outside, acme, rival, reader)] == [False, True, False, False]
    with pytest.raises(Forbidden, match="may read open/m"):
        acme.check_writable(M("open/m"))
    with pytest.raises(RepoNotFound, match="no repository 'acme/m'"):
        rival.check_writable(M("acme/m"))


@given(st.lists(st.sampled_from(["a/*", "b/*", "*", "a/m", "datasets/a/*"]), max_size=3), st.booleans())
def test_nobody_writes_what_he_does_not_see(owns, dataset):
    tenants = Tenants({"one": TenantSettings(owns=owns), "two": TenantSettings(owns=["b/*"], sees=["a/*"])})
    for name in (None, "one", "two"):
        access = tenants.access(name, None)
        for repo in (M("a/m", "datasets" if dataset else "models"), M("b/m"), M("m")):
            assert access.visible(repo) or not access.writable(repo)


def test_a_tenant_that_needs_a_token(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"# of acme\n\n{digest('hls_one')} laptop of Ann\n{digest('hls_two')}\n")
    tenants = Tenants({"acme": TenantSettings(tokens=str(file))})
    assert tenants.access("acme", "Bearer hls_one").label == "laptop of Ann"
    assert tenants.access("acme", "bearer hls_two").label == ""
    for missing in (None, "", "Basic aGVsbG8=", "Bearer ", "hls_one"):
        with pytest.raises(Unauthorized, match="needs a token"):
            tenants.access("acme", missing)
    for wrong in ("Bearer hf_x", f"Bearer {digest('hls_one')}", "Bearer hls_one2", "Bearer \udcff"):
        with pytest.raises(Unauthorized) as caught:
            tenants.access("acme", wrong)
        assert caught.value.message == BAD_CREDENTIALS
    with pytest.raises(RepoNotFound, match="no tenant 'evil'"):
        tenants.access("evil", "Bearer hls_one")
    assert tenants.access(None, "Bearer hf_x").tenant is None


def test_tokens_change_while_the_registry_runs(tmp_path, caplog):
    file, now = tmp_path / "tokens", [0.0]
    file.write_text(digest("old"))
    tokens = Tokens(file, clock=lambda: now[0])
    file.write_text(digest("new") + "\n")
    now[0] += LOOK_AGAIN_S
    assert (tokens.label("old"), tokens.label("new")) == (None, "")
    file.write_text("nonsense")
    now[0] += LOOK_AGAIN_S
    assert tokens.label("new") == ""
    assert "the tokens known so far count" in caplog.text
    file.unlink()
    now[0] += LOOK_AGAIN_S
    assert tokens.label("new") == ""
    assert "new" not in caplog.text.replace("known", "")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("acme", None, "can't be read"),
        ("acme", b"hls_a_token_in_clear", "not the sha256"),
        ("acme", b"AB" * 32, "not the sha256"),
        ("acme", b"\xff", "can't be read"),
        ("A/b", b"", "is not a name"),
        ("x" * 64, b"", "is not a name"),
    ],
)
def test_settings_that_are_wrong(tmp_path, name, content, what):
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=what) as caught:
        Tenants({name: TenantSettings(tokens=str(file))})
    assert "in_clear" not in str(caught.value)


def test_a_file_of_tokens_that_may_not_be_read(tmp_path):
    if os.getuid() == 0:
        file = tmp_path  # root reads every file, but no directory as one
    else:
        file = tmp_path / "tokens"
        file.write_text("")
        file.chmod(0)
    with pytest.raises(UsageError, match="can't be read"):
        Tokens(file)


def test_a_namespace_reads_what_its_tenants_read_and_others_what_nobody_owns():
    tenants = Tenants(
        {
            "acme": TenantSettings(owns=["acme/*"], sees=["open/*"], namespaces=["acme", "team-*"]),
            "rival": TenantSettings(owns=["rival/*"], namespaces=["rival", "team-both"]),
            "none": TenantSettings(owns=["none/*"]),
        }
    )

    def reads(namespace, *, restricted=()):
        names = ("acme/m", "rival/m", "none/m", "open/m", "other/m")
        found = {n: tenants.why_not(namespace, RepoId.parse(n), {f"models/{r}" for r in restricted}) for n in names}
        return {name for name, reason in found.items() if reason is None}

    assert reads("acme") == reads("team-1") == {"acme/m", "open/m"}
    assert reads("rival") == {"rival/m", "open/m", "other/m"}
    assert reads("team-both") == {"acme/m", "rival/m", "open/m", "other/m"}
    assert reads("somebody") == reads("none") == reads("acme-2") == {"open/m", "other/m"}
    assert reads("somebody", restricted=["open/m"]) == {"other/m"}
    assert "is of acme, who may not read rival/m" in tenants.why_not("acme", RepoId.parse("rival/m"), set())
    assert "is of no tenant" in tenants.why_not("x", RepoId.parse("rival/m"), set())
    assert "gated" in tenants.why_not("x", RepoId.parse("open/m"), {"models/open/m"})
