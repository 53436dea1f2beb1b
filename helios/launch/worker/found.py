"""The model that a worker serves: a directory that is there already, and what it is called.

A volume of the CSI driver shows a commit's files, or a Hugging Face cache that holds that commit alone; both say of
themselves what they hold (``user.helios.repo`` and ``.commit``, or the cache's names). Any other directory is told by
``--name`` and ``--revision``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.errors import HeliosError, InvalidInput, NotFound, Unavailable, UsageError
from helios.home import Home
from helios.launch.serving import model_path
from helios.launch.shared_mount import mountpoint
from helios.launch.source import is_directory
from helios.mounts import find_mount
from helios.names import RepoId, is_commit, split_spec

REPO: Final = "models--"
PARTS: Final = 3
"""``org/name/commit``."""


@dataclass(frozen=True, slots=True)
class Found:
    """``path`` is the directory with config.json; ``revision``: the commit, empty where nobody says; ``mountpoint``: of
    the filesystem of this home, if it lies in that at ``org/name/commit``."""

    path: Path
    name: str
    revision: str
    mountpoint: Path | None = None


@contextlib.contextmanager
def readable(model: str | Path) -> Iterator[None]:
    """What can't be read of a model inside is an Unavailable outside."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"{model} can't be read: {error.strerror or error}",
            hint="A mounted model answers so where its source can't be reached; `helios status` on the node says why.",
        ) from None


def find(model: str, name: str, revision: str, home: Home, environ: Mapping[str, str] = os.environ) -> Found:
    """The model that the command line names: a directory, or ``org/name[@revision]`` in the cache that HF_HUB_CACHE
    names or in the mount of this home. ``name`` and ``revision``, where they are not empty, win over what it says.

    Raises UsageError, InvalidInput or NotFound with what is missing, Unavailable for a directory that can't be read.
    """
    with readable(model):
        found = _in_directory(Path(model).expanduser(), name) if is_directory(model) else _by_name(model, home, environ)
    name, revision = name or found.name, revision or found.revision
    if not name:
        raise UsageError(
            f"{found.path} does not say which model it holds", hint="Say it with --name ORG/NAME (HELIOS_WORKER__NAME)."
        )
    if revision and not is_commit(revision):
        raise UsageError(
            f"{revision!r} is not a commit: 40 hexadecimal digits", hint="Leave --revision out, or say all."
        )
    return Found(found.path, name, revision, found.mountpoint or _mount_of(found.path, home))


def _mount_of(path: Path, home: Home) -> Path | None:
    at = mountpoint(home)
    whole = path.is_relative_to(at) and len(path.relative_to(at).parts) == PARTS and is_commit(path.name)
    return at if whole and find_mount(at) is not None else None


def _in_directory(directory: Path, name: str) -> Found:
    if not directory.is_dir():
        raise InvalidInput(f"{directory} is not a directory", hint="MODEL is a mounted directory, or ORG/NAME.")
    if (directory / "config.json").exists():
        return _plain(directory)
    snapshots = _snapshots(directory)
    if name:
        snapshots = [one for one in snapshots if one.name == name]
    if len(snapshots) == 1:
        return snapshots[0]
    if not snapshots:
        raise InvalidInput(
            f"{directory} has neither a config.json nor {f'a snapshot of {name}' if name else 'a snapshot of a model'}",
            hint="Name the directory that holds config.json and the weights, or a Hugging Face cache.",
        )
    raise UsageError(
        f"{directory} is a cache of several snapshots: "
        + ", ".join(sorted(f"{one.name}@{one.revision[:12]}" for one in snapshots)),
        hint=f"Name one: HF_HUB_CACHE={directory} helios worker ORG/NAME@COMMIT.",
    )


def _plain(directory: Path) -> Found:
    """A directory with config.json, and what it says of itself: by attributes, or by its place in a Hub's cache."""
    try:
        repo, commit = (os.getxattr(directory, f"user.helios.{key}").decode() for key in ("repo", "commit"))
        return Found(directory, repo.partition("/")[2] if repo.startswith("models/") else repo, commit)
    except OSError:  # no mount of ours
        pass
    *_, cached, kind, commit = ("", "", *directory.resolve().parts)
    if kind == "snapshots" and cached.startswith(REPO) and is_commit(commit):
        return Found(directory, _name(cached), commit)
    return Found(directory, "", "")


def _snapshots(cache: Path) -> list[Found]:
    """The models that a Hub's cache holds, each at each commit; of one whose ``main`` is there that commit alone."""
    found = []
    for repo in sorted(cache.glob(f"{REPO}*")):
        commits = [path.name for path in sorted(repo.glob("snapshots/*")) if is_commit(path.name)]
        main = _ref(repo, "main")
        chosen = [main] if main in commits else commits
        found += [Found(repo / "snapshots" / commit, _name(repo.name), commit) for commit in chosen]
    return found


def _ref(repo: Path, ref: str) -> str:
    path = repo / "refs" / ref
    return path.read_text().strip() if path.is_file() else ""


def _name(cached: str) -> str:
    """``models--org--name`` as ``org/name``."""
    return cached.removeprefix(REPO).replace("--", "/", 1)


def _by_name(model: str, home: Home, environ: Mapping[str, str]) -> Found:
    try:
        repo, revision = split_spec(model)
    except HeliosError as error:
        raise UsageError(f"{error.message}; MODEL is a directory or org/name[@revision]") from None
    cache = environ.get("HF_HUB_CACHE") or (f"{environ['HF_HOME']}/hub" if environ.get("HF_HOME") else "")
    looked = []
    if cache:
        held = Path(cache).expanduser() / f"{REPO}{repo.id.replace('/', '--')}"
        commit = revision if is_commit(revision) else _ref(held, revision)
        if commit and (held / "snapshots" / commit / "config.json").exists():
            return Found(held / "snapshots" / commit, repo.id, commit)
        looked.append(f"the cache {cache}")
    if find_mount(at := mountpoint(home)) is not None:
        if path := _mounted(at, repo, revision):
            return Found(path, repo.id, path.name, at)
        looked.append(f"the mount {at}")
    raise NotFound(
        f"{repo.id}@{revision} is not in {' nor in '.join(looked) or 'a cache or a mount: there is none'}",
        hint="Name the directory where the volume is mounted, or the cache with HF_HUB_CACHE; `helios serve` mounts.",
    )


def _mounted(at: Path, repo: RepoId, revision: str) -> Path | None:
    if is_commit(revision):
        path = model_path(at, repo, revision)
    else:
        path = Path(os.path.realpath(model_path(at, repo, f"@{revision}")))
    return path if (path / "config.json").exists() else None
