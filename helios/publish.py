"""Publishing a directory: what in it is a file of the model, and sending that to a registry."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.errors import HeliosError, InvalidInput
from helios.names import RepoId, check_path
from helios.registry_client import Pushed, RegistryClient, StoredFile

SKIPPED: Final = (".git", ".cache/huggingface")
"""Left out wherever they are, as huggingface_hub's own upload does: version control and download bookkeeping."""

THREADS: Final = 3
"""Files sent at a time: hashing is parallel inside the registry, so this only hides the waits of small files."""

POLL_S: Final = 0.2

Progress = Callable[[int], None]
"""Called with the bytes done so far."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to publish: ``path`` in the repository, ``local`` where its bytes are (links resolved), size in bytes."""

    path: str
    local: Path
    size: int
    executable: bool


def scan(directory: Path) -> list[LocalFile]:
    """The files of a directory, sorted by path.

    Symbolic links inside the tree are followed. Raises InvalidInput naming a file with an unsafe name, a link that
    leaves the tree, is broken or loops, a special file; and for a directory without any file.
    """
    root = Path(os.path.realpath(directory))
    found = sorted(_walk(root, root, "", ()), key=lambda file: file.path)
    if not found:
        raise InvalidInput(f"{directory} holds no file to publish")
    return found


def _walk(root: Path, directory: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[LocalFile]:
    try:
        status = directory.stat()
        here = (status.st_dev, status.st_ino)
        entries = sorted(os.listdir(directory))
    except OSError as error:
        raise InvalidInput(f"{prefix or directory}: can't be read: {error.strerror}") from None
    if here in above:
        raise InvalidInput(f"{prefix.rstrip('/')!r} is a link to a directory above itself; remove it")
    for name in entries:
        path = prefix + name
        if any(path == skipped or path.endswith("/" + skipped) for skipped in SKIPPED):
            continue
        check_path(path)
        yield from _entry(root, directory / name, path, (*above, here))


def _entry(root: Path, place: Path, path: str, above: tuple[tuple[int, int], ...]) -> Iterator[LocalFile]:
    try:
        local = place.resolve(strict=True) if place.is_symlink() else place
        status = local.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else "it is a loop of links"
        raise InvalidInput(f"{path!r} can't be followed: {reason}; remove or repair it") from None
    if not local.is_relative_to(root):
        raise InvalidInput(
            f"{path!r} is a link that leaves the directory: it leads to {local}",
            hint="Put the file itself in its place; a copy with links resolved is made by `cp -rL`.",
        )
    if stat.S_ISDIR(status.st_mode):
        yield from _walk(root, local, path + "/", above)
    elif stat.S_ISREG(status.st_mode):
        yield LocalFile(path, local, status.st_size, bool(status.st_mode & stat.S_IXUSR))
    else:
        raise InvalidInput(f"{path!r} is neither a file nor a directory (a pipe, socket or device); remove it")


def publish(
    client: RegistryClient,
    directory: Path,
    repo: RepoId,
    ref: str,
    *,
    message: str = "",
    author: str | None = None,
    files: list[LocalFile] | None = None,
    progress: Progress = lambda _: None,
) -> Pushed:
    """Publish a directory as ``repo`` and point ``ref`` at the commit; ``files`` is its ``scan``, made if missing.

    All or nothing: when anything fails the push is given up. Raises InvalidInput for bad content, Conflict when
    somebody else moved the ref meanwhile, NoSpace, Unavailable.
    """
    files = scan(directory) if files is None else files
    announced = [{"path": f.path, "size": f.size, "executable": f.executable} for f in files]
    push = client.start_push(repo, ref, announced, message=message, author=author or user())
    try:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="push") as threads:
            largest_first = sorted(files, key=lambda file: -file.size)
            work = [threads.submit(client.put_file, push, f.path, f.local, f.size) for f in largest_first]
            try:
                _watch(client, push, work, progress)
            except BaseException:
                for each in work:
                    each.cancel()
                client.abort_push(push)  # interrupts what is under way, so that the threads end
                raise
        return client.commit_push(push)
    except BaseException:
        with contextlib.suppress(HeliosError):  # gone already, or unreachable: then it is dropped by itself
            client.abort_push(push)
        raise


def user() -> str:
    """The name of the user who runs this process."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _watch(client: RegistryClient, push: str, work: list[Future[StoredFile]], progress: Progress) -> None:
    """Wait for all files, showing how far they are; raises the first error."""
    left = set(work)
    while left:
        done, left = wait(left, timeout=POLL_S, return_when=FIRST_EXCEPTION)
        for each in done:
            each.result()
        if left:
            progress(client.push_state(push).bytes)
