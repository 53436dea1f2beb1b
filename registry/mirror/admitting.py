"""The registry's rules on formats, pickled files and signatures (docs/registry-admission.md), ahead of a publish.

A publish examines a whole snapshot. What is served of one before it is published must pass as much: names are checked
when the listing comes, a pickled file is scanned when it is whole, and where signatures count nothing is served before
the snapshot is complete.
"""

from __future__ import annotations

from functools import partial

from helios.errors import Quarantined, Unavailable
from heliosfs.store.manifest import FileEntry
from registry.admission.formats import PICKLE, named
from registry.catalog import Catalog
from registry.mirror.brief import Brief
from registry.mirror.state import Mirrored

SCANNED_S = 600.0
"""How long a scan's outcome is remembered, in seconds."""


class Admitting:
    """Decides on single files of mirrored snapshots. Blocking; threads may share it."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._scanned: Brief[tuple[str, str], str] = Brief(4096)

    def whole_first(self, found: Mirrored, path: str) -> bool:
        """Whether no byte of the file may leave before all of it is here."""
        rule = self._catalog.admission.rule(found.snapshot.repo)
        return rule.signature != "ignore" or (named(path) == PICKLE and rule.pickle != "allow")

    def check(self, found: Mirrored, path: str, sha256: str) -> None:
        """Raises NotAdmitted or Quarantined for a stored file that must not leave, Unavailable where it is too soon."""
        if not self.whole_first(found, path):
            return
        repo = found.snapshot.repo
        if self._catalog.admission.rule(repo).signature != "ignore":
            raise Unavailable(
                f"{repo.id}@{found.snapshot.commit} is served when all of it is here and its signature was checked",
                hint=f"It is on its way; `helios pull {repo.id}` shows how far it is.",
            )
        key = str(repo), sha256
        findings = self._scanned.get(key)
        if findings is None:
            file = found.files[path]
            entry = FileEntry(sha256, file.size, file.git_oid, "", file.lfs)
            stored = partial(self._catalog.contents.open_stored, self._catalog.domain_of(repo))
            verdict = self._catalog.admission.examine(repo, {path: entry}, stored)
            findings = verdict.held[0].findings if verdict.held else ""
            self._scanned.put(key, findings, SCANNED_S)
        if findings:
            raise Quarantined(
                f"{repo.id}: {path} is kept back: {findings}",
                hint=f"Pull the model, then look at it and let it go: helios quarantine release {repo.id} {sha256}",
            )
