"""The Hub's JSON, made from manifests and commit records.

A file's ``xetHash`` stands in listings exactly when its HEAD has one (registry/xet): a client that sees one in a
listing alone looks for a Xet service and fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from typing import Any

from helios.names import RepoId
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest, lfs_pointer
from registry.card import tags_of
from registry.hub.tree import Directory, Node
from registry.pull.names import HEADS, PREFIXES, TAGS, Past

Json = dict[str, Any]


def moment(seconds: int) -> str:
    """A time as the Hub writes it; clients parse it with milliseconds and Z."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def info(
    repo: RepoId,
    record: CommitRecord,
    manifest: Manifest,
    card: Json,
    *,
    blobs: bool,
    security: bool,
    restricted: bool = False,
) -> Json:
    """A repository at a commit; ``restricted``: its upstream lets not everybody read it."""
    out = summary(repo, record, card)
    out["gated"] = "auto" if restricted else False
    if card:
        out["cardData"] = card
    out["siblings"] = [_sibling(path, entry, blobs) for path, entry in sorted(manifest.files.items())]
    out["usedStorage"] = sum({e.sha256 or e.git_oid: e.size for e in manifest.files.values()}.values())
    if security:
        out["securityRepoStatus"] = {"scansDone": False, "filesWithIssues": []}
    return out


def summary(repo: RepoId, record: CommitRecord, card: Mapping[str, Any]) -> Json:
    """What stands in listings: a repository without its files."""
    lineage = [f"base_model:{base}" for base in record.lineage.get("base_model", "").split(",") if base]
    out: Json = {
        "_id": record.commit[:24],
        "id": repo.id,
        "author": repo.org or record.author,
        "sha": record.commit,
        "lastModified": moment(record.time),
        "createdAt": moment(record.time),
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(dict.fromkeys([*tags_of(card), *lineage])),
    }
    if repo.kind == "models":
        out["modelId"] = repo.id
        out |= {key: card[key] for key in ("pipeline_tag", "library_name") if isinstance(card.get(key), str)}
    return out


def tree_item(path: str, node: Node, xet: Mapping[str, str]) -> Json:
    """A file or directory in a listing; ``xet`` has Xet hashes by sha256."""
    match node:
        case Directory(oid):
            return {"type": "directory", "oid": oid, "size": 0, "path": path}
        case FileEntry():
            item: Json = {"type": "file", "oid": node.git_oid, "size": node.size, "path": path}
            if node.lfs:
                item["lfs"] = {"oid": node.sha256, "size": node.size, "pointerSize": _pointer_size(node)}
            if node.sha256 in xet:
                item["xetHash"] = xet[node.sha256]
            return item


def expansion(last: CommitRecord, node: Node) -> Json:
    """What ``expand=true`` adds to a listing's item; files here are verified, not scanned."""
    out: Json = {"lastCommit": {"id": last.commit, "title": title(last), "date": moment(last.time)}}
    if isinstance(node, FileEntry):
        scan = {"status": "unscanned"}
        out["securityFileStatus"] = {**scan, "avScan": scan, "pickleImportScan": scan}
    return out


def refs(targets: Mapping[str, str], *, include_prs: bool) -> Json:
    """A repository's refs, by their full names (``refs/heads/main``)."""
    out: Json = {"branches": [], "converts": [], "tags": []}
    if include_prs:
        out["pullRequests"] = []
    for ref, commit in sorted(targets.items()):
        for kind, prefix in PREFIXES.items():
            if kind in out and ref.startswith(prefix):
                out[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit})
    return out


def full_name(name: str, kind: str) -> str:
    """The full name of a ref of ours: ``refs/pr/1`` has its own, tags and branches (and aliases) go by bare names."""
    return name if name.startswith("refs/") else f"{TAGS if kind == 'tag' else HEADS}{name}"


def changed_by(past: Past) -> Json:
    """The commit that changed a path last."""
    return {"id": past.commit, "title": past.title, "date": moment(past.time)}


def past_item(past: Past, *, formatted: bool) -> Json:
    """A commit of the upstream's history."""
    out: Json = {
        "id": past.commit,
        "title": past.title,
        "message": past.message,
        "authors": [{"user": past.author, "avatar": ""}],
        "date": moment(past.time),
    }
    return out | _formatted(out) if formatted else out


def commit_item(record: CommitRecord, *, formatted: bool) -> Json:
    """A commit in the history; ``formatted`` adds title and message as HTML."""
    first, _, rest = record.message.strip().partition("\n")
    out: Json = {
        "id": record.commit,
        "title": first or title(record),
        "message": rest.strip(),
        "authors": [{"user": record.author, "avatar": ""}],
        "date": moment(record.time),
    }
    return out | _formatted(out) if formatted else out


def _formatted(item: Json) -> Json:
    return {"formatted": {"title": escape(item["title"]), "message": escape(item["message"]).replace("\n", "<br>")}}


def lfs_file(path: str, entry: FileEntry, record: CommitRecord) -> Json:
    """An LFS file in the list of them."""
    return {
        "fileOid": entry.sha256, "oid": entry.sha256, "filename": path, "size": entry.size, "ref": None,
        "pushedAt": moment(record.time),
    }  # fmt: skip


def title(record: CommitRecord) -> str:
    """The first line of the commit's message."""
    return record.message.strip().partition("\n")[0] or f"Commit {record.commit[:8]}"


def _sibling(path: str, entry: FileEntry, blobs: bool) -> Json:
    item: Json = {"rfilename": path}
    if blobs:
        item |= {"blobId": entry.git_oid, "size": entry.size}
        if entry.lfs:
            item["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
    return item


def _pointer_size(entry: FileEntry) -> int:
    return len(lfs_pointer(entry.sha256, entry.size))
