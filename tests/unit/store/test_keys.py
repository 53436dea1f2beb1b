"""Names of objects never leave the store's root, and kinds never meet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import InvalidInput
from helios.names import RepoId
from heliosfs.store import keys

SHA = "ab" * 32


@given(st.text("abAB01./_-@\\ \0é", max_size=30))
def test_a_valid_key_is_a_plain_relative_path(text: str) -> None:
    try:
        keys.check_key(text)
    except InvalidInput:
        return
    segments = text.split("/")
    assert len(segments) >= 2
    assert all(s and s[0] not in ".-" and set(s) <= set("abAB01._-") for s in segments)


@pytest.mark.parametrize(
    "key",
    ["", "public", "/public/a", "public/", "public//a", "public/../a", "public/.staging", ".staging/a", "Public/a",
     "public/a b", "public/\n", "public/a\n", "public/" + "a" * 256, "p/" + "a/" * 500 + "a", "-a/b", "public/é"],
)  # fmt: skip
def test_unsafe_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not an object key|is not a domain"):
        keys.check_key(key)


def test_names_of_objects() -> None:
    assert keys.blob_key("public", SHA) == f"public/blobs/ab/{SHA}"
    assert keys.recipe_key("public", SHA) == f"public/recipes/ab/{SHA}"
    assert keys.manifest_key("t-1", SHA) == f"t-1/manifests/ab/{SHA}"
    assert keys.pack_key("public", SHA[:32]) == f"public/packs/ab/{SHA[:32]}"
    org, single = RepoId.parse("org/name"), RepoId.parse("gpt2", "datasets")
    assert keys.commit_key("public", org, SHA[:40]) == f"public/commits/models/org/name/{SHA[:40]}"
    assert keys.commit_key("public", single, SHA[:40]) == f"public/commits/datasets/_/gpt2/{SHA[:40]}"
    for key in (keys.blob_key("public", SHA), keys.commit_key("public", org, SHA[:40])):
        assert keys.check_key(key) == key


@pytest.mark.parametrize("name", ["", "AB" * 32, "ab" * 31, "ab" * 33, "../" + "a" * 61, "g" * 64])
def test_objects_are_named_by_hashes_only(name: str) -> None:
    for make in (keys.blob_key, keys.recipe_key, keys.manifest_key, keys.pack_key):
        with pytest.raises(InvalidInput):
            make("public", name)


@pytest.mark.parametrize("domain", ["", "a/b", "..", "A", "-a", "a" * 64, "a\n"])
def test_bad_domains_are_refused(domain: str) -> None:
    with pytest.raises(InvalidInput):
        keys.blob_key(domain, SHA)
    with pytest.raises(InvalidInput):
        keys.check_domain(domain)
