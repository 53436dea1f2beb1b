"""``Model``: a repository of the registry at a commit, and how it is kept near the pods that need it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from orchestrator.api.common import (
    MAX_SECONDS,
    Commit,
    Conditions,
    Count,
    Part,
    Repo,
    Revision,
    Selector,
    ShortCommit,
    Subdomain,
    Time,
    Whole,
)


class Source(Part, frozen=True, kw_only=True):
    """Where it comes from. It can't be changed: another repository is another Model."""

    repo: Repo
    """Its repository at the registry, ``org/name``."""
    pull: Literal["IfMissing", "Never"] = "IfMissing"
    """Whether the registry may fetch it from its upstream."""


class RevisionPolicy(Part, frozen=True, kw_only=True):
    """Which commit counts, and when that changes."""

    revision: Revision = "main"
    """A branch, a tag, an alias or a commit."""
    policy: Literal["Pinned", "Follow", "Approve"] = "Pinned"
    """``Pinned``: the commit that the revision named first, until ``revision`` is changed. ``Follow``: whatever it
    names. ``Approve``: what it names is shown as ``status.candidate``, and ``approved`` is what counts."""
    approved: Commit | None = None
    """With ``Approve``; as long as there is none, the commit that the revision named first."""
    check_seconds: Annotated[int, Meta(ge=5, le=MAX_SECONDS)] = 60
    """With ``Follow`` and ``Approve``: how often the registry is asked what the revision names."""
    require_verified: bool = False
    """Whether only a commit counts whose signature the registry has verified."""


class Prefetch(Part, frozen=True, kw_only=True):
    """Nodes that have it before a pod needs it."""

    nodes: Count = 0
    """On how many, at least."""
    selector: Selector = field(default_factory=dict)
    """Labels of the nodes among which they are chosen."""


class Storage(Part, frozen=True, kw_only=True):
    """How pods get it."""

    volume: Literal["Inline", "Claim"] = "Inline"
    """``Inline``: a CSI volume in the pod. ``Claim``: a PersistentVolumeClaim of ``storage_class_name``, made for each
    commit."""
    storage_class_name: Subdomain | None = None
    """The StorageClass of the claims; its provisioner is the CSI driver."""
    format: Literal["files", "hub"] = "files"
    """``files``: the commit's files. ``hub``: a Hugging Face cache with this commit."""


class ModelSpec(Part, frozen=True, kw_only=True):
    """What is wanted of a model."""

    source: Source
    revision: RevisionPolicy = RevisionPolicy()
    priority: Literal["pinned", "critical", "normal", "scratch"] = "critical"
    """The class that its files have in the nodes' caches (docs/csi.md)."""
    prefetch: Prefetch = Prefetch()
    storage: Storage = Storage()


class ModelStatus(Part, frozen=True, kw_only=True):
    """Conditions: ``Resolved``, ``Verified``, ``Prefetched``, and ``Ready``, which sums them up."""

    observed_generation: Whole = 0
    """Of the specification that this is about."""
    conditions: Conditions = field(default_factory=list)
    """What is the case, since when and why."""
    commit: Commit | None = None
    """The one that counts."""
    short_commit: ShortCommit = ""
    """Its first digits, for people."""
    candidate: Commit | None = None
    """What the revision names, where that is another one."""
    revision: Revision | None = None
    """The revision that ``commit`` was resolved from."""
    size_bytes: Whole | None = None
    """Of all its files."""
    nodes_cached: Whole = 0
    """Nodes that have all of it."""
    checked_at: Time = ""
    """RFC 3339: when the registry said that ``commit`` or ``candidate`` is what the revision names. It is not written
    anew each time that it says so again."""
