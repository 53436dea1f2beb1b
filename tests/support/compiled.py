"""Nodes whose engines leave what they compile: the engine is an HTTP server that counts."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from helios.config import CompileCacheSettings
from helios.home import Home
from helios.launch.compile_cache import CompileCaches, SharedCache
from helios.launch.compile_commits import Commits, FetchedCommits, MountedCommits
from helios.launch.compile_key import REFS
from helios.names import RepoId
from helios.registry_client import RegistryClient
from tests.support.mounts import write

REPO: Final = RepoId.parse("org/name")
ARGUMENTS: Final = ("--max-model-len", "64")
DEADLINE_S: Final = 60.0


class Engine:
    """Runs until it is told to end; ``answered`` is what its metrics say."""

    def __init__(self) -> None:
        self.answered, self.status = 0, None
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = f'vllm:request_success_total{{finished_reason="stop"}} {engine.answered}\n'.encode()
                self.send_response(200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    status: int | None

    def poll(self) -> int | None:
        return self.status

    def end(self) -> None:
        self.status = 0
        self.server.shutdown()
        self.server.server_close()


class Dead:
    """An engine that ended with a status before it listened."""

    url = "http://127.0.0.1:1"

    def __init__(self, status: int) -> None:
        self._status = status

    def poll(self) -> int:
        return self._status


class Node:
    """A home with a mount, whose engines leave what they compile."""

    def __init__(self, home: Home, mount: Path, client: RegistryClient, **settings: Any) -> None:
        self.home, self.mount, self.client = home, mount, client
        self.notes: list[str] = []
        self.settings = CompileCacheSettings(**settings)

    @property
    def base(self) -> Path:
        return self.home.root / "vllm/compiled"

    def commits(self) -> contextlib.AbstractContextManager[Commits]:
        return contextlib.nullcontext(MountedCommits(self.mount))

    def path(self, commit: str) -> Path:
        """The model's directory."""
        return self.mount / "org/name" / commit

    @contextlib.contextmanager
    def caches(self) -> Iterator[CompileCaches]:
        with (
            self.commits() as commits,
            CompileCaches(self.home, self.settings, self.client, commits, self.notes.append) as caches,
        ):
            yield caches

    def open(self, commit: str, caches: CompileCaches, arguments: Sequence[str] = ARGUMENTS) -> SharedCache:
        cache = caches.open(self.path(commit), "cpu", arguments, {})
        assert isinstance(cache, SharedCache), self.notes
        return cache

    def start(
        self, commit: str, made: Mapping[str, bytes], caches: CompileCaches, arguments: Sequence[str] = ARGUMENTS
    ) -> tuple[dict[str, bytes], str]:
        """An engine that compiles ``made`` and answers one request; returns what it found, once it is published."""
        cache = self.open(commit, caches, arguments)
        root = Path(cache.env["VLLM_CACHE_ROOT"])
        found = contents(root)
        write(root, made)
        engine = Engine()
        try:
            cache.watch(engine, engine.url)
            engine.answered = 1
            wait_for(lambda: cache._publisher is None)
        finally:
            engine.end()
        cache.close()
        assert cache.directory is not None
        assert (cache.directory / cache.model / "config.json").read_bytes() == b"{}"
        return found, cache.model

    def fails(self, commit: str, caches: CompileCaches, status: int) -> dict[str, bytes]:
        """An engine that ends with a status before it listens; returns what it found."""
        cache = self.open(commit, caches)
        found = contents(Path(cache.env["VLLM_CACHE_ROOT"]))
        dead = Dead(status)
        cache.watch(dead, dead.url)
        assert cache._thread is not None
        cache._thread.join(DEADLINE_S)
        return found

    def refs(self) -> dict[str, str]:
        return {ref: at for ref, at in self.client.refs(REPO).items() if ref.startswith(REFS)}

    def left(self) -> list[str]:
        """What lies below its base that is of no start to come."""
        return sorted(
            str(path.relative_to(self.base))
            for name in ("views/*", "open/*", "staging/*", "made/.*", "bad/.*")
            for path in self.base.glob(name)
        )


class Pod(Node):
    """A home without a mount, and a directory that holds a commit's files."""

    def __init__(self, base: Path, commit: str, client: RegistryClient, url: str, **settings: Any) -> None:
        """``url``: the registry's."""
        super().__init__(Home(base / "home"), base, client, **settings)
        write(base / "model", {"config.json": b"{}"})
        self._url, self._path, self._commit = url, base / "model", commit

    def commits(self) -> contextlib.AbstractContextManager[Commits]:
        return FetchedCommits(self.home, self._path, REPO, self._commit, [self._url])

    def path(self, commit: str) -> Path:
        return self._path


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
