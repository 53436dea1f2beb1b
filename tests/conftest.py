"""What every test shares: a HELIOS_HOME of its own, the command line as a process, no log errors, no leftovers.

- ``helios_home``: a fresh ``Home`` under ``tmp_path``, also set in the environment. When the test ends nothing of it
  may be left: a process with this HELIOS_HOME, a mount below ``tmp_path`` or an error line in ``logs/`` fails the test.
- ``helios``: runs ``helios …`` as a process on that home: ``helios("ls", "--json").json()``; ``helios.start(…)`` for
  one that stays.
- A record at ERROR or above fails the test unless the fixture ``expected_log_errors`` was given a pattern for it.
- ``postgres_url``: a fresh database of a real PostgreSQL server, which the tests of a run share.
- ``databases``: ``databases()`` gives settings of a registry on SQLite; with ``@pytest.mark.both_databases`` the test
  runs again, and gets those of one with a PostgreSQL database of its own. ``helios`` has such settings already. What a
  registry answers from its metadata is tested on both; a test of a module that is marked as a whole says by
  ``@pytest.mark.one_database`` that the database makes no difference to it, or that it is about one of them.
- ``@pytest.mark.fuse``, ``@pytest.mark.vllm`` and ``@pytest.mark.containers`` skip where /dev/fuse, vLLM or what runs
  containers is missing. With HELIOS_REQUIRE_ALL=1 a skip is a failure.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from helios.home import Home
from tests.support.containers import why_no_containers
from tests.support.postgres import Databases, databases, postgres_server, postgres_url

__all__ = ["databases", "postgres_server", "postgres_url"]

# How long one example takes says nothing on a loaded machine.
hypothesis.settings.register_profile("helios", deadline=None)
hypothesis.settings.load_profile("helios")

# Started in the background by a shell, a run is to ignore Ctrl-C, and so would all that it starts; tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HELIOS = Path(sys.executable).parent / "helios"
REQUIRE_ALL = os.environ.get("HELIOS_REQUIRE_ALL") == "1"
LEFTOVER_GRACE_S = 20.0
"""How long what a test started may take to end by itself, in seconds."""


# --- skips -----------------------------------------------------------------------------------------------------------


@cache
def why_no_fuse() -> str | None:
    """Why FUSE tests can't run here, or None."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse can't be opened: {error.strerror}"
    return None if importlib.util.find_spec("pyfuse3") else "pyfuse3 is not installed"


@cache
def why_no_vllm() -> str | None:
    """Why tests with real vLLM can't run here, or None."""
    return None if importlib.util.find_spec("vllm") else "vLLM is not installed (no wheel for this interpreter?)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, reason in (("fuse", why_no_fuse), ("vllm", why_no_vllm), ("containers", why_no_containers)):
            if item.get_closest_marker(marker) and (why := reason()):
                item.add_marker(pytest.mark.skip(reason=why))


# --- databases -------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that start registries say by a mark whether they do so on both databases."""
    marked = [metafunc.definition.get_closest_marker(name) is not None for name in ("both_databases", "one_database")]
    if marked == [True, False]:  # fails where no fixture of the test asks for its database
        metafunc.parametrize("databases", ["sqlite", "postgres"], indirect=True, scope="module")
    elif "databases" in metafunc.fixturenames:
        sqlite = pytest.param("sqlite", id=pytest.HIDDEN_PARAM)
        metafunc.parametrize("databases", [sqlite], indirect=True, scope="module")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"HELIOS_REQUIRE_ALL=1 allows no skip: {reason}"
    return report  # type: ignore[return-value]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if REQUIRE_ALL and report.skipped:
        report.outcome, report.longrepr = "failed", f"HELIOS_REQUIRE_ALL=1 allows no skip: {report.longrepr}"
    return report  # type: ignore[return-value]


# --- sharing out -----------------------------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A file's tests stay on one worker, where they share fixtures; so do all that start vLLM, two being too many.

    ``--dist loadgroup`` would do that by marks, but pytest-xdist 3.8 does not see its groups under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "vllm" if nodeid.startswith("tests/e2e/") else nodeid.partition("::")[0]

    return ByFile(config, log)


# --- log errors ------------------------------------------------------------------------------------------------------


@dataclass
class LogErrors:
    """Records at ERROR or above, and the patterns a test allows."""

    seen: list[str] = field(default_factory=list)
    allowed: list[re.Pattern[str]] = field(default_factory=list)

    def __call__(self, pattern: str) -> None:
        """Allow error lines that match the regular expression anywhere."""
        self.allowed.append(re.compile(pattern))

    def unexpected(self, lines: list[str]) -> list[str]:
        return [line for line in lines if not any(p.search(line) for p in self.allowed)]


