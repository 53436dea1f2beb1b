"""What a publish must pass: the rule of its repository decides on formats, pickled files and signatures.

``examine`` looks at a snapshot before it becomes visible. It reads the instructions of pickled files and the
signature, never the weights. What it holds back is recorded in the publish's own transaction
(registry/metadata/quarantine.py), so there is no moment in which a held file can be had.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from helios.config import AdmissionRule
from helios.errors import BadSignature, NotAdmitted, UsageError
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry
from registry.admission import pickles, signatures
from registry.admission.formats import FORMATS, OTHER, PICKLE, named

log = logging.getLogger("helios.registry.admission")

Open = Callable[[FileEntry], IO[bytes]]
"""Opens a stored file: bytes that were checked, and that can be seeked in."""


@dataclass(frozen=True, slots=True)
class Held:
    """A file that is kept back: what it is and what the scan saw."""

    path: str
    sha256: str
    findings: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is held back, and who signed the snapshot (None: nobody, or nobody was asked for)."""

    held: list[Held] = field(default_factory=list)
    signer: str | None = None


class Admission:
    """The rules, in order; the first whose pattern fits a repository's id counts, and last a default one."""

    def __init__(self, rules: Sequence[AdmissionRule] = ()) -> None:
        """Raises UsageError for a rule that names a format there is not, or a signer without who vouches for it."""
        known = {*FORMATS, OTHER}
        for rule in rules:
            if unknown := sorted(set(rule.formats) - known):
                raise UsageError(
                    f"registry.admission for {rule.repo!r} names the unknown format {unknown[0]!r}; "
                    f"known: {', '.join(sorted(known))}"
                )
            if bool(rule.identity) != bool(rule.issuer):
                raise UsageError(
                    f"registry.admission for {rule.repo!r}: identity and issuer belong together",
                    hint="Who signed is known by the word of an issuer: name the one whose word counts.",
                )
        self._rules = [*rules, AdmissionRule()]

    def rule(self, repo: RepoId) -> AdmissionRule:
        return next(rule for rule in self._rules if fnmatch.fnmatchcase(repo.id, rule.repo))

    def check_names(self, repo: RepoId, paths: Iterable[str]) -> None:
        """Raises NotAdmitted for a path whose name says already that it is not taken: before its bytes travel."""
        allowed = self.rule(repo).formats
        for path in paths:
            kind = named(path)
            if allowed and kind not in allowed and kind != PICKLE:
                raise NotAdmitted(
                    f"{repo.id}: {path} is {_article(kind)} file; only {', '.join(allowed)} may be published",
                    hint="Leave the file out, or ask whoever runs the registry (registry.admission, formats).",
                )

    def concerns(self, repo: RepoId, paths: Iterable[str]) -> bool:
        """Whether ``examine`` would look at anything but names."""
        rule = self.rule(repo)
        return bool(rule.formats) or rule.signature != "ignore" or any(named(path) == PICKLE for path in paths)

    def examine(self, repo: RepoId, files: Mapping[str, FileEntry], open_: Open) -> Verdict:
        """Raises NotAdmitted naming a file that the rule refuses, BadSignature for a signature that is wrong."""
        rule = self.rule(repo)
        self.check_names(repo, files)
        signer = self._signer(repo, rule, files, open_)
        held: dict[str, Held] = {}
        for path, entry in files.items():
            if named(path) != PICKLE or rule.pickle == "allow":
                continue
            with open_(entry) as content:
                findings = pickles.scan(content)
            if findings is None:
                continue
            if rule.pickle == "refuse":
                raise NotAdmitted(
                    f"{repo.id}: {path} is read with pickle, which runs whatever it says ({findings.text()})",
                    hint="Convert it to safetensors, or ask whoever runs the registry (registry.admission, pickle).",
                )
            held.setdefault(entry.sha256, Held(path, entry.sha256, findings.text()))
        return Verdict(list(held.values()), signer)

    def may_be_read(self, repo: RepoId) -> bool:
        """Whether the repository's rule lets pickled files out although they were held back once."""
        return self.rule(repo).pickle == "allow"

    def _signer(self, repo: RepoId, rule: AdmissionRule, files: Mapping[str, FileEntry], open_: Open) -> str | None:
        entry = files.get(signatures.SIGNATURE)
        if rule.signature == "ignore" or (entry is None and rule.signature == "verify"):
            return None
        if entry is None or entry.size > signatures.MAX_SIGNATURE:
            raise BadSignature(
                f"{repo.id}: a signature ({signatures.SIGNATURE}) is required here and the snapshot has none",
                hint="Sign the directory with model_signing and publish it with its signature.",
            )
        with open_(entry) as content:
            signature = content.read()
        return signatures.verify(repo.id, signature, {path: file.sha256 for path, file in files.items()}, rule)


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
