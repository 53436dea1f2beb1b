"""Who sees and writes which repository: tenants, which clients name by a path prefix, and their tokens.

``Tenants`` turns a prefix and an Authorization header into an ``Access``, a value without I/O that every API asks.
Outside any tenant everything is visible that no tenant owns, and writing is open, as ``helios push`` is; what concerns
everybody (removing, collecting, releasing…) is administration. A repository that somebody may not see is reported as
one that does not exist, so that names of others can't be probed. docs/registry-access.md says who may do what.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from helios.accepted import Tokens
from helios.config import RegistrySettings, TenantSettings
from helios.errors import Forbidden, RepoNotFound, Unauthorized, UsageError
from helios.http.protocol import PEER
from helios.names import RepoId

NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
"""A tenant's name: a DNS label, so that it fits into URLs, labels and file names."""
BAD_CREDENTIALS: Final = "Invalid credentials in Authorization header"
"""huggingface_hub takes any other 401 on a repository's URL for a repository that does not exist."""


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
    admin: bool = False
    """Whether the caller may do what concerns everybody."""
    trusted: bool = False
    """Whether what an upstream lets not everybody read is open to the caller, whatever it says of his token."""

    def visible(self, repo: RepoId) -> bool:
        """Whether the caller may know of it; what a tenant owns is nobody else's, whatever ``sees`` says."""
        if self.tenant is not None and matches(repo, self.owns):
            return True
        return matches(repo, self.sees) and not matches(repo, self.hidden)

    def writable(self, repo: RepoId) -> bool:
        return self.visible(repo) and matches(repo, self.owns)

    def governs(self, repo: RepoId) -> bool:
        """Whether the caller may remove or retire it: a tenant what it owns, else whoever administers."""
        return self.writable(repo) and (self.admin or self.tenant is not None)

    def check_admin(self, what: str) -> None:
        """Raise Forbidden unless the caller administers the registry; ``what`` begins the sentence."""
        if not self.admin:
            raise Forbidden(
                f"{what} is for whoever administers the registry",
                hint="Do it on the registry's own machine, or with a token of registry.admin_tokens in HELIOS_TOKEN.",
            )

    def check_governs(self, repo: RepoId, what: str) -> None:
        """Raise RepoNotFound or Forbidden unless ``governs``."""
        self.check_writable(repo)
        if not self.governs(repo):
            self.check_admin(what)

    def check_visible(self, repo: RepoId) -> None:
        """Raise RepoNotFound, in the words of a repository that is not there, unless the caller may know of it."""
        if not self.visible(repo):
            raise RepoNotFound(f"the registry has no repository {repo.id!r} ({repo.kind})")

    def check_writable(self, repo: RepoId) -> None:
        """Raise RepoNotFound for a repository out of sight, Forbidden for one that the tenant may only read."""
        self.check_visible(repo)
        if not self.writable(repo):
            if self.tenant is None:
                raise Forbidden(f"this token may read {repo.id} ({repo.kind}) but not change it")
            raise Forbidden(
                f"tenant {self.tenant!r} may read {repo.id} ({repo.kind}) but not change it",
                hint=f"Whoever runs the registry can add it to registry.tenants.{self.tenant}.owns.",
            )


class Lister:
    """Chooses what a list shows."""

    def __init__(self, who: Access, hidden: set[str]) -> None:
        self._who, self._hidden = who, hidden
        self.all = who == replace(who, sees=("*",), hidden=()) and not hidden
        """Whether nothing is left out."""

    def shows(self, name: str) -> bool:
        """Whether a list names the repository with this canonical name."""
        return name not in self._hidden and self._who.visible(RepoId.from_canonical(name))


PUBLIC: Final = Access()
"""Everything, as long as no tenant owns anything."""

OWN: Final = Access(admin=True, trusted=True)
"""The registry's own user, or root, on its unix socket."""


