"""A PostgreSQL server from Debian's package, for as long as a test run lasts: on a unix socket, without fsync.

PostgreSQL refuses to run as root, so it runs as the package's own user then. The kernel ends it when we die.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helios.home import Home

if TYPE_CHECKING:
    from registry.metadata.database import Database

USER = "helios"
SHARED = "helios_shared"
KEPT = {"settings", "generations"}
"""Tables that have rows from the start."""
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # only a crash of the machine would show the difference
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "80",
    "logging_collector": "off",
}

Databases = Callable[[], dict[str, str]]


def binaries() -> Path | None:
    """Where the newest server's programs are, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parent.parent.name))
    if found:
        return found[-1].parent
    there = shutil.which("postgres")
    return Path(there).parent if there else None


def why_no_postgres() -> str | None:
    """Why no server can be started here, or None."""
    if binaries() is None:
        return "PostgreSQL is not installed"
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        return "setpriv is missing, and PostgreSQL refuses to run as root"
    return None


class Server:
    """One server process and its data, in a directory of its own."""

    def __init__(self, root: Path) -> None:
        found = binaries()
        assert found is not None
        self.root, self._bin = root, found
        self._account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        if self._account is not None:
            os.chown(root, self._account.pw_uid, self._account.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", self.data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")

    @property
    def data(self) -> Path:
        return self.root / "data"

    def start(self) -> None:
        """Start it and wait until it answers."""
        import psycopg

        settings = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
        command = [str(self._bin / "postgres"), "-D", str(self.data), "-k", str(self.root), *settings]
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as_user("--pdeathsig", "INT"), *command], cwd=self.root, stdout=log, stderr=log
            )
        end = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise RuntimeError(f"PostgreSQL did not start:\n{(self.root / 'log').read_text()}") from None
                time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT ends its clients' connections, SIGQUIT is as a crash."""
        if self._process is not None:
            process, self._process = self._process, None
            process.send_signal(how)
            process.wait(30)

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={self.root}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run a statement outside a transaction, as an administrator would."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """An empty database of its own, which takes a second; yields its URL."""
        name = f"test_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def fresh(self) -> str:
        """The URL of a database with our tables as they are at first; whoever used it before is thrown out."""
        from registry.metadata.database import Database
        from registry.metadata.tables import metadata

        url = self.url(SHARED)
        if not self.execute(f"SELECT 1 FROM pg_database WHERE datname = '{SHARED}'"):
            self.execute(f"CREATE DATABASE {SHARED}")
            Database.postgres(url).close()
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{SHARED}'")
        tables = ", ".join(f'"{name}"' for name in metadata.tables if name not in KEPT)
        self.execute(f"TRUNCATE {tables} RESTART IDENTITY; DELETE FROM settings WHERE name <> 'schema'", SHARED)
        return url

    def _as_user(self, *options: str) -> list[str]:
        if self._account is None:
            return ["setpriv", *options] if options and shutil.which("setpriv") else []
        ids = (f"--reuid={self._account.pw_uid}", f"--regid={self._account.pw_gid}", "--clear-groups")
        return ["setpriv", *ids, *options]

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [*self._as_user(), str(self._bin / program), *map(str, arguments)]
        subprocess.run(command, cwd=self.root, check=True, capture_output=True)


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server that runs; its directory goes with it."""
    # Not below pytest's own directory, which is closed to other users; and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="helios-pg-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        server = Server(Path(directory))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def open_database(path: Path, url: str | None) -> Database:
    """The database at this URL of PostgreSQL, or in this file of SQLite."""
    from registry.metadata.database import Database

    return Database.postgres(url) if url else Database.sqlite(path)


def metadata_of(home: Home, settings: Mapping[str, str]) -> Database:
    """The database of a registry on this home with these settings, to look into it."""
    return open_database(home.registry / "metadata.db", settings.get("HELIOS_REGISTRY__DATABASE"))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """The server that the tests of a run share."""
    if why := why_no_postgres():
        pytest.skip(why)
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def databases(request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Each call gives the settings of a registry with a database of its own: SQLite in its home, or PostgreSQL's.

    A home keeps its database when its registry starts again. A test runs on SQLite, one with the mark
    ``both_databases`` on both (tests/conftest.py).
    """
    if getattr(request, "param", "sqlite") == "sqlite":
        yield dict
        return
    server: Server = request.getfixturevalue("postgres_server")  # now: later it would be a process of a test's home
    with contextlib.ExitStack() as stack:

        def another() -> dict[str, str]:
            return {"HELIOS_REGISTRY__DATABASE": stack.enter_context(server.database())}

        yield another


@pytest.fixture
def postgres_url(postgres_server: Server) -> str:
    """A database with our tables and nothing in them, used by one test at a time."""
    return postgres_server.fresh()
