"""Which domain a repository's content belongs to: that of the tenant who owns it.

A domain is the unit of deduplication, deletion and encryption (docs/registry-domains.md): what is stored in one is
unknown in every other. A repository stays in the domain that it was made in; its row says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from helios.config import TenantSettings
from helios.errors import InvalidInput, UsageError
from helios.names import RepoId
from heliosfs.store.keys import PUBLIC, check_domain
from registry.access import matches

MAX_SAID: Final = 5
"""Most repositories that a message names."""


class Domains:
    """The domains of one registry's tenants."""

    def __init__(self, tenants: Mapping[str, TenantSettings] | None = None) -> None:
        """Raises UsageError naming the tenant whose domain is malformed or would hold nothing."""
        self._owned: list[tuple[str, str, tuple[str, ...]]] = []
        for name, tenant in (tenants or {}).items():
            domain = tenant.domain or PUBLIC
            try:
                check_domain(domain)
            except InvalidInput as error:
                raise UsageError(f"registry.tenants.{name}.domain: {error.message}") from None
            if domain != PUBLIC and not tenant.owns:
                raise UsageError(
                    f"registry.tenants.{name} has the domain {domain} and owns nothing that could lie there",
                    hint=f'Say what is its own: registry.tenants.{name}.owns = ["{name}/*"].',
                )
            self._owned.append((name, domain, tuple(tenant.owns)))
        self.names = sorted({PUBLIC} | {domain for _, domain, _ in self._owned})
        """The domains that somebody may publish into."""

    def of(self, repo: RepoId) -> str:
        """The domain of a repository. Raises UsageError where two tenants own it that have different ones."""
        owners = [(name, domain) for name, domain, patterns in self._owned if matches(repo, patterns)]
        if len({domain for _, domain in owners}) > 1:
            said = " and ".join(f"{name} (domain {domain})" for name, domain in owners)
            raise UsageError(
                f"{repo.id} ({repo.kind}) is owned by the tenants {said}, and can lie in one domain only",
                hint="Make their registry.tenants.*.owns exclude each other, or their domains the same.",
            )
        return owners[0][1] if owners else PUBLIC

    def tenants_of(self, domain: str) -> list[str]:
        """The tenants whose repositories lie in a domain."""
        return sorted(name for name, found, _ in self._owned if found == domain)

    def check(self, repositories: Iterable[tuple[RepoId, str]]) -> None:
        """Raise UsageError where repositories, given with the domains they lie in, should lie in others."""
        moved = [(repo, there, self.of(repo)) for repo, there in repositories]
        moved = [(repo, there, wanted) for repo, there, wanted in moved if there != wanted]
        if not moved:
            return
        said = ", ".join(f"{repo.id} ({there}, not {wanted})" for repo, there, wanted in moved[:MAX_SAID])
        more = f" and {len(moved) - MAX_SAID} more" if len(moved) > MAX_SAID else ""
        raise UsageError(
            f"repositories lie in other domains than the settings say: {said}{more}",
            hint="Content stays in the domain it was stored in. Start with the former registry.tenants.*.owns and "
            "domain, carry these out (helios bundle export) and remove them (helios rm); then bring them in with the "
            "new settings (helios bundle import).",
        )
