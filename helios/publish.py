"""Publishing a directory: what in it is a file of the model, and sending that to a registry."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec

from helios.errors import HeliosError, InvalidInput, Unavailable
from helios.names import RepoId, check_path
from helios.registry_answers import Pushed
from helios.registry_client import RegistryClient

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


class Tally:
    """How far the files of a push are; threads share it. ``sent`` counts the bytes that went over the network.

    A file is read, to know what of it has to be sent, and sent: each is half of the way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._halves = 0
        self.sent = 0

    @property
    def done(self) -> int:
        """Bytes of files dealt with; of those under way half of what was read and half of what was sent."""
        return self._halves // 2

    def add(self, halves: int, sent: int) -> None:
        with self._lock:
            self._halves += halves
            self.sent += sent


class Share:
    """One file's part of a tally; one thread uses it."""

    def __init__(self, tally: Tally, size: int) -> None:
        self._tally, self._size = tally, size
        self._read = self._sent = 0

    def read(self, count: int) -> None:
        """So many more bytes were read."""
        self._read += count
        self._tally.add(count, 0)

    def sent(self, count: int) -> None:
        """So many more bytes were sent."""
        counted = min(count, self._size - self._sent)  # what is sent again is on the way no further
        self._sent += counted
        self._tally.add(counted, count)

    def sent_besides(self, count: int) -> None:
        """So many bytes were sent that are none of the file's."""
        self._tally.add(0, count)

    def finish(self) -> None:
        """The file is stored."""
        self._tally.add(2 * self._size - self._read - self._sent, 0)


@dataclass(frozen=True, slots=True)
class OpenPush:
    """A push under way: where its files are sent, and an event that says that it was given up."""

    client: RegistryClient
    id: str
    tally: Tally
    stopped: threading.Event


class Sender(Protocol):
    """Brings one file to the registry; called in several threads at a time."""

    def __call__(self, push: OpenPush, file: LocalFile) -> None: ...


def send_whole(push: OpenPush, file: LocalFile) -> None:
    """The ``Sender`` of whole files: what every registry takes, and what reads the file only once."""
    share = Share(push.tally, file.size)
    try:
        push.client.put_file(push.id, file.path, file.local, file.size, share.sent)
    except Unavailable:  # a kept connection that the server had closed, say: the same request again is harmless
        if push.stopped.is_set():
            raise
        push.client.put_file(push.id, file.path, file.local, file.size, share.sent)
    share.finish()


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
    sender: Sender = send_whole,
) -> Pushed:
    """Publish a directory as ``repo`` and point ``ref`` at the commit; ``files`` is its ``scan``, made if missing.

    ``sender`` is how files travel to a registry that can't read them itself and takes more than whole ones. All or
    nothing: when anything fails the push is given up. Raises InvalidInput for bad content, Conflict when somebody else
    moved the ref meanwhile, NoSpace, Unavailable.
    """
    files = scan(directory) if files is None else files
    announced = [{"path": f.path, "size": f.size, "executable": f.executable} for f in files]
    started = client.start_push(repo, ref, announced, message=message, author=author or user())
    push = OpenPush(client, started.push, Tally(), threading.Event())
    send = sender if started.recipes and not client.local else send_whole
    try:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="push") as threads:
            largest_first = sorted(files, key=lambda file: -file.size)
            work = [threads.submit(send, push, file) for file in largest_first]
            try:
                _watch(push, work, progress)
            except BaseException:
                push.stopped.set()
                for each in work:
                    each.cancel()
                client.abort_push(push.id)  # interrupts what is under way, so that the threads end
                raise
        return msgspec.structs.replace(client.commit_push(push.id), sent_bytes=push.tally.sent)
    except BaseException:
        with contextlib.suppress(HeliosError):  # gone already, or unreachable: then it is dropped by itself
            client.abort_push(push.id)
        raise


def user() -> str:
    """The name of the user who runs this process."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _watch(push: OpenPush, work: list[Future[None]], progress: Progress) -> None:
    """Wait for all files, showing how far they are; raises the first error."""
    left = set(work)
    while left:
        done, left = wait(left, timeout=POLL_S, return_when=FIRST_EXCEPTION)
        for each in done:
            each.result()
        if left:
            progress(push.client.push_state(push.id).bytes if push.client.local else push.tally.done)
