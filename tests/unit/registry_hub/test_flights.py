"""Downloads that are shared: one for each content, whoever leaves, whatever the store holds already."""

import contextlib
import os
import queue
import threading
import time
from functools import partial, partialmethod
from pathlib import Path

import pytest

from helios.config import TenantSettings
from helios.errors import NoSpace, Unavailable
from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import PUBLIC
from registry.catalog import Catalog
from registry.domains import Domains
from registry.ingest.ingest import Ingest
from registry.pull import flight as flight_module
from registry.pull import flights as flights_module
from registry.pull import retry
from registry.pull.flight import Flight
from registry.pull.flights import SLACK, Flights
from registry.pull.remote import Remote
from registry.pull.setup import kept_blobs
from registry.pull.spool import Partial, Spool
from registry.pull.upstream import Stopped
from registry.pull.upstream import Upstream as Client
from registry.pull.width import Width
from registry.sessions import Session, Sessions
from tests.support.postgres import open_database
from tests.support.upstream import Fault, Upstream

REPO, OTHER = RepoId.parse("org/m"), RepoId.parse("org/tune")
BIG = bytes(range(256)) * 80_000
"""20 MB: three pieces."""
FILES = {"config.json": b'{"a": 1}', "big.dat": BIG}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)


@pytest.fixture
def hub():
    with Upstream() as found:
        for name in ("org/m", "org/tune"):
            found.commit(name, FILES)
        yield found
        assert found.violations == []


class Site:
    """Flights over a real store and a real upstream."""

    def __init__(
        self, hub: Upstream, root, stack: contextlib.ExitStack, engine_url, *, finish=True, free=1 << 40, tenants=None
    ) -> None:
        store = DirectoryStore(root / "store")
        stack.callback(store.close)
        database = open_database(root / "metadata.db", engine_url)
        stack.callback(database.close)
        self.catalog = Catalog(database, store, domains=Domains(tenants))
        sessions = Sessions(self.catalog, store, Ingest(store, self.catalog.index), partial(kept_blobs, self.catalog))
        self.client = Client(hub.url, stall_s=2)
        stack.callback(self.client.close)
        self.sessions = sessions
        self.flights = Flights(
            self.client,
            database,
            sessions,
            Spool(root / "pulls"),
            connections=8,
            finish=finish,
            free_bytes=lambda: {"both": free},
        )
        stack.callback(self.flights.close)

    def snapshot(self, repo=REPO):
        return self.client.snapshot(repo, "main", threading.Event())

    def join(self, path: str, repo=REPO) -> Flight:
        snapshot = self.snapshot(repo)
        (file,) = [file for file in snapshot.files if file.path == path]
        return self.flights.join(repo, snapshot.commit, file, None)


@pytest.fixture
def make(hub, tmp_path, engine_url):
    with contextlib.ExitStack() as stack:
        yield lambda **options: Site(hub, tmp_path, stack, engine_url, **options)


def finish(flight: Flight, advance=lambda here, attempt: None):
    return flight.wait(threading.Event(), advance)


def test_all_who_want_a_content_share_its_flight(hub, make):
    hub.bytes_per_s = 20_000_000
    site = make()
    first = site.join("big.dat")
    assert site.join("big.dat") is first
    assert site.join("big.dat", OTHER) is first, "a file of the LFS is the same in every repository"
    assert site.join("config.json") is not site.join("config.json", OTHER), "a sha1 is not believed across repositories"
    assert finish(first).size == len(BIG)
    landed = site.join("big.dat", OTHER)
    assert landed is not first
    assert finish(landed).sha256 == first.file.sha256
    assert hub.sent("^/repos/") == len(BIG)
    with pytest.raises(flight_module.Landed), landed.reading(0, lambda: None):
        raise AssertionError("unreachable")


def test_domains_share_no_flight(hub, make):
    """What one tenant downloads says nothing to another, not even by how fast it comes."""
    hub.bytes_per_s = 40_000_000
    site = make(tenants={"tune": TenantSettings(owns=["org/tune"], domain="tune")})
    first, other = site.join("big.dat"), site.join("big.dat", OTHER)
    assert other is not first
    for flight, domain in ((first, PUBLIC), (other, "tune")):
        entry = finish(flight)
        assert site.catalog.contents.has_blob(domain, entry.sha256) is not None
    assert hub.sent("^/repos/") == 2 * len(BIG)
    deadline = time.monotonic() + 5
    while (site.flights.active(REPO) or site.flights.active(OTHER)) and time.monotonic() < deadline:
        time.sleep(0.01)
    site.sessions.clean()
    kept = kept_blobs(site.catalog)
    assert {domain for domain, _ in kept} == {PUBLIC, "tune"}
    assert all(site.catalog.contents.has_blob(*each) is not None for each in kept), "both stay for their pulls"


def test_what_is_stored_stays_though_no_commit_holds_it(hub, make):
    site = make()
    entry = finish(site.join("config.json"))
    deadline = time.monotonic() + 5
    while site.flights.active(REPO) and time.monotonic() < deadline:
        time.sleep(0.01)
    site.sessions.clean()
    assert site.catalog.contents.has_blob(PUBLIC, entry.sha256) is not None
    assert finish(site.join("config.json")).sha256 == entry.sha256
    assert len(hub.requests("/resolve/")) == 1


