"""What volumes ask for, where they may be, and what of it the kernel's table shows."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi import attributes, errors, targets
from csi.attributes import PREFIX
from helios.errors import BY_CODE, HeliosError, InvalidInput, UpstreamUnavailable
from helios.mounts import mount_table

C = "1" * 40


@pytest.mark.parametrize(
    ("given", "revision", "commit", "form", "prefetch"),
    [
        ({}, "main", None, "model", None),
        ({"revision": "v1", "format": "hub", "prefetch": "true"}, "v1", None, "hub", ()),
        ({"revision": "", "commit": "", "format": "", "prefetch": "false"}, "main", None, "model", None),
        ({"revision": "v1", "commit": C}, "v1", C, "model", None),
        ({"revision": C}, C, C, "model", None),
        ({"revision": C, "commit": C, "prefetch": "*.json, a/*.bin"}, C, C, "model", ("*.json", "a/*.bin")),
    ],
)
def test_attributes_are_read(given, revision, commit, form, prefetch):
    others = {"csi.storage.k8s.io/pod.name": "p", "storage.kubernetes.io/csiProvisionerIdentity": "x"}
    wanted = attributes.read({"model": "org/name", **given, **others}, where="x")
    assert (str(wanted.repo), wanted.revision, wanted.commit) == ("models/org/name", revision, commit)
    assert (wanted.form, wanted.prefetch) == (form, prefetch)


def test_a_volume_may_have_a_class():
    assert attributes.read({"model": "org/name", "priority": "pinned"}, where="x").priority == "pinned"
    assert attributes.read({"model": "org/name", "priority": ""}, where="x").priority is None
    with pytest.raises(InvalidInput, match="known: scratch, normal, critical, pinned"):
        attributes.read({"model": "org/name", "priority": "high"}, where="x")


def test_datasets_have_a_canonical_name():
    assert str(attributes.read({"repo": "datasets/org/d"}, where="x").repo) == "datasets/org/d"


@given(st.text(max_size=130))
def test_an_id_that_is_taken_is_a_single_name_and_a_volume_of_the_mount(text):
    try:
        attributes.check_volume_id(text)
    except InvalidInput:
        return
    assert "/" not in text
    assert text not in (".", "..")
    assert 0 < len((PREFIX + text).encode()) <= 128


def test_every_error_has_a_status_and_kinds_have_their_own():
    assert all(errors.status_of(kind("x")).isupper() for kind in BY_CODE.values())
    assert errors.status_of(UpstreamUnavailable("x")) == "UNAVAILABLE"
    assert errors.status_of(HeliosError("x")) == "INTERNAL"
    assert errors.status_of(errors.Pending("x")) == "ABORTED"


TABLE = """43 27 0:40 / /mnt ro - fuse.helios helios ro
44 27 0:40 /.volumes/csi.a/model /k/pods/1/mount ro - fuse.helios helios ro
45 27 0:40 /.volumes/csi.b/hub//deleted /k/pods/2/mount ro - fuse.helios helios ro
46 27 0:40 /.volumes/csi.a/model /elsewhere ro - fuse.helios helios ro
47 27 0:41 /.volumes/csi.a/model /k/pods/3/mount ro - ext4 /dev/sda ro
48 27 0:40 /org/name/1 /k/pods/4/mount ro - fuse.helios helios ro
"""


def test_what_is_published_is_in_the_kernels_table():
    found = targets.published(mount_table(TABLE), Path("/k"))
    assert [(p.volume, p.form, str(p.target), p.device) for p in found] == [
        ("csi.a", "model", "/k/pods/1/mount", "0:40"),
        ("csi.b", "hub", "/k/pods/2/mount", "0:40"),
    ]


def test_a_target_below_the_kubelets_directory_may_be_named_through_its_link(tmp_path):
    real, link = tmp_path / "data", tmp_path / "kubelet"
    (real / "pods").mkdir(parents=True)
    link.symlink_to(real)
    (real / "out").symlink_to("/etc")
    for base in (real, link):
        assert targets.check_target(f"{base}/pods/x", link) == real / "pods/x"
    for bad in (f"{link}/out/x", f"{link}/pods/../../x", str(link), str(real), f"{tmp_path}/x", "pods/x", "/a\0b", ""):
        with pytest.raises(InvalidInput, match=r"target_path"):
            targets.check_target(bad, link)
