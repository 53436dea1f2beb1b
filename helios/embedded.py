"""Finding the registry: a configured one, or the embedded one on this HELIOS_HOME, which is started when needed.

Files under ``$HELIOS_HOME/run``:

    registry.lock   held (flock) by the one registry of this home as long as it lives
    registry.json   where it listens; means nothing unless the lock is held and the socket answers
    registry.users  held shared by whoever uses the embedded registry, as long as it does
    registry.start  held while somebody looks for the registry and starts one: the second starter waits, then attaches

Why nobody is left without a registry: a user takes ``registry.users`` before it looks. An embedded registry ends only
while it holds that lock alone, and keeps it until its process is gone. So a user either was there first and the
registry stays, or waits until it has ended and starts the next one. The kernel drops the locks of the dead; no count
and no pid is ever trusted. (``registry.users`` is shared on purpose by a fork: a daemon inherits its parent's use.)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from helios.config import Config
from helios.decoding import from_json
from helios.errors import DeadlineExceeded, HeliosError, Unavailable, from_code
from helios.home import Home
from helios.http.client import HttpClient
from helios.lockfile import held
from helios.registry_client import RegistryClient
from helios.tokens import Token, no_token, token_of

START_S: Final = 120.0
"""Longest start of a registry, in seconds: after a crash it looks through its store first."""

PROBE_S: Final = 10.0
"""Longest wait for a running registry to answer, in seconds."""

LOG_LINES: Final = 20
LOG_LIMIT: Final = 16 << 20
"""From this many bytes on a log is set aside at the next start."""


class RegistryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``registry.json``: ``started`` is when the process started, in unix seconds; ``start`` names it (ProcessId)."""

    socket: str
    url: str
    host: str
    port: int
    pid: int
    started: float
    start: str
    embedded: bool
    store: str = ""
    """The directory of its object store; empty where the store is none."""


def record_path(home: Home) -> Path:
    return home.run / "registry.json"


def lock_path(home: Home) -> Path:
    return home.run / "registry.lock"


def users_path(home: Home) -> Path:
    return home.run / "registry.users"


def log_path(home: Home) -> Path:
    return home.logs / "registry.log"


