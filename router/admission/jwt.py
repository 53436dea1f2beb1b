"""JSON Web Tokens as credentials of the router's clients; helios.jwts checks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from helios.config import JwtSettings
from helios.errors import UsageError
from helios.jwts import BadToken, KeysPending, TokenVerifier, claim_of
from helios.names import TENANT
from router import errors
from router.admission.rights import Principal, Tenants


class Verifier(TokenVerifier[Principal]):
    """Says whose token it is, and what that may use."""

    def __init__(self, settings: JwtSettings, tenants: Tenants, now: Callable[[], float]) -> None:
        """Raises UsageError for settings that would let tokens of others pass."""
        if not settings.issuer or not settings.audience:
            raise UsageError(
                "router.admission.jwt needs issuer and audience", hint="Else tokens for others would pass."
            )
        super().__init__(settings, self._principal, now)
        self._claims, self._tenants = settings, tenants

    def find(self, token: str) -> Principal:
        """Who has the token. Raises ApiError: 401, or 503 while keys are fetched that might be its."""
        try:
            return super().find(token)
        except KeysPending:
            raise errors.credentials_unknown_yet() from None
        except BadToken as error:
            raise errors.bad_credentials(str(error)) from None

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        tenant = claim_of(claims, self._claims.tenant_claim)
        if not isinstance(tenant, str) or not TENANT.match(tenant):
            raise BadToken(f"the token's claim {self._claims.tenant_claim!r} names no tenant")
        roles = claim_of(claims, self._claims.roles_claim)
        if isinstance(roles, str):
            roles = roles.split()
        listed = [role for role in roles if isinstance(role, str)] if isinstance(roles, list) else []
        return self._tenants.with_roles(tenant, listed)
