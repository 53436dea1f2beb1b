"""Whose pod it is, proved by its service account's token: a JSON Web Token that its Kubernetes cluster has signed.

The kubelet gets one for each pod, for an audience of our own, so it is good for nothing else, and binds it to the pod
(KEP-1205; claims ``kubernetes.io``). Which clusters' tokens are taken, and where their keys are, says
``registry.clusters``. A node that shows such a token can't claim another namespace than the pod's.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from helios.config import ClusterSettings
from helios.decoding import from_json
from helios.errors import Unauthorized, Unavailable, UsageError
from registry.access import NAME

if TYPE_CHECKING:
    from helios.jwks import Jwks
    from helios.jwts import TokenVerifier

LOOKED_S: Final = 6.0
"""Longest wait for a cluster's keys, in seconds: a little more than one fetch may take."""

_SUBJECT: Final = re.compile(r"system:serviceaccount:([^:]+):([^:]+)\Z")


@dataclass(frozen=True, slots=True)
class Pod:
    """Whose token it is. ``uid`` is the pod's, empty where the token is bound to none."""

    namespace: str
    service_account: str
    uid: str


class PodTokens:
    """The tokens of the configured clusters. Used on one event loop; ``run`` keeps their keys fresh."""

    def __init__(self, clusters: Mapping[str, ClusterSettings], now: Callable[[], float] = time.time) -> None:
        """Raises UsageError for settings that would let tokens of others pass, and for a file that can't be read."""
        self._verifiers: dict[str, tuple[TokenVerifier[Pod], Jwks]] = {}
        for name, settings in clusters.items():
            where = f"registry.clusters.{name}"
            if not settings.jwks or not settings.issuer or not settings.audience:
                raise UsageError(
                    f"{where} needs jwks, issuer and audience",
                    hint="`kubectl get --raw /.well-known/openid-configuration` says issuer and jwks_uri.",
                )
            if settings.issuer in self._verifiers:
                raise UsageError(f"{where}: another cluster has the issuer {settings.issuer}, too")
            self._verifiers[settings.issuer] = _verifier(settings, where, now)

    async def find(self, token: str) -> Pod:
        """Raises Unauthorized, saying why, for a token that is not taken; Unavailable while nobody can tell."""
        from helios.jwts import BadToken, KeysPending

        verifier, jwks = self._of_issuer(token)
        try:
            try:
                return verifier.find(token)
            except KeysPending:
                await jwks.looked(LOOKED_S)
            return verifier.find(token)
        except BadToken as error:
            if not verifier.knows_keys:
                raise Unavailable(
                    "the cluster's keys can't be fetched, so no pod's token can be checked",
                    hint="Look whether the registry reaches registry.clusters.*.jwks; its log says why not.",
                ) from None
            raise Unauthorized(f"the pod's token is not accepted: {error}") from None

    async def run(self) -> None:
        """Keep the clusters' keys fresh until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _, jwks in self._verifiers.values():
                tasks.create_task(jwks.run())

    def _of_issuer(self, token: str) -> tuple[TokenVerifier[Pod], Jwks]:
        """Who has to check it, by what it says of itself: that decides whose keys it is held against, and no more."""
        if not self._verifiers:
            raise Unauthorized(
                "this registry takes no pods' tokens",
                hint="Name the cluster in registry.clusters of the registry, or set csi.authorise to namespace.",
            )
        found = self._verifiers.get(_issuer(token))
        if found is None:
            raise Unauthorized(
                "the pod's token is not accepted: it is of no cluster that this registry knows",
                hint="Compare registry.clusters.*.issuer with the cluster's own.",
            )
        return found


def _verifier(settings: ClusterSettings, where: str, now: Callable[[], float]) -> tuple[TokenVerifier[Pod], Jwks]:
    from helios import jwks
    from helios.jwts import TokenVerifier

    jwks.check(settings, where)
    verifier = TokenVerifier(settings, pod_of, now)
    return verifier, jwks.Jwks(settings, verifier)


def pod_of(claims: Mapping[str, Any]) -> Pod:
    """What a cluster's token says of its pod. Raises BadToken for one that is no service account's."""
    from helios.jwts import BadToken

    subject = claims.get("sub")
    match = _SUBJECT.match(subject) if isinstance(subject, str) else None
    ours = claims.get("kubernetes.io")
    if match is None or not isinstance(ours, dict):
        raise BadToken("it is no service account's")
    account, pod = ours.get("serviceaccount"), ours.get("pod", {})
    if not isinstance(account, dict) or not isinstance(pod, dict):
        raise BadToken("its claims about the pod are malformed")
    if (ours.get("namespace"), account.get("name")) != match.groups() or not NAME.match(match[1]):
        raise BadToken("its claims about the namespace contradict each other")
    uid = pod.get("uid", "")
    if not isinstance(uid, str):
        raise BadToken("its claims about the pod are malformed")
    return Pod(match[1], match[2], uid)


class _Issuer(msgspec.Struct, frozen=True):
    iss: str = ""


def _issuer(token: str) -> str:
    """Who a token says has made it; nobody for what is no token."""
    import base64
    import binascii

    from helios.jwts import MAX_TOKEN

    parts = token.split(".") if len(token) <= MAX_TOKEN else []
    if len(parts) != 3:
        return ""
    try:
        return from_json(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)), _Issuer).iss
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return ""
