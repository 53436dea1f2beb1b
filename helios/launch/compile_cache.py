"""Compiled kernels that are there before an engine starts, and are published once it works (docs/compile-caches.md).

``open`` finds the artifact of a start's key (``compile_key``), checks it (``compile_artifact``) and shows its files in
a directory that the engine may write to (``overlay``). Nothing that goes wrong with it keeps an engine from starting:
it is told, and the engine compiles. One thread for each engine waits until it has answered a request, publishes what
is new, and takes the directory down when the engine has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from helios.config import CompileCacheSettings
from helios.errors import HeliosError, InvalidInput
from helios.home import Home, hash_text
from helios.http.client import HttpClient
from helios.launch import overlay
from helios.launch.compile_artifact import fingerprint, unseal
from helios.launch.compile_commits import Commits
from helios.launch.compile_key import Key, cache_key, compiles, this_device, this_engine
from helios.launch.compile_publish import Artifact, Publisher
from helios.names import RepoId
from helios.registry_client import RegistryClient

POLL_S: Final = 1.0
ANSWER_S: Final = 5.0
"""Longest wait for an engine's metrics, in seconds."""
CLOSE_S: Final = 60.0
"""Longest that giving a publish up takes, in seconds."""
_SECRET: Final = re.compile(r"[0-9a-fA-F]{64}\Z")
_ANSWERED: Final = re.compile(rb"^vllm:request_success_total(?:\{[^\n]*\})?[ \t]+(\S+)", re.MULTILINE)


class Process(Protocol):
    """An engine that runs."""

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        ...


class Cache(Protocol):
    """Where an engine finds and leaves compiled kernels. ``model`` is how it is told of the model's directory, from
    ``directory`` (None: from anywhere); ``env`` is for it, too."""

    @property
    def model(self) -> str: ...
    @property
    def directory(self) -> Path | None: ...
    @property
    def env(self) -> Mapping[str, str]: ...

    def watch(self, process: Process, url: str) -> None:
        """The engine has been started, and listens at ``url`` some time."""
        ...


class Caches(Protocol):
    """Makes caches for engines; threads share it."""

    def open(self, path: Path, device: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Cache:
        """The cache of an engine that is to serve the directory ``path``; raises nothing but what a bug does."""
        ...


def variables(cache: Path) -> dict[str, str]:
    """What tells vLLM, Inductor, Triton and FlashInfer to keep what they compile below ``cache``."""
    return {
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(cache / "flashinfer"),
    }


class LocalCache:
    """A directory of this home, which is all there is to it."""

    directory: Path | None = None

    def __init__(self, home: Home, path: Path) -> None:
        self.model = str(path)
        self.env: Mapping[str, str] = variables(home.root / "vllm")

    def watch(self, process: Process, url: str) -> None:
        return


class LocalCaches:
    """Engines find what earlier ones of this home have compiled."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def open(self, path: Path, device: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Cache:
        return LocalCache(self._home, path)


class CompileCaches:
    """A context: leaving it, after the engines have ended, takes all caches down. ``note`` tells people."""

    def __init__(
        self, home: Home, settings: CompileCacheSettings, client: RegistryClient, commits: Commits,
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.home, self.settings, self.client, self.note = home, settings, client, note
        self._commits = commits
        self.base = home.root / "vllm" / "compiled"
        self._numbers = itertools.count(1)
        self._open: set[SharedCache] = set()

    def __enter__(self) -> CompileCaches:
        with self.told("what an earlier run left of compiled kernels is still there"):
            overlay.repair(self.base / "views")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for cache in list(self._open):
            cache.close()

    def open(self, path: Path, device: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Cache:
        if self.settings.mode != "off" and compiles(device, arguments):
            with self.told("compiled kernels are neither looked for nor published"):
                of = self._commits.of(path)
                if of is None:
                    return LocalCache(self.home, path)
                cache = self._shared(path, *of, device, arguments, environ)
                self._open.add(cache)
                return cache
        return LocalCache(self.home, path)

    def closed(self, cache: SharedCache) -> None:
        """A cache has been taken down."""
        self._open.discard(cache)

    def _shared(
        self, path: Path, repo: RepoId, commit: str, device: str, arguments: Sequence[str], environ: Mapping[str, str]
    ) -> SharedCache:
        manifest, secret = self.client.resolve(repo, commit).manifest, self._secret()
        key = cache_key(manifest, this_engine(), this_device(device), arguments, environ, fingerprint(secret))
        now = self.client.refs(repo).get(key.ref)
        good = self._good(repo, key, now, secret) if now is not None else None
        directory, model = placed(self.base / "models", path, manifest)
        made = self.base / "made" / key.name
        view: overlay.View | Made
        if good is None:
            view = Made.use(made)
            cache = view.path
        else:
            Made.drop(made)
            view = overlay.writable(good.files, self.base / "views", f"{key.name}-{os.getpid()}-{next(self._numbers)}")
            cache = view.path
            how = f"copied, because {view.why_copied}" if view.why_copied else "overlayfs"
            count, size = len(good.index.files), good.index.bytes
            self.note(f"Compiled kernels of {repo.id}: {count} files, {size / 1e6:.1f} MB ({how}).")
        publisher = Publisher(
            self.client, repo, key, now, good, cache, self.base / "staging", secret, self.settings.limit_mib << 20
        )
        return SharedCache(self, cache, view, directory, model, publisher if self.settings.mode == "on" else None)

    def _good(self, repo: RepoId, key: Key, commit: str, secret: bytes) -> Artifact | None:
        """The artifact at a commit, every byte of it here and right; None for one that is not."""
        good: Artifact | None = None
        with self.told(f"the compiled kernels of {repo.id} at {commit[:12]} are ignored"):
            index = unseal(self._commits.index(repo, commit), secret, key.facts)
            good = Artifact(index, self._commits.files(repo, commit, index))
        return good

    def _secret(self) -> bytes:
        """What this node seals artifacts with; raises InvalidInput or OSError."""
        given = self.settings.key_file
        path = Path(given).expanduser() if given else self.home.root / "compile-cache.key"
        if not given and not path.exists():
            fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32) + "\n")
            with contextlib.suppress(FileExistsError):  # another start was first
                os.link(fresh, path)
            fresh.unlink()
        text = path.read_text().strip()
        if not _SECRET.match(text):
            raise InvalidInput(
                f"{path} does not hold 64 hexadecimal digits", hint="`openssl rand -hex 32` prints some."
            )
        return bytes.fromhex(text)

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """What fails inside is told and goes no further: without it an engine compiles, and that is all."""
        try:
            yield
        except HeliosError as error:
            self.note(f"{what}: {error.message}" + (f" {error.hint}" if error.hint else ""))
        except OSError as error:
            self.note(f"{what}: {error}")


class Made:
    """What engines compile while there is no artifact: it stays, and is found here where nothing can be published."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self._lock = path, lock

    @classmethod
    def use(cls, path: Path) -> Made:
        """The directory, made if it is not there, until ``close``; several engines share it. Raises OSError."""
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)  # who drops it holds it for moments...
        path.mkdir(exist_ok=True, mode=0o700)  # ...and may have done so in this one
        return cls(path, lock)

    @staticmethod
    def drop(path: Path) -> None:
        """Remove the directory, unless an engine uses it; an artifact has taken its place. Raises OSError."""
        if path.exists():
            lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(lock)

    def close(self) -> None:
        os.close(self._lock)


