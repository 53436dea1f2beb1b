"""Refs and repositories as file names."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from helios.errors import InvalidInput
from helios.names import KINDS, RepoId, check_ref
from heliosfs.tree.names import hub_folder, hub_repo, ref_name, ref_of

PART = st.text("ab-._1", min_size=1, max_size=6)


@given(st.lists(st.text("abAZ09._+-", min_size=1, max_size=5), min_size=1, max_size=4).map("/".join))
def test_a_ref_survives_as_a_file_name(ref):
    try:
        check_ref(ref)
    except InvalidInput:
        assume(False)
    assert ref_of(ref_name(ref)) == ref
    assert "/" not in ref_name(ref)


@given(st.sampled_from(KINDS), st.lists(PART, min_size=1, max_size=2).map("/".join))
def test_a_repository_survives_as_a_cache_folder(kind, text):
    try:
        repo = RepoId.parse(text, kind)
    except InvalidInput:
        assume(False)
    assert hub_repo(hub_folder(repo)) == repo


@given(st.text("model-s./@_%", max_size=20))
def test_a_cache_folder_is_of_one_repository_or_none(folder):
    repo = hub_repo(folder)
    assert repo is None or hub_folder(repo) == folder


@pytest.mark.parametrize("name", ["main", "@", "@a b", "@a%2F", "@..", "@" + "0" * 40, "@a/b", "", "@%2Fa"])
def test_other_names_show_no_ref(name):
    assert ref_of(name) is None