class Tenants:
    """The tenants of one registry."""

    def __init__(
        self, settings: Mapping[str, TenantSettings], *, admins: str = "", nodes: str = "", alone: bool = True
    ) -> None:
        """``admins`` and ``nodes`` are files of tokens; ``alone`` says that only this machine reaches the registry.

        Raises UsageError naming the tenant whose name or file of tokens is wrong.
        """
        self._access: dict[str, Access] = {}
        self._tokens: dict[str, Tokens] = {}
        for name, tenant in settings.items():
            if not NAME.match(name):
                raise UsageError(f"registry.tenants: {name!r} is not a name: use a-z, 0-9 and - (at most 63)")
            others = tuple(p for other, its in settings.items() if other != name for p in its.owns)
            self._access[name] = Access(name, tuple(tenant.sees), tuple(tenant.owns), others)
            if tenant.tokens:
                self._tokens[name] = Tokens(Path(tenant.tokens))
        owned = tuple(p for its in settings.values() for p in its.owns)
        # Nobody is shut out of a registry of one's own: where there are no tenants, no tokens, and no other machines.
        self._outside = Access(hidden=owned, admin=alone and not settings and not admins)
        self._admins, self._nodes = (Tokens(Path(file)) if file else None for file in (admins, nodes))
        self._namespaces = [(name, tuple(its.namespaces)) for name, its in settings.items() if its.namespaces]
        self.divided = bool(settings)
        """Whether there are tenants, so that not everybody may read everything."""

    @classmethod
    def of(cls, settings: RegistrySettings, host: str) -> Tenants:
        """As the configuration says, for a registry that listens at ``host``."""
        return cls(settings.tenants, admins=settings.admin_tokens, nodes=settings.node_tokens, alone=_is_loopback(host))

    def caller(self, scope: Mapping[str, Any], tenant: str | None) -> Access:
        """What whoever sent a request (an ASGI scope) under a tenant's prefix may do; raises as ``access``."""
        peer = scope.get("extensions", {}).get(PEER)
        if tenant is None and peer is not None and peer["uid"] in (os.getuid(), 0):
            return OWN
        headers = (value for name, value in scope["headers"] if name == b"authorization")
        return self.access(tenant, next((value.decode("latin-1") for value in headers), None))

    def access(self, tenant: str | None, authorization: str | None) -> Access:
        """What a caller under a tenant's prefix (None: under none) may do with these credentials.

        Raises RepoNotFound for an unknown tenant, Unauthorized for a tenant's missing or wrong token. Outside tenants,
        and where a tenant has no tokens, credentials do not matter: clients send the user's token for the Hub.
        """
        scheme, _, token = (authorization or "").strip().partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        if tenant is None:
            return self._with_token(token) if token else self._outside
        access = self._access.get(tenant)
        if access is None:
            raise RepoNotFound(f"the registry has no tenant {tenant[:80]!r}")
        if (tokens := self._tokens.get(tenant)) is None:
            return access
        if not token:
            raise TokenMissing(f"tenant {tenant!r} needs a token: set HF_TOKEN, or run `hf auth login`")
        label = tokens.label(token)
        if label is None:
            raise Unauthorized(BAD_CREDENTIALS)
        return replace(access, label=label)

    def why_not(self, namespace: str, repo: RepoId, restricted: set[str]) -> str | None:
        """Why pods of a Kubernetes namespace may not read a repository, None where they may.

        They are any tenant's that names the namespace, or else nobody's, who reads what no tenant owns. Nobody can ask
        an upstream for them, so what it lets not everybody read (``restricted``: canonical names) is closed to them.
        """
        tenants = [name for name, patterns in self._namespaces if any(fnmatchcase(namespace, p) for p in patterns)]
        if not any(access.visible(repo) for access in [self._access[name] for name in tenants] or [self._outside]):
            if tenants:
                return f"the namespace {namespace} is of {' and '.join(tenants)}, who may not read {repo.id}"
            return f"the namespace {namespace} is of no tenant, and {repo.id} is not for everybody"
        if str(repo) in restricted:
            return f"{repo.id} is gated or private upstream, and pods have no account there"
        return None

    def _with_token(self, token: str) -> Access:
        """Outside tenants; a token that is none of ours is the caller's for the upstream."""
        if self._admins is not None and (label := self._admins.label(token)) is not None:
            return replace(OWN, label=label)
        if self._nodes is not None and (label := self._nodes.label(token)) is not None:
            return Access(owns=(), label=label, trusted=True)
        return self._outside


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def matches(repo: RepoId, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the id (``org/name``) or the canonical name (``datasets/org/name``)."""
    return any(fnmatchcase(repo.id, pattern) or fnmatchcase(str(repo), pattern) for pattern in patterns)