def read_record(home: Home) -> RegistryRecord | None:
    """What the last registry of this home wrote, or None; says nothing about whether it still lives."""
    try:
        return from_json(record_path(home).read_bytes(), RegistryRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def running(home: Home) -> RegistryRecord | None:
    """The registry that runs on this home, started by whomever, or None. Starts nothing."""
    return read_record(home) if held(lock_path(home)) else None


class AttachedRegistry:
    """The use of a registry; the embedded one stays up until this is closed. Threads may share it.

    ``base`` is what an HttpClient takes, ``urls`` what to show people, ``store`` the directory of its object store
    where it is the registry of this home.
    """

    def __init__(
        self,
        base: str,
        urls: list[str],
        *,
        revive: Callable[[], None] | None,
        lock: int | None,
        store: Path | None = None,
        token: Token = no_token,
    ) -> None:
        self._token = token
        self.base, self.urls, self.store = base, urls, store
        self._revive, self._lock = revive, lock
        self._guard = threading.Lock()
        self._clients: list[RegistryClient] = []

    @property
    def embedded(self) -> bool:
        return self._revive is not None

    def client(self, *, timeout_s: float = 30.0) -> RegistryClient:
        """A client of the registry; closed with this object."""
        http = HttpClient(self.base, timeout_s=timeout_s, token=self._token)
        client = RegistryClient(http, local=self.base.startswith("unix:"))
        with self._guard:
            self._clients.append(client)
        return client

    def ensure(self) -> None:
        """Start the embedded registry again if it has died; its unix socket stays the same. Nothing for others."""
        with self._guard:
            if self._revive is not None and self._lock is not None:
                self._revive()

    def close(self) -> None:
        """Stop using it; calling it again does nothing."""
        with self._guard:
            clients, self._clients = self._clients, []
            lock, self._lock = self._lock, None
        for client in clients:
            client.close()
        if lock is not None:
            os.close(lock)

    def __enter__(self) -> AttachedRegistry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def attach(config: Config, home: Home, environ: Mapping[str, str] | None = None) -> AttachedRegistry:
    """The configured registry that answers first, else the embedded one on ``home``, started if it does not run.

    ``environ`` is what a started registry gets (this process's by default). Raises Unavailable or DeadlineExceeded, or
    the error that the registry failed to start with.
    """
    environ = os.environ if environ is None else environ
    if urls := list(config.registry.urls):
        token = token_of(config.registry.token_file, environ)
        return AttachedRegistry(_answering(urls), urls, revive=None, lock=None, token=token)
    try:
        home.ensure_run()
        home.logs.mkdir(parents=True, exist_ok=True)
        users = _open(users_path(home))
    except OSError as error:
        raise Unavailable(
            f"{home.root} can't be used: {error.strerror} ({error.filename})",
            hint="Set HELIOS_HOME to a directory that you may write to.",
        ) from None
    try:
        _lock(users, fcntl.LOCK_SH, START_S, "the embedded registry to end")
        record = _find_or_start(home, environ)
    except BaseException:
        os.close(users)
        raise

    def revive() -> None:
        _find_or_start(home, environ)

    store = Path(record.store) if record.store else None
    return AttachedRegistry(f"unix:{record.socket}", [record.url], revive=revive, lock=users, store=store)


def _answering(urls: list[str]) -> str:
    reasons = []
    for url in urls:
        try:
            _probe(url, PROBE_S)
        except HeliosError as error:
            reasons.append(error.message)
        else:
            return url
    raise Unavailable(
        f"no registry answers: {'; '.join(reasons)}",
        hint="Start it, or change registry.urls (HELIOS_REGISTRY__URLS); without any, an embedded one is used.",
    )


def _probe(base: str, timeout_s: float) -> None:
    client = HttpClient(base, timeout_s=timeout_s)
    try:
        client.bytes("GET", "/healthz")
    finally:
        client.close()


def _find_or_start(home: Home, environ: Mapping[str, str]) -> RegistryRecord:
    record = _live(home, PROBE_S)
    if record is not None:
        return record
    with _starting(home):
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            record = _live(home, PROBE_S)
            if record is not None:
                return record
            if held(lock_path(home)):
                time.sleep(0.05)  # one that somebody else starts, or that is ending
            else:
                _start(home, environ)
    raise Unavailable(
        f"a registry holds {lock_path(home)} but does not answer",
        hint=f"Look at {log_path(home)}; end it with `kill {getattr(read_record(home), 'pid', '<its pid>')}`.",
    )


def _live(home: Home, timeout_s: float) -> RegistryRecord | None:
    record = running(home)
    if record is None:
        return None
    try:
        _probe(f"unix:{record.socket}", timeout_s)
    except Unavailable:
        return None
    return record


@contextlib.contextmanager
def _starting(home: Home) -> Iterator[None]:
    fd = _open(home.run / "registry.start")
    try:
        _lock(fd, fcntl.LOCK_EX, START_S + 10, "another command to start the registry")
        yield
    finally:
        os.close(fd)


def _start(home: Home, environ: Mapping[str, str]) -> None:
    """Start an embedded registry; returns once it answers, or holds nothing because another one came first."""
    log = log_path(home)
    if log.exists() and log.stat().st_size > LOG_LIMIT:
        log.replace(log.with_suffix(".log.1"))
    ours, theirs = os.pipe()
    with open(ours, "rb", buffering=0) as report, open(log, "ab", buffering=0) as output:
        begin = output.tell()
        try:
            # It detaches itself, so that it is nobody's child, and reports through the pipe.
            command = [sys.executable, "-m", "registry", "--embedded", f"--report-fd={theirs}"]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs],
                start_new_session=True,
                cwd="/",
                env={**environ, "HELIOS_HOME": str(home.root)},
            )
        finally:
            os.close(theirs)
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        text = _read_to_end(report, START_S)
    _check_report(text, log, begin)


def _read_to_end(pipe: object, timeout_s: float) -> bytes:
    import select

    fd: int = pipe.fileno()  # type: ignore[attr-defined]
    deadline = time.monotonic() + timeout_s
    text = b""
    while True:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise DeadlineExceeded(f"the registry did not start within {timeout_s:.0f} s")
        part = os.read(fd, 65536)
        if not part:
            return text
        text += part


def _check_report(text: bytes, log: Path, begin: int) -> None:
    """Raise what the new registry reported; nothing at all means that it died."""
    try:
        report = json.loads(text)
    except ValueError:
        lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()[-LOG_LINES:]
        shown = "\n".join(lines) or "(nothing)"
        raise Unavailable(f"the registry died at its start; the last lines of {log}:\n{shown}") from None
    error = report.get("error")
    if error is not None and error["code"] != "Conflict":  # Conflict: another one was faster, which is as good
        raise from_code(error["code"], f"the registry can't start: {error['message']}", error["hint"])


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(fd: int, kind: int, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"waited {timeout_s:.0f} s for {what}") from None
            time.sleep(0.02)
        else:
            return
