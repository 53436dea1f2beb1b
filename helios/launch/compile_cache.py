"""Compiled kernels that are there before an engine starts, and are published once it works (docs/compile-caches.md).

``open`` finds the artifact of a start's key (``compile_key``, ``compile_find``) and shows its files in a directory that
the engine may write to (``overlay``). Nothing that goes wrong with it keeps an engine from starting: it is told, and
the engine compiles. One thread for each engine waits until it has answered a request, publishes what is new
(``compile_publish``), and takes the directory down when the engine has ended.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Protocol

from helios.config import CompileCacheSettings
from helios.errors import HeliosError
from helios.home import Home
from helios.http.client import HttpClient
from helios.launch import overlay
from helios.launch.compile_artifact import fingerprint
from helios.launch.compile_commits import Commits
from helios.launch.compile_find import Artifact, artifact_at, ask, reason, secret_of
from helios.launch.compile_key import Key, cache_key, compiles, this_device, this_engine
from helios.launch.compile_made import HERE, Bad, Made, placed, sweep
from helios.launch.compile_publish import Publisher
from helios.launch.compile_state import Shown, Start, forget_dead
from helios.launch.engine_sums import Sums
from helios.names import RepoId
from helios.registry_client import RegistryClient

POLL_S: Final = 1.0
ANSWER_S: Final = 5.0
"""Longest wait for an engine's metrics, in seconds."""
CLOSE_S: Final = 60.0
"""Longest that giving all publishes up takes, in seconds."""
NOT_ITS_FAULT: Final = frozenset({0, 2, *(128 + each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))})
"""Statuses of engines that were ended, or did not take their arguments: no compiled kernel has done that."""
_ANSWERED: Final = Sums("request_success_total")


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
        note: Callable[[str], None], clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.home, self.settings, self.client, self.note = home, settings, client, note
        self._commits = commits
        self.base = base_of(home)
        self._bad = Bad(self.base)
        self._clock = clock
        self._numbers = itertools.count(1)
        self._open: set[SharedCache] = set()

    def __enter__(self) -> CompileCaches:
        for clean in (overlay.repair, sweep, forget_dead):
            with self.told("what an earlier run left of compiled kernels is still there"):
                clean(self.base / "views" if clean is overlay.repair else self.base)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        caches, until = list(self._open), self._clock() + CLOSE_S
        for cache in caches:
            cache.begin_close()
        for cache in caches:
            cache.close(until - self._clock())

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

    def up(self, start: Start) -> None:
        """An engine listens: what it had works."""
        with self.told("what is known of an artifact is not forgotten"):
            self._bad.forget(start.key, start.had)

    def failed(self, start: Start, status: int) -> None:
        """An engine has ended before it listened: what it had of compiled kernels may be why."""
        if status not in NOT_ITS_FAULT and start.had:
            with self.told("kernels with which an engine did not start are not marked"):
                self._bad.add(start.key, start.had)
                if (start.key, start.had) in self._bad:
                    self.note(
                        f"vLLM ended again before it was up, with the same compiled kernels of {start.model} "
                        f"({start.had[:12]}): its next start does without them."
                    )

    def _shared(
        self, path: Path, repo: RepoId, commit: str, device: str, arguments: Sequence[str], environ: Mapping[str, str]
    ) -> SharedCache:
        began = self._clock()
        until = began + self.settings.wait_s
        secret = secret_of(self.home, self.settings)
        manifest, refs = ask(self.client, repo, commit, until - self._clock())
        key = cache_key(manifest, this_engine(), this_device(device), arguments, environ, fingerprint(secret))
        now = refs.get(key.ref)
        good, why = self._good(repo, key, now, secret, until)
        directory, model = placed(self.base / "models", path, manifest)
        number = f"{os.getpid()}-{next(self._numbers)}"
        with contextlib.ExitStack() as undo:
            made = self.base / "made" / key.name
            view: overlay.View | Made
            how: Literal["overlayfs", "copied", "here"] = "here"
            earlier = False
            if good is None:
                if (key.name, HERE) in self._bad:
                    Made.drop(made)
                    self._bad.forget(key.name, HERE)
                view = Made.use(made)
                earlier = bool(os.listdir(view.path))
            else:
                Made.drop(made)
                view = overlay.writable(good.files, self.base / "views", f"{key.name}-{number}")
                how, why = "copied" if view.why_copied else "overlayfs", view.why_copied
            undo.callback(view.close)
            start = Start(
                model=repo.id, commit=commit, key=key.name, artifact=good.commit if good else None,
                files=len(good.index.files) if good else 0, bytes=good.index.bytes if good else 0,
                how=how, earlier=earlier, why=why, looked_s=self._clock() - began,
            )  # fmt: skip
            shown = Shown.open(self.base, number, start)
            undo.callback(shown.close)
            self.note(f"Compiled kernels of {repo.id}: {start.found}.")
            publisher = Publisher(
                self.client, repo, key, now, good, view.path, self.base / "staging", secret,
                self.settings.limit_mib << 20,
            ) if self.settings.mode == "on" else None  # fmt: skip
            undo.pop_all()
        return SharedCache(self, view, shown, directory, model, publisher)

    def _good(
        self, repo: RepoId, key: Key, commit: str | None, secret: bytes, until: float
    ) -> tuple[Artifact | None, str]:
        """The artifact at a commit, every byte of it here and right; None for one that is not, and why."""
        if commit is None:
            return None, "nobody has published any for this model, engine, device and arguments"
        if (key.name, commit) in self._bad:
            return None, f"engines that had those at {commit[:12]} did not start"
        try:
            return artifact_at(self._commits, repo, commit, secret, key.facts, until - self._clock()), ""
        except (HeliosError, OSError) as error:
            why = reason(error)
        self.note(f"the compiled kernels of {repo.id} at {commit[:12]} are ignored: {why}")
        return None, f"those at {commit[:12]} are ignored"

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """What fails inside is told and goes no further: without it an engine compiles, and that is all."""
        try:
            yield
        except (HeliosError, OSError) as error:
            self.note(f"{what}: {reason(error)}")