def test_a_flight_ends_when_nobody_wants_it_and_need_not_finish(hub, make, monkeypatch):
    monkeypatch.setattr(flight_module, "IDLE_S", 0.2)
    hub.bytes_per_s = 1_000_000
    site = make(finish=False)
    flight = site.join("big.dat")
    with flight.reading(0, lambda: None):
        assert not flight.ended.wait(0.8), "somebody reads"
    assert flight.ended.wait(5)
    assert isinstance(flight.error, Stopped)
    hub.bytes_per_s = None
    assert finish(site.join("big.dat")).size == len(BIG)
    assert hub.sent("^/repos/") < 2 * len(BIG)


def test_the_last_reader_does_not_wait_for_the_file_to_go(make, monkeypatch):
    """It reads on the event loop; the pages of a file without a name go with its last descriptor."""
    closed = queue.SimpleQueue()
    close = Partial.close

    def closing(partial: Partial) -> None:
        open_here = 0
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                open_here += path.readlink().name == f"{partial.path.name} (deleted)"
        closed.put((threading.current_thread(), open_here))
        close(partial)

    monkeypatch.setattr(Partial, "close", closing)
    flight = make().join("big.dat")
    with flight.reading(0, lambda: None) as reader:
        assert finish(flight).size == len(BIG)
        assert flight.ended.wait(5), "nobody else waits for who still reads"
        file, end = reader.ready(0, begun=False)
        assert os.pread(file.fileno(), end, 0) == BIG
        assert closed.empty(), "somebody reads"
    thread, descriptors = closed.get(timeout=5)
    assert thread is not threading.current_thread()
    assert descriptors == 1, "the reader's own was not the last"
    with pytest.raises(flight_module.Landed), flight.reading(0, lambda: None):
        raise AssertionError("unreachable")


def test_one_that_stops_waiting_stops_nobody(hub, make):
    hub.bytes_per_s = 10_000_000
    flight = make().join("big.dat")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        flight.wait(stop, lambda here, attempt: None)
    seen = []
    assert finish(flight, lambda here, attempt: seen.append(here)).size == len(BIG)
    assert seen == sorted(seen)


def test_small_files_do_not_wait_for_large_ones(hub, make, monkeypatch):
    monkeypatch.setattr(flights_module, "LARGE", 1)
    hub.faults = [Fault("^/repos/", delay_s=3, times=-1)]
    site = make()
    large = site.join("big.dat")
    assert finish(site.join("config.json")).size == 8
    assert not large.over


def test_room_is_looked_for_and_what_is_here_counts(hub, make):
    site = make(free=2 * len(BIG) + SLACK - 1)
    with pytest.raises(NoSpace, match="only"):
        site.join("big.dat")
    assert hub.requests("^/repos/") == []
    assert finish(site.join("config.json")).size == 8


def test_after_the_end_there_are_no_new_flights(hub, make):
    hub.faults = [Fault("^/repos/", delay_s=10, times=-1)]
    site = make()
    flight = site.join("big.dat")
    snapshot = site.snapshot()
    site.flights.close()
    assert isinstance(flight.error, Stopped)
    with pytest.raises(Unavailable, match="stopping"):
        site.flights.join(REPO, snapshot.commit, snapshot.files[0], None)


def test_the_end_waits_for_whoever_ends_the_session_of_the_last_one(hub, make, monkeypatch, caplog):
    """That is a flight's thread, after the flight; the database is closed next."""
    site, ending, may_end, ended, close = make(), threading.Event(), threading.Event(), [], Session.close

    def slowly(session: Session) -> None:
        ending.set()
        assert may_end.wait(30)
        close(session)
        ended.append(session)

    monkeypatch.setattr(Session, "close", slowly)
    finish(site.join("config.json"))
    assert ending.wait(30)
    site.flights.close(timeout_s=0.05)
    assert "downloads did not end in time" in caplog.text
    may_end.set()
    site.flights.close()
    assert len(ended) == 1


def test_a_signed_url_that_ends_is_asked_for_again(hub, make, monkeypatch):
    """The place that one range was redirected to is used for the next ones, until it refuses."""
    monkeypatch.setattr(Width, "__init__", partialmethod(Width.__init__, most=1))  # one range after the other
    hub.commit("org/m", {"huge.dat": BIG * 3})
    hub.faults = [Fault("^/repos/", status=403, skip=2)]
    flight = make().join("huge.dat")
    assert finish(flight).size == 3 * len(BIG)
    assert len(hub.requests("/resolve/")) == 2
    assert hub.faults[0].times == 0


def test_an_unexpected_error_ends_the_flight_and_is_logged(hub, make, monkeypatch, expected_log_errors):
    expected_log_errors("a range broke")
    monkeypatch.setattr(Remote, "_check_head", lambda *args: 1 / 0)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        finish(make().join("big.dat"))