@pytest.fixture(autouse=True)
def expected_log_errors() -> Iterator[LogErrors]:
    errors = LogErrors()
    before = logging.getLogRecordFactory()

    def factory(*args: object, **kwargs: object) -> logging.LogRecord:
        record = before(*args, **kwargs)
        if record.levelno >= logging.ERROR and not record.name.startswith("helios.test"):
            errors.seen.append(f"{record.name}: {record.getMessage()}")
        return record

    logging.setLogRecordFactory(factory)
    yield errors
    logging.setLogRecordFactory(before)
    if left := errors.unexpected(errors.seen):
        pytest.fail("unexpected log errors:\n" + "\n".join(left), pytrace=False)


# --- a home and the command line -------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _no_real_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test touches the user's HELIOS_HOME, settings or Hub account by accident."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("HELIOS_", "HF_")) and name != "HELIOS_REQUIRE_ALL":
                patch.delenv(name)
        patch.setenv("HELIOS_HOME", str(tmp_path_factory.mktemp("no-home") / "unused"))
        patch.setenv("HELIOS_REGISTRY__MIRROR", "off")  # what a test doesn't hold is not looked for on the internet
        for name in ("CACHE_MIN_FREE", "L2_MIN_FREE"):  # nobody's disk need be empty
            patch.setenv(f"HELIOS_MOUNT__{name}", "0")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home")))
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield


@pytest.fixture
def helios_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_log_errors: LogErrors) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    monkeypatch.setenv("HELIOS_HOME", str(home.root))
    yield home
    problems = leftovers(home, tmp_path)
    if home.logs.is_dir():
        lines = [line for path in sorted(home.logs.glob("**/*.log")) for line in error_lines(path)]
        problems += [f"log: {line}" for line in expected_log_errors.unexpected(lines)]
    if problems:
        pytest.fail("left behind by the test:\n" + "\n".join(problems), pytrace=False)


def leftovers(home: Home, below: Path, grace_s: float = LEFTOVER_GRACE_S) -> list[str]:
    """Processes of the home and mounts below the directory that outlive the grace; they are ended here."""
    end = time.monotonic() + grace_s
    while (processes_of(home) or mounts_below(below)) and time.monotonic() < end:
        time.sleep(0.1)
    problems = []
    for pid, command in processes_of(home).items():
        problems.append(f"process {pid}: {command}")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            problems[-1] += " (ended just now)"
    for mountpoint in reversed(mounts_below(below)):
        problems.append(f"mount {mountpoint}")
        detach = ["umount", "-l"] if os.getuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*detach, mountpoint], check=False)
    return problems


def processes_of(home: Home) -> dict[int, str]:
    """Pid -> command of the home's processes, other than this one.

    They have this HELIOS_HOME in their environment, or log below it (vLLM's workers overwrite their environment).
    """
    wanted = f"HELIOS_HOME={home.root}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                ours = wanted in (entry / "environ").read_bytes().split(b"\0")
                ours = ours or os.readlink(entry / "fd" / "1").startswith(f"{home.root}/")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue  # it ended, or belongs to somebody else
            if ours and command:  # a zombie has none
                found[int(entry.name)] = command
    return found


def mounts_below(directory: Path) -> list[str]:
    """Mount points below the directory, outermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    decoded = [re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), point) for point in points]
    return [point for point in decoded if Path(point).is_relative_to(directory)]


def error_lines(path: Path) -> list[str]:
    """Lines of one of our JSON logs at error level or above; other programs' lines are not ours to judge."""
    out = []
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("level") in ("error", "critical"):
                out.append(line)
    return out


@dataclass
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> object:
        return json.loads(self.out)


@dataclass
class Helios:
    """The installed ``helios`` command."""

    environ: Mapping[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return Path(self.environ["HELIOS_HOME"])

    def __call__(
        self,
        *args: str | Path,
        code: int | None = 0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 120,
    ) -> Result:
        """Run a command to its end; ``code`` is the exit code it must have (None: any)."""
        done = subprocess.run(
            [str(HELIOS), *map(str, args)],
            env={**os.environ, **self.environ, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        result = Result(done.returncode, done.stdout, done.stderr)
        if code is not None and result.code != code:
            pytest.fail(f"helios {' '.join(map(str, args))}: exit {result.code}, not {code}\n{result.out}{result.err}")
        return result

    def start(
        self, *args: str | Path, env: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Start a command that stays; it is ended (SIGTERM, then SIGKILL) when the test ends."""
        process = subprocess.Popen(
            [str(HELIOS), *map(str, args)],
            env={**os.environ, **self.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()
        for process in self.started:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def helios(helios_home: Home, databases: Databases) -> Iterator[Helios]:
    command = Helios({"HELIOS_HOME": str(helios_home.root), **databases()})
    yield command
    command.stop()


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """``wait_for(condition, timeout_s=10, what="…")`` polls until it is true or fails the test."""

    def poll(condition: Callable[[], object], timeout_s: float = 10.0, what: str = "the condition") -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"{what} did not come true within {timeout_s:g} s")
            time.sleep(0.02)

    return poll