class SharedCache:
    """One engine's; ends by itself when the engine has ended."""

    def __init__(
        self, caches: CompileCaches, view: overlay.View | Made, shown: Shown, directory: Path, model: str,
        publisher: Publisher | None,
    ) -> None:  # fmt: skip
        """``view``: where the engine compiles, closed with it; ``publisher``: None where nothing is to be."""
        self.directory: Path | None = directory
        self.model = model
        self.env: Mapping[str, str] = variables(view.path)
        self._caches, self._publisher, self._shown = caches, publisher, shown
        self._lock = threading.Lock()
        self._view: overlay.View | Made | None = view
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def start(self) -> Start:
        """What it found, and what has become of it."""
        return self._shown.start

    def watch(self, process: Process, url: str) -> None:
        self._thread = threading.Thread(target=self._follow, args=(process, url), name="compile cache", daemon=True)
        self._thread.start()

    def begin_close(self) -> None:
        """Give up what is under way, without waiting for that."""
        self._closing.set()

    def close(self, seconds: float = CLOSE_S) -> None:
        """Take it down; raises nothing."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))
        self._take_down()

    def _follow(self, process: Process, url: str) -> None:
        count: float | None = None
        while (status := process.poll()) is None and not self._closing.wait(POLL_S):
            if count is None or self._publisher is not None:
                now = answered(url)
                if count is None and now is not None:
                    self._caches.up(self.start)
                count = count if now is None else now
            if count and self._publisher is not None:
                self._publish(self._publisher)
                self._publisher = None
        if not self._closing.is_set():
            self._take_down()
            if status is not None and count is None:
                self._caches.failed(self.start, status)

    def _publish(self, publisher: Publisher) -> None:
        done = None
        with self._caches.told("what was compiled is not published"):
            done = publisher.publish(self._closing)
        if done is None:
            return
        with self._caches.told("`helios status` does not know of the published kernels"):
            index = done.index
            self._caches.note(
                f"Compiled kernels of {self.start.model} are published: {len(index.files)} files, "
                f"{index.bytes / 1e6:.1f} MB, commit {done.commit[:12]}."
                + (f" Older ones are still there: {done.stay}" if done.stay else "")
            )
            self._shown.published(done.commit)

    def _take_down(self) -> None:
        with self._lock:
            view, self._view = self._view, None
        if view is not None:
            with self._caches.told("a view of compiled kernels is not taken down"):
                view.close()
        self._shown.close()
        self._caches.closed(self)


def base_of(home: Home) -> Path:
    """Where a home keeps what this is about."""
    return home.root / "vllm" / "compiled"


def answered(url: str) -> float | None:
    """How many requests an engine has answered; None while it does not listen."""
    client = HttpClient(url, timeout_s=ANSWER_S, max_idle=0)
    try:
        return _ANSWERED.of(client.bytes("GET", "/metrics")).get("request_success_total", 0.0)
    except (HeliosError, ValueError):
        return None
    finally:
        client.close()
