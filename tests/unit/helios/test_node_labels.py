"""The keys of labels for cached models: what whoever places pods computes is what the driver sets."""

import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import InvalidInput
from helios.names import RepoId
from helios.node_labels import PREFIX, cached_key

COMMIT = "52673c5d519832a792278d18ec54d7b67782710e"
KEY = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
PART = st.from_regex(r"[A-Za-z0-9_](?:[A-Za-z0-9._]{0,94}[A-Za-z0-9_])?", fullmatch=True)


def test_a_key_is_what_the_shell_computes_too():
    """Forever: nodes of one version are preferred by an operator of another."""
    assert cached_key(RepoId.parse("org/name"), COMMIT) == "helios.dev/cached-cbbdb928d20e14c7"
    text = f"printf %s models/org/name@{COMMIT} | sha256sum | cut -c1-16"
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    assert PREFIX + done.stdout.strip() == cached_key(RepoId.parse("org/name"), COMMIT)


@given(PART, PART, st.sampled_from(["models", "datasets"]), st.from_regex(r"[0-9a-f]{40}", fullmatch=True))
def test_a_key_is_one_that_kubernetes_takes(org, name, kind, commit):
    try:
        repo = RepoId.parse(f"{org}/{name}", kind)
    except InvalidInput:
        return
    assert KEY.fullmatch(cached_key(repo, commit))
    assert cached_key(repo, commit) != cached_key(repo, "0" * 40 if commit != "0" * 40 else "1" * 40)


@pytest.mark.parametrize("commit", ["main", "", COMMIT[:12], COMMIT.upper()])
def test_what_is_no_commit_has_no_key(commit):
    with pytest.raises(InvalidInput, match="no commit"):
        cached_key(RepoId.parse("org/name"), commit)
