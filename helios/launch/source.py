"""Where the model comes from: made on the spot, a directory, the registry, or the upstream Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.cli.common import size_text
from helios.errors import InvalidInput, NotFound, UsageError
from helios.home import Home
from helios.launch.progress import Progress, Stage
from helios.launch.tiny_model import tiny_llama
from helios.names import RepoId, split_spec
from helios.publish import publish, scan
from helios.registry_client import RegistryClient

TINY: Final = RepoId.parse("helios/tiny-llama")
PULL_S: Final = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Published:
    """A model in the registry. ``stored`` says what publishing it cost, for people."""

    repo: RepoId
    commit: str
    stored: str


def is_directory(model: str) -> bool:
    """Whether MODEL names a directory: it looks like a path, or there is one."""
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..") or Path(model).is_dir()


def name_for(directory: Path) -> RepoId:
    """``local/<name of the directory>``, with what the Hub does not allow in a name replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+|\.\.+|--+", "-", directory.resolve().name).strip("-.")
    return RepoId.parse(f"local/{name or 'model'}")


def obtain(model: str | None, name: RepoId | None, home: Home, client: RegistryClient, progress: Progress) -> Published:
    """Make or take the model and publish it; two stages of the progress.

    ``model`` is None (the tiny Llama), a directory, or ``org/name[@revision]``, which is pulled unless the registry has
    it. ``name`` overrides the name a directory is published under.
    """
    if model is not None and not is_directory(model):
        return _from_hub(model, client, progress)
    from heliosfs.store.sending import ByChunks

    with progress.stage("Model") as stage:
        if model is None:
            stage.doing("a tiny Llama: random weights, a tokenizer of its own, a chat template")
            directory, repo = tiny_llama(home.root / "models"), TINY
        else:
            directory = Path(model).expanduser()
            if not directory.is_dir():
                raise InvalidInput(f"{directory} is not a directory", hint="MODEL is a directory or org/name.")
            repo = name or name_for(directory)
        files = scan(directory)
        total = sum(file.size for file in files)
        stage.done(f"{directory}: {len(files)} files, {size_text(total)}")
    with progress.stage("Publish") as stage:
        stage.doing(f"as {repo.id}")

        def show(done: int) -> None:
            stage.figure(f"{size_text(done)} of {size_text(total)}")

        pushed = publish(
            client, directory, repo, "main", message="helios quickstart", files=files, progress=show, sender=ByChunks()
        )
        new, old = pushed.new_bytes, pushed.deduplicated_bytes
        stored = f"{size_text(new)} new, {size_text(old)} deduplicated"
        stage.done(f"{repo.id}@{pushed.commit[:12]}: {stored}")
    return Published(repo, pushed.commit, stored)


def _from_hub(model: str, client: RegistryClient, progress: Progress) -> Published:
    try:
        repo, revision = split_spec(model)
    except InvalidInput as error:
        raise UsageError(f"{error.message}; MODEL is a directory or org/name[@revision]") from None
    with progress.stage("Model") as stage:
        stage.doing(f"looking for {repo.id} in the registry")
        try:
            commit = client.resolve(repo, revision).commit
        except NotFound:
            commit = _pull(repo, revision, client, stage)
            stored = "pulled from the Hub"
        else:
            stored = "in the registry already"
        stage.done(f"{repo.id}@{commit[:12]}: {stored}")
    return Published(repo, commit, stored)


def _pull(repo: RepoId, revision: str, client: RegistryClient, stage: Stage) -> str:
    stage.doing(f"pulling {repo.id}@{revision} from the Hub")
    sizes: dict[str, int] = {}
    done: dict[str, int] = {}
    for event in client.pull(repo, revision, timeout_s=PULL_S):
        match event["event"]:
            case "file":
                sizes[event["path"]] = event["size"]
            case "progress":
                done[event["path"]] = event["done"]
            case "log":
                stage.doing(event["message"])
            case "done":
                commit: str = event["commit"]
                return commit
        stage.figure(f"{size_text(sum(done.values()))} of {size_text(sum(sizes.values()))}")
    raise AssertionError("a pull ends with done or an error")
