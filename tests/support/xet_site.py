"""A registry that serves Xet, in this process: what routes need, without a daemon and with a clock of the test's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from helios.config import RegistrySettings
from helios.errors import HeliosError
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from registry.access import Tenants
from registry.addresses import Addresses
from registry.app import answer_error
from registry.catalog import Catalog
from registry.hub.api import HubRoute, under_tenants
from registry.hub.gate import Gate
from registry.hub.reads import Reads
from registry.hub.verified import VerifiedReader
from registry.ingest.ingest import Ingest
from registry.ingest.reader import FileSource
from registry.metadata.database import Database
from registry.mirror.mirror import Mirror
from registry.xet.layouts import Layouts
from registry.xet.maker import Maker
from registry.xet.routes import XetService
from registry.xet.tokens import Signer
from tests.support.mirrors import make_mirror


@dataclass
class XetParts:
    """A store and a catalog, and the routes of Xet and of the Hub on them; every LFS file is served over Xet."""

    root: Path
    store: DirectoryStore
    catalog: Catalog
    reader: VerifiedReader
    mirror: Mirror
    metrics: RegistryMetrics
    now: list[float] = field(default_factory=lambda: [1_000_000.0])

    def publish(self, repo: str, files: dict[str, bytes], *, lay_out: bool = True) -> str:
        """Returns the commit."""
        ingest, entries = Ingest(self.store, self.catalog.index), {}
        for path, data in files.items():
            (self.root / "file").write_bytes(data)
            with FileSource(self.root / "file") as source:
                entries[path] = ingest.ingest(path, len(data), source).entry
        published = self.catalog.publisher.publish(
            RepoId.from_canonical(repo), "main", entries, author="me", message=""
        )
        maker = Maker(self.catalog, 1, self.root / "scratch", self.metrics)
        while lay_out and maker.step():
            pass
        return published.record.commit

    def service(self, *, on: bool = True) -> XetService:
        signer = Signer(b"k" * 32, lambda: self.now[0])
        return XetService(Layouts(self.catalog, on=on, least=1), signer, self.reader, self.metrics)

    def addresses(self) -> Addresses:
        return Addresses(self.catalog.store, RegistrySettings())

    def routes(self, *, on: bool = True) -> list[BaseRoute]:
        service = self.service(on=on)
        reads = Reads(self.catalog, self.mirror, self.reader, service, self.metrics, self.addresses())
        hub = HubRoute(Tenants({}), [reads.handlers()], before=Gate(self.mirror).before)
        return [*under_tenants(service.routes()), hub]

    def app(self, *, on: bool = True) -> Starlette:
        return Starlette(routes=self.routes(on=on), exception_handlers={HeliosError: answer_error})


@contextlib.contextmanager
def xet_parts(root: Path) -> Iterator[XetParts]:
    """The parts, for as long as the block runs."""
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(DirectoryStore(root / "store")))
        database = stack.enter_context(contextlib.closing(Database.sqlite(root / "metadata.db")))
        catalog, metrics = Catalog(database, store), RegistryMetrics()
        reader = stack.enter_context(contextlib.closing(VerifiedReader(store, metrics.verify_failures.inc)))
        yield XetParts(root, store, catalog, reader, make_mirror(stack, catalog, root), metrics)
