"""The registry's process: takes the home's lock, opens the store and the metadata, serves, and ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from helios import embedded as meeting
from helios.config import Config
from helios.embedded import RegistryRecord
from helios.errors import Conflict, Unavailable
from helios.home import Home
from helios.http.server import Server, listen_tcp, listen_unix, make_server, url_of
from helios.lockfile import LockFile
from helios.malloc import few_arenas
from helios.metrics import RegistryMetrics
from helios.process import ProcessId
from heliosfs.store.keyring import seal_objects
from heliosfs.store.opening import open_objects
from registry.access import Tenants
from registry.addresses import Addresses
from registry.admission.admission import Admission
from registry.app import make_app, native_routes
from registry.catalog import Catalog
from registry.domains import Domains
from registry.fresh import Fresh
from registry.gc.jobs import Jobs
from registry.gc.leases import Leases
from registry.gc.routes import routes as gc_routes
from registry.gc.setup import make_jobs, make_mender
from registry.hub.api import HubRoute, under_tenants
from registry.hub.gate import Gate
from registry.hub.reads import Reads
from registry.hub.upload.setup import Uploads
from registry.hub.verified import VerifiedReader
from registry.ingest.ingest import Ingest
from registry.levels.fetches import Fetches
from registry.levels.levels import Levels
from registry.levels.routes import fetch_routes
from registry.levels.routes import routes as levels_routes
from registry.levels.shared import SharedFetches
from registry.member import Member
from registry.metadata.database import Database
from registry.mirror.mirror import Mirror
from registry.mirror.routes import routes as mirror_routes
from registry.pods import PodTokens
from registry.processes import Processes
from registry.pull.flight_routes import routes as flight_routes
from registry.pull.routes import routes as pull_routes
from registry.pull.setup import Pulling, kept_blobs, make_pulling
from registry.pull.sharing import Sharing
from registry.pull.spool import Spool
from registry.pushes import Pushes
from registry.quotas.quotas import Quotas, make_quotas
from registry.seals import Seals
from registry.services import Services
from registry.sessions import Sessions, own_store
from registry.threads import LONG, PIECES, UPKEEP, Threads, look_up_with
from registry.transfer.replications import Replications
from registry.transfer.routes import routes as transfer_routes
from registry.upkeep import keep_at, keep_tidy
from registry.usage.recorder import Recorder
from registry.usage.routes import routes as usage_routes
from registry.usage.telling import telling
from registry.xet.maker import Maker
from registry.xet.setup import make_signer, make_xet

log = logging.getLogger("helios.registry")

IDLE_GRACE_S: Final = 2.0
"""An embedded registry stays this long after its last user, in seconds: commands in a row share one."""
IDLE_CHECK_S: Final = 0.5

Announce = Callable[[RegistryRecord], None]


def run(config: Config, home: Home, *, embedded: bool, announce: Announce) -> int:
    """Serve until SIGTERM or SIGINT, or, embedded, until the last user has gone. Returns the exit code.

    ``announce`` is called once requests are answered. Raises Conflict naming the holder when a registry runs on this
    home already, and Unavailable, NoSpace or IntegrityError when it can't start.
    """
    few_arenas()
    try:
        home.ensure_run()
    except OSError as error:
        raise Unavailable(
            f"{home.root} can't be used: {error.strerror}", hint="Set HELIOS_HOME to a directory that you may write to."
        ) from None
    with _only_registry(home), contextlib.ExitStack() as stack:
        meeting.record_path(home).unlink(missing_ok=True)
        metrics = RegistryMetrics()
        domains = Domains(config.registry.tenants)
        objects = open_objects(config.registry, home.store, home.registry / "staging", metrics)
        stack.callback(objects.close)
        store, mark_keys = seal_objects(objects, config.registry.domains, os.environ, domains.names)
        database = _open_database(config, home)
        stack.callback(database.close)
        host, port = ("127.0.0.1", 0) if embedded else (config.registry.host, config.registry.port)
        tenants, pods = Tenants.of(config.registry, host), PodTokens(config.registry.clusters)
        member = Member(database, lease_s=config.registry.process_lease_s)
        admission = Admission(config.registry.admission)
        rules = make_quotas(config.registry)
        quotas = Quotas(database, rules, lambda q: metrics.quota_refusals.labels(q).inc(), domains.of)
        lease_s = config.registry.lease_s
        catalog = Catalog(
            database, store, domains=domains, lease_s=lease_s, admission=admission, member=member, quotas=quotas
        )
        own_store(catalog, str(home.root))
        mark_keys()
        catalog.check_domains()
        spool = Spool(home.registry / "pulls")
        ingest = Ingest(store, catalog.index, metrics=metrics)
        kept = partial(kept_blobs, catalog)
        sessions = Sessions(catalog, store, ingest, kept, grace_s=config.registry.gc_grace_s)
        stack.enter_context(member.at_work())
        sessions.recover()
        if config.registry.upstream:
            # huggingface_hub reads this once, and some of its calls know no other endpoint.
            os.environ["HF_ENDPOINT"] = config.registry.upstream
        processes = Processes(database, member, make_signer(catalog))
        stack.callback(processes.close)
        pulling = make_pulling(config.registry, os.environ, catalog, store, sessions, spool, metrics, processes)
        stack.callback(pulling.close)
        long, pieces = stack.enter_context(_threads("long", LONG)), stack.enter_context(_threads("pieces", PIECES))
        upkeep = stack.enter_context(_threads("upkeep", UPKEEP))
        mirror = Mirror(config.registry, catalog, pulling, long)
        stack.callback(mirror.close)
        if not embedded:
            mirror.warm()
        fresh = Fresh(catalog)
        stack.callback(fresh.close)
        replications = Replications(catalog, sessions, config.registry.peers)
        stack.callback(replications.close)
        jobs = make_jobs(config.registry, catalog, pulling)
        stack.callback(jobs.close)
        fetches = SharedFetches(Fetches(pulling.pulls), Sharing(catalog, processes))
        levels = Levels(config.registry, catalog, store, mirror, fetches)
        mender = make_mender(config.registry, catalog, pulling)
        stack.callback(mender.close)
        reader = VerifiedReader(store, metrics.verify_failures.inc, told=mender.told)
        stack.callback(reader.close)
        recorder = Recorder(database, metrics, keep_s=config.registry.usage_keep_days * 86400)
        told = telling(recorder)
        xet, layouts = make_xet(config.registry, home, catalog, reader, metrics, mirror.listed, told)
        seals = Seals(xet.signer, lambda: tenants.divided or bool(mirror.all_restricted()))
        addresses = Addresses(store, config.registry, seals)
        tcp = stack.enter_context(contextlib.closing(listen_tcp(host, port)))
        path = home.socket("registry")
        unix = stack.enter_context(contextlib.closing(listen_unix(path)))
        stack.callback(path.unlink, missing_ok=True)
        record = _record(path, tcp, host, embedded, store.local)
        member.reached_at(config.registry.advertise or _address(tcp, host))
        stack.callback(meeting.record_path(home).unlink, missing_ok=True)

        async def main() -> signal.Signals | None:
            look_up_with(asyncio.get_running_loop())
            pushes = Pushes(catalog, sessions)
            gate = Gate(mirror)
            uploads = Uploads(catalog, sessions, gate, processes, home.registry / "uploads")
            services = Services(
                config, home, store, catalog, sessions, pushes, fresh, metrics, addresses, tenants, pods,
                mirror.admit, mirror.check_own, mirror.all_restricted, seals, mender, long, pieces,
            )  # fmt: skip
            reads = Reads(catalog, mirror, reader, xet, metrics, addresses, told)
            hub = HubRoute(tenants, [reads.handlers(), *uploads.handlers], catalog.notice_now, gate.before)
            routes = [
                *under_tenants(
                    [
                        *native_routes(),
                        *pull_routes(pulling.pulls),
                        *mirror_routes(mirror),
                        *transfer_routes(replications, uploads.receiver),
                        *usage_routes(recorder),
                        *gc_routes(jobs, Leases(catalog)),
                        *levels_routes(levels),
                        *xet.routes(),
                        *uploads.routes,
                    ]
                ),
                *flight_routes(pulling.flights, pulling.upstream, processes.signer),
                *fetch_routes(fetches, processes.signer),
                hub,
            ]
            parts = pulling, replications, jobs, uploads, recorder, routes, layouts, upkeep
            return await _serve(services, *parts, [tcp, unix], record, embedded=embedded, announce=announce)

        stopped_by = asyncio.run(main())
    return 130 if stopped_by == signal.SIGINT else 0


def _threads(name: str, most: int) -> contextlib.closing[Threads]:
    return contextlib.closing(Threads(name, most))


def _open_database(config: Config, home: Home) -> Database:
    if config.registry.database:
        return Database.postgres(config.registry.database)
    return Database.sqlite(home.registry / "metadata.db")


async def _serve(
    services: Services,
    pulling: Pulling,
    replications: Replications,
    jobs: Jobs,
    uploads: Uploads,
    recorder: Recorder,
    routes: list[BaseRoute],
    layouts: Maker | None,
    upkeep: Threads,
    sockets: list[socket.socket],
    record: RegistryRecord,
    *,
    embedded: bool,
    announce: Announce,
) -> signal.Signals | None:
    @contextlib.asynccontextmanager
    async def meet(_app: Starlette) -> AsyncIterator[None]:
        _write_record(services.home, record)
        log.info("serving", extra={"url": record.url, "socket": record.socket, "store": services.store.describe()})
        announce(record)
        yield

    server = make_server(make_app(services, [meet], routes))
    async with asyncio.TaskGroup() as tasks, contextlib.aclosing(services.pushes), contextlib.aclosing(uploads):
        work: dict[str, Callable[[], Awaitable[None]]] = {
            "pushes": partial(services.pushes.keep_clean, upkeep),
            "store": partial(keep_tidy, services.store, upkeep),
            "uploads": partial(uploads.keep_clean, upkeep),
            "replications": replications.keep_current,
            "jobs": partial(jobs.keep_clean, upkeep),
            "quotas": partial(services.catalog.quotas.keep_counted, upkeep),
            "usage": partial(recorder.run, upkeep),
        }
        if services.config.registry.clusters:
            work["clusters"] = services.pods.run
        if layouts is not None:
            work["layouts"] = layouts.run
        if embedded:
            work["users"] = partial(_end_when_unused, services.home, server)
        background = [tasks.create_task(keep_at(what, task)) for what, task in work.items()]
        background.append(tasks.create_task(_interrupt(services, pulling, replications, jobs, uploads, server)))
        await server.serve(sockets=sockets)
        for task in background:
            task.cancel()
    return server.stopped_by


async def _interrupt(
    services: Services, pulling: Pulling, replications: Replications, jobs: Jobs, uploads: Uploads, server: Server
) -> None:
    """End pushes and pulls as soon as the server is told to stop: it waits for their clients, and they for them."""
    while not server.should_exit:  # noqa: ASYNC110 - uvicorn has a flag, no event
        await asyncio.sleep(0.1)
    services.pushes.interrupt()
    uploads.interrupt()
    await asyncio.to_thread(pulling.stop)
    await asyncio.to_thread(replications.close)
    await asyncio.to_thread(jobs.close)


async def _end_when_unused(home: Home, server: Server) -> None:
    """Stop the server once nobody has used it for a while; then hold the users' lock to the process's end.

    See helios/embedded.py. Meanwhile the lock is given back between two looks, so that users can come.
    """
    fd = os.open(meeting.users_path(home), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    unused_since: float | None = None
    while True:
        await asyncio.sleep(IDLE_CHECK_S)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            unused_since = None
            continue
        now = time.monotonic()
        unused_since = now if unused_since is None else unused_since
        if now - unused_since >= IDLE_GRACE_S:
            log.info("the last user has gone")
            server.stop()
            return
        fcntl.flock(fd, fcntl.LOCK_UN)


@contextlib.contextmanager
def _only_registry(home: Home) -> Iterator[None]:
    lock = LockFile.acquire(meeting.lock_path(home))
    if lock is None:
        holder = meeting.read_record(home)
        who = "one that is just starting"
        if holder is not None:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.started))
            kind = "an embedded one" if holder.embedded else holder.url
            who = f"{kind}, pid {holder.pid}, since {since}"
        raise Conflict(
            f"a registry runs on {home.root} already: {who}",
            hint="Use that one, end it, or choose another HELIOS_HOME.",
        )
    try:
        yield
    finally:
        lock.release()


def _record(path: Path, tcp: socket.socket, host: str, embedded: bool, store: Path | None) -> RegistryRecord:
    process = ProcessId.current()
    ticks = int(process.start.rpartition(":")[2]) / os.sysconf("SC_CLK_TCK")
    started = time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)
    return RegistryRecord(
        socket=str(path),
        url=url_of(tcp, host),
        host=host,
        port=tcp.getsockname()[1],
        pid=process.pid,
        started=round(started, 2),
        start=process.start,
        embedded=embedded,
        store=str(store or ""),
    )


def _address(tcp: socket.socket, host: str) -> str:
    """Where other processes reach this one: at the machine's name where it listens on all its addresses."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared
        return f"http://{socket.getfqdn()}:{tcp.getsockname()[1]}"
    return url_of(tcp, host)


def _write_record(home: Home, record: RegistryRecord) -> None:
    path = meeting.record_path(home)
    temporary = path.with_suffix(".json.new")
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.replace(path)
