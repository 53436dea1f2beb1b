"""``Model``: a repository of the registry at a commit, and how it is kept near the pods that need it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from orchestrator.api.common import MAX_SECONDS, Commit, Condition, Count, Name, Part, Repo, Revision


class Source(Part, frozen=True, kw_only=True):
    """Where it comes from. It can't be changed: another repository is another Model."""

    repo: Repo
    pull: Literal["IfMissing", "Never"] = "IfMissing"
    """Whether the registry may fetch it from its upstream."""


class RevisionPolicy(Part, frozen=True, kw_only=True):
    """Which commit counts, and when that changes."""

    revision: Revision = "main"
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
    selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes among which they are chosen."""


class Storage(Part, frozen=True, kw_only=True):
    """How pods get it."""

    volume: Literal["Inline", "Claim"] = "Inline"
    """``Inline``: a CSI volume in the pod. ``Claim``: a PersistentVolumeClaim of ``storage_class_name``, made for each
    commit."""
    storage_class_name: Name | None = None
    format: Literal["files", "hub"] = "files"


class ModelSpec(Part, frozen=True, kw_only=True):
    source: Source
    revision: RevisionPolicy = RevisionPolicy()
    priority: Literal["pinned", "critical", "normal", "scratch"] = "critical"
    """The class that its files have in the nodes' caches (docs/csi.md)."""
    prefetch: Prefetch = Prefetch()
    storage: Storage = Storage()


class ModelStatus(Part, frozen=True, kw_only=True):
    """Conditions: ``Resolved``, ``Verified``, ``Prefetched``, and ``Ready``, which sums them up."""

    observed_generation: int = 0
    conditions: list[Condition] = field(default_factory=list)
    commit: Commit | None = None
    """The one that counts."""
    candidate: Commit | None = None
    """What the revision names, where that is another one."""
    revision: Revision | None = None
    """The revision that ``commit`` was resolved from."""
    size_bytes: int | None = None
    files: int | None = None
    nodes_cached: int = 0
    checked_at: str = ""
    """RFC 3339: when the registry said so; it is asked again and again, and that alone changes nothing here."""
