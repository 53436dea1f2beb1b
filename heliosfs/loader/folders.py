"""Where a model's files come from.

- a **directory** on a disk, or in a mount of a home that is not ours: its files are read as any program does it;
- a directory of a **mount** of ours: through heliosfs.client, which reads whole files where the mount keeps them (no
  request reaches FUSE) and has the mount fetch the others; where the client can't work, as a directory;
- the **name** of a model, where a registry is configured: through heliosfs.client.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from helios import embedded, mounts
from helios.config import load
from helios.errors import HeliosError, InvalidInput, Unavailable
from helios.home import Home

if TYPE_CHECKING:
    from heliosfs import client

log = logging.getLogger("vllm.helios")

PART: Final = 32 << 20
"""Bytes of one preadv(2)."""

WHOLE: Final = frozenset({"l1", "l2"})
"""What a mount says of files that it has whole on a disk (``user.helios.tier``)."""


class Source(Protocol):
    """An open file. Threads use it at the same time."""

    @property
    def path(self) -> str:
        """Its path in the folder."""

    @property
    def size(self) -> int: ...

    def fileno(self) -> int | None:
        """A descriptor that can be mapped, where the file is whole on this machine; valid until ``close``."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view, which lies within the file. Raises HeliosError."""

    def close(self) -> None: ...


class Folder(Protocol):
    """A model's files; those in subfolders are none of its."""

    @property
    def name(self) -> str:
        """What it is called in errors."""

    @property
    def way(self) -> str:
        """How its files are read, in two words, for logs."""

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes in bytes, by name."""

    def read(self, path: str) -> bytes:
        """A small file. Raises HeliosError."""

    def open(self, path: str) -> Source:
        """Raises HeliosError."""

    def fetch(self) -> None:
        """Make the files local, where they are not. Raises HeliosError."""


class DiskFile:
    """A file of a directory."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self.path = path, name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"{path} can't be opened: {error.strerror}") from error
        self.size = os.fstat(self._fd).st_size
        self._mapped = _is_local(self._fd)

    def fileno(self) -> int | None:
        return self._fd if self._mapped else None

    def read_into(self, view: memoryview, offset: int) -> None:
        filled = 0
        try:
            while filled < len(view):
                count = os.preadv(self._fd, [view[filled : filled + PART]], offset + filled)
                if not count:
                    raise OSError(errno.EIO, "it has become shorter")
                filled += count
        except OSError as error:
            raise Unavailable(f"{self._path} can't be read: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)


class DiskFolder:
    """A directory."""

    way = "plain files"

    def __init__(self, directory: Path) -> None:
        self._directory, self.name = directory, str(directory)
        try:
            with os.scandir(directory) as entries:
                self.files = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise Unavailable(f"{directory} can't be listed: {error.strerror}") from error

    def read(self, path: str) -> bytes:
        try:
            return (self._directory / path).read_bytes()
        except OSError as error:
            raise Unavailable(f"{self._directory / path} can't be read: {error.strerror}") from error

    def open(self, path: str) -> Source:
        return DiskFile(self._directory / path, path)

    def fetch(self) -> None:
        """Nothing: they are local, or the mount's to fetch."""


class ModelFile:
    """A file of a model of heliosfs.client."""

    def __init__(self, file: client.File, name: str) -> None:
        self._file, self.path, self.size = file, name, file.size

    def fileno(self) -> int | None:
        return None if self._file.local_path is None else self._file.fileno()

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
    settings, home = load(os.environ), Home.from_env(os.environ)
    nobody = not settings.registry.urls and embedded.running(home) is None
    with ExitStack() as stack:
        if os.path.isdir(place):
            directory = Path(place, subfolder)
            yield _mounted(directory, home, nobody, stack) or DiskFolder(directory)
            return
        if nobody:
            raise InvalidInput(
                f"{place} is no directory, and no registry is configured to look for it as a name",
                hint="Give the directory of a mount or of a disk, or set registry.urls (HELIOS_REGISTRY__URLS).",
            )
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        yield ModelFolder(_resolve(stack, None, f"{place}@{revision or 'main'}"), prefix)


def _resolve(stack: ExitStack, registry: list[str] | None, spec: str, kind: str = "models") -> client.Model:
    from heliosfs import client  # trio and more: nothing that a plain directory needs

    return stack.enter_context(client.connect(registry=registry)).resolve(spec, kind=kind)


def _mounted(directory: Path, home: Home, nobody: bool, stack: ExitStack) -> Folder | None:
    """The directory as the client has it, where it lies in a mount of our home. ``nobody``: there is no registry but
    the one that the mount was told of when it was started."""
    entry = mounts.mount_of(mounts.canonical(directory))
    if entry is None or entry.fstype != mounts.FSTYPE:
        return None
    state = mounts.state_of(home, entry.mountpoint)
    if state is None:
        log.info("%s is in a mount of another home: its files are read through that mount", directory)
        return None
    try:
        repo, commit = (os.getxattr(directory, f"user.helios.{name}").decode() for name in ("repo", "commit"))
        inside = Path(os.path.realpath(directory)).relative_to(entry.mountpoint).parts
        prefix = "".join(f"{part}/" for part in inside[inside.index(commit) + 1 :])
        kind, _, name = repo.partition("/")
        model = _resolve(stack, state.registry if nobody else None, f"{name}@{commit}", kind)
        return ModelFolder(model, prefix)
    except (HeliosError, OSError, ValueError) as error:
        log.warning("the client can't be used, so the files are read through the mount: %s", error)
        return None


def _is_local(fd: int) -> bool:
    """Whether mapping the file asks nothing of a daemon of ours, which is slower than reading it."""
    try:
        return os.getxattr(fd, "user.helios.tier").decode() in WHOLE
    except OSError:  # no mount of ours
        return True
