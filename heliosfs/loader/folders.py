"""Where a model's files come from.

- a **directory** on a disk, or in a mount of a home that is not ours: its files are read as any program does it;
- a directory of a **mount** of ours: whole files where the mount keeps them (no request reaches FUSE), others through
  the mount, which fetches them once for all; what it can't give through heliosfs.client, which fetches it by itself;
- the **name** of a model, where a registry is configured: through heliosfs.client.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helios import embedded, mounts
from helios.config import Config, load
from helios.errors import InvalidInput
from helios.home import Home
from heliosfs.loader.mounted import MountFolder
from heliosfs.loader.sources import DiskFolder, Folder, Source

if TYPE_CHECKING:
    from heliosfs import client

log = logging.getLogger("vllm.helios")


class ModelFile:
    """A file of a model of heliosfs.client."""

    def __init__(self, file: client.File, name: str) -> None:
        self._file, self.path, self.size = file, name, file.size

    def fileno(self) -> int | None:
        return None if self._file.local_path is None else self._file.fileno()

    def awaited(self) -> int | None:
        return self.fileno()

    def read_into(self, view: memoryview, offset: int) -> None:
        self._file.read_into(view, offset)

    def close(self) -> None:
        self._file.close()


class ModelFolder:
    """A folder (``""`` or one that ends with a slash) of a model of heliosfs.client."""

    way = "the client"

    def __init__(self, model: client.Model, prefix: str) -> None:
        self._model, self._prefix = model, prefix
        self.name = f"{model.repo.id}@{model.commit}{':' if prefix else ''}{prefix.rstrip('/')}"
        below = {path[len(prefix) :]: info for path, info in model.files.items() if path.startswith(prefix)}
        self.files = {name: info.size for name, info in below.items() if "/" not in name}

    def read(self, path: str) -> bytes:
        with self._model.open(self._prefix + path) as file:
            return bytes(file.read())

    def open(self, path: str) -> Source:
        return ModelFile(self._model.open(self._prefix + path), path)

    def fetch(self) -> None:
        self._model.warm([self._prefix + name for name in self.files])


@contextmanager
def open_folder(place: str, revision: str | None = None, subfolder: str = "") -> Iterator[Folder]:
    """A model's files, for the block: ``place`` is a directory, or a name ``org/name`` with a revision.

    Configured as every command is. Raises InvalidInput for what is neither, UsageError for a wrong configuration, and
    what heliosfs.client's ``connect`` and ``resolve`` raise for a name.
    """
    with ExitStack() as stack:
        if os.path.isdir(place):
            directory = Path(place, subfolder)
            yield _mounted(directory, stack) or DiskFolder(directory)
            return
        if _nobody(load(os.environ), Home.from_env(os.environ)):
            raise InvalidInput(
                f"{place} is no directory, and no registry is configured to look for it as a name",
                hint="Give the directory of a mount or of a disk, or set registry.urls (HELIOS_REGISTRY__URLS).",
            )
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        yield ModelFolder(_resolve(stack, None, f"{place}@{revision or 'main'}"), prefix)


def _nobody(config: Config, home: Home) -> bool:
    """Whether there is no registry but the one that a mount was told of when it was started."""
    return not config.registry.urls and embedded.running(home) is None


def _resolve(stack: ExitStack, registry: list[str] | None, spec: str, kind: str = "models") -> client.Model:
    from heliosfs import client  # trio and more: nothing that a plain directory needs

    return stack.enter_context(client.connect(registry=registry)).resolve(spec, kind=kind)


def _mounted(directory: Path, stack: ExitStack) -> Folder | None:
    """The directory as its mount has it, where that is one of our home."""
    entry = mounts.mount_of(mounts.canonical(directory))
    if entry is None or entry.fstype != mounts.FSTYPE:
        return None
    config, home = load(os.environ), Home.from_env(os.environ)
    state = mounts.state_of(home, entry.mountpoint)
    if state is None:
        log.info("%s is in a mount of another home: its files are read through that mount", directory)
        return None
    mountpoint = entry.mountpoint

    def by_client() -> ModelFolder:
        registry = state.registry if _nobody(config, home) else None
        repo, commit = (os.getxattr(directory, f"user.helios.{name}").decode() for name in ("repo", "commit"))
        inside = Path(os.path.realpath(directory)).relative_to(mountpoint).parts
        prefix = "".join(f"{part}/" for part in inside[inside.index(commit) + 1 :])
        kind, _, name = repo.partition("/")
        return ModelFolder(_resolve(stack, registry, f"{name}@{commit}", kind), prefix)

    tiers = [Path(state.cache), *([Path(os.path.abspath(config.mount.l2))] if config.mount.l2 else [])]
    return MountFolder(directory, tiers, by_client)
