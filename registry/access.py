"""Who sees and writes which repository: tenants, which clients name by a path prefix, and their tokens.

``Tenants`` turns a prefix and an Authorization header into an ``Access``, a value without I/O that every API asks.
Outside any tenant everything is visible that no tenant owns, and writing is open, as ``helios push`` is. A repository
that somebody may not see is reported as one that does not exist, so that names of others can't be probed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from helios.config import TenantSettings
from helios.errors import Forbidden, RepoNotFound, Unauthorized, UsageError
from helios.names import RepoId

log = logging.getLogger("helios.registry.access")

NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
"""A tenant's name: a DNS label, so that it fits into URLs, labels and file names."""
LOOK_AGAIN_S: Final = 2.0
"""How often a file of tokens is looked at for changes, in seconds: a revoked token works no longer than that."""
MAX_TOKENS: Final = 10_000
BAD_CREDENTIALS: Final = "Invalid credentials in Authorization header"
"""huggingface_hub takes any other 401 on a repository's URL for a repository that does not exist."""

_LINE = re.compile(r"([0-9a-f]{64})(?:\s+(\S.*))?\Z")


class TokenMissing(Unauthorized):
    """No token came where one is needed."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may see and change. ``tenant`` is None outside any tenant; ``label`` names the token used."""

    tenant: str | None = None
    sees: tuple[str, ...] = ("*",)
    owns: tuple[str, ...] = ("*",)
    hidden: tuple[str, ...] = ()
    """Patterns of what belongs to other tenants."""
    label: str | None = None

    def visible(self, repo: RepoId) -> bool:
        """Whether the caller may know of it; what a tenant owns is nobody else's, whatever ``sees`` says."""
        if self.tenant is not None and _matches(repo, self.owns):
            return True
        return _matches(repo, self.sees) and not _matches(repo, self.hidden)

    def writable(self, repo: RepoId) -> bool:
        return self.visible(repo) and _matches(repo, self.owns)

    def check_visible(self, repo: RepoId) -> None:
        """Raise RepoNotFound, in the words of a repository that is not there, unless the caller may know of it."""
        if not self.visible(repo):
            raise RepoNotFound(f"the registry has no repository {repo.id!r} ({repo.kind})")

    def check_writable(self, repo: RepoId) -> None:
        """Raise RepoNotFound for a repository out of sight, Forbidden for one that the tenant may only read."""
        self.check_visible(repo)
        if not self.writable(repo):
            raise Forbidden(
                f"tenant {self.tenant!r} may read {repo.id} ({repo.kind}) but not change it",
                hint=f"Whoever runs the registry can add it to registry.tenants.{self.tenant}.owns.",
            )


PUBLIC: Final = Access()
"""Everything, as long as no tenant owns anything."""


class Tokens:
    """The sha256 digests of one tenant's tokens, from a file that may change while the registry runs.

    A line is 64 hexadecimal digits and, if one likes, a label; empty lines and ``#`` are skipped. Tokens are random and
    long, so a plain digest can't be reversed; neither they nor the header they come in are ever logged.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UsageError for a file that can't be read or holds anything else."""
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._labels = _read(path)
        self._looked = clock()

    def label(self, token: str) -> str | None:
        """The label of a token that is in the file ("" for one without); None for any other."""
        self._look_again()
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for known, label in self._labels.items():
            # Every line is compared, each in constant time: how long it takes says nothing about what matched.
            if hmac.compare_digest(known, digest):
                found = label
        return found

    def _look_again(self) -> None:
        with self._lock:
            if self._clock() - self._looked < LOOK_AGAIN_S:
                return
            self._looked = self._clock()
            try:
                stamp = _stamp(self._path)
                if stamp != self._stamp:
                    self._labels, self._stamp = _read(self._path), stamp
            except UsageError as error:
                log.warning(
                    "a file of tokens can't be read; the tokens known so far count", extra={"error": str(error)}
                )


class Tenants:
    """The tenants of one registry."""

    def __init__(self, settings: Mapping[str, TenantSettings]) -> None:
        """Raises UsageError naming the tenant whose name or file of tokens is wrong."""
        self._access: dict[str, Access] = {}
        self._tokens: dict[str, Tokens] = {}
        for name, tenant in settings.items():
            if not NAME.match(name):
                raise UsageError(f"registry.tenants: {name!r} is not a name: use a-z, 0-9 and - (at most 63)")
            others = tuple(p for other, its in settings.items() if other != name for p in its.owns)
            self._access[name] = Access(name, tuple(tenant.sees), tuple(tenant.owns), others)
            if tenant.tokens:
                self._tokens[name] = Tokens(Path(tenant.tokens))
        self._outside = Access(hidden=tuple(p for its in settings.values() for p in its.owns))

    def access(self, tenant: str | None, authorization: str | None) -> Access:
        """What a caller under a tenant's prefix (None: under none) may do with these credentials.

        Raises RepoNotFound for an unknown tenant, Unauthorized for a tenant's missing or wrong token. Outside tenants,
        and where a tenant has no tokens, credentials do not matter: clients send the user's token for the Hub.
        """
        if tenant is None:
            return self._outside
        access = self._access.get(tenant)
        if access is None:
            raise RepoNotFound(f"the registry has no tenant {tenant[:80]!r}")
        if (tokens := self._tokens.get(tenant)) is None:
            return access
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise TokenMissing(f"tenant {tenant!r} needs a token: set HF_TOKEN, or run `hf auth login`")
        label = tokens.label(token.strip())
        if label is None:
            raise Unauthorized(BAD_CREDENTIALS)
        return Access(access.tenant, access.sees, access.owns, access.hidden, label)


def _matches(repo: RepoId, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the id (``org/name``) or the canonical name (``datasets/org/name``)."""
    return any(fnmatchcase(repo.id, pattern) or fnmatchcase(str(repo), pattern) for pattern in patterns)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UsageError(f"the file of tokens {path} can't be read: {error.strerror}") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file of tokens {path} can't be read: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise UsageError(
                f"{path}, line {number}: not the sha256 of a token",
                hint='Write what `printf %s "$TOKEN" | sha256sum` prints, 64 hexadecimal digits, then a label.',
            )
        found[match[1]] = match[2] or ""
    if len(found) > MAX_TOKENS:
        raise UsageError(f"{path} holds {len(found)} tokens; at most {MAX_TOKENS} are possible")
    return found