class SharedCache:
    """One engine's; ends by itself when the engine has ended."""

    def __init__(
        self, caches: CompileCaches, cache: Path, view: overlay.View | Made, directory: Path, model: str,
        publisher: Publisher | None,
    ) -> None:  # fmt: skip
        """``view``: what ``cache`` is in, closed with the engine; ``publisher``: None where nothing is to be."""
        self.directory: Path | None = directory
        self.model = model
        self.env: Mapping[str, str] = variables(cache)
        self._caches, self._publisher = caches, publisher
        self._view: overlay.View | Made | None = view
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, process: Process, url: str) -> None:
        self._thread = threading.Thread(target=self._follow, args=(process, url), name="compile cache", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take it down; raises nothing."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        self._take_down()

    def _follow(self, process: Process, url: str) -> None:
        while process.poll() is None and not self._closing.wait(POLL_S):
            if self._publisher is not None and has_answered(url):
                with self._caches.told("what was compiled is not published"):
                    done = self._publisher.publish(self._closing)
                    if done is not None:
                        self._caches.note(done)
                self._publisher = None
        if not self._closing.is_set():
            self._take_down()

    def _take_down(self) -> None:
        view, self._view = self._view, None
        if view is not None:
            with self._caches.told("a view of compiled kernels is not taken down"):
                view.close()
        self._caches.closed(self)


def has_answered(url: str) -> bool:
    """Whether an engine has answered a request."""
    client = HttpClient(url, timeout_s=ANSWER_S, max_idle=0)
    try:
        return any(float(count) > 0 for count in _ANSWERED.findall(client.bytes("GET", "/metrics")))
    except (HeliosError, ValueError):
        return False  # it does not listen yet
    finally:
        client.close()


def placed(base: Path, path: Path, manifest: str) -> tuple[Path, str]:
    """A directory, and from there a name of the model's directory ``path`` that is the same on every node.

    vLLM hashes how it was told of the model with what it compiles, so the place of the mount must not be in it.
    """
    directory, name = base / f"{hash_text(str(path)):016x}", f"model-{manifest[:16]}"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = directory / f".{secrets.token_hex(8)}"
    fresh.symlink_to(path)
    fresh.replace(directory / name)
    return directory, name
