"""Whom the external-metrics API believes: the API server's aggregator, by its client certificate and what it says in
headers of the user for whom it asks (Kubernetes, "Configure the Aggregation Layer").

The API server has checked that user's rights before it passes a request on; so there is nothing to be looked up here.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from helios.errors import Forbidden, Unauthorized, UsageError
from helios.http.protocol import CERTIFICATE
from helios.http.tls import why

NAMESPACE: Final = "kube-system"
CONFIG_MAP: Final = "extension-apiserver-authentication"
CA: Final = "requestheader-client-ca-file"
NAMES: Final = "requestheader-allowed-names"
USERS: Final = "requestheader-username-headers"


class FrontProxy(msgspec.Struct, frozen=True):
    """``ca``: PEM of its authorities; ``names``: common names of its certificate, none: any; ``users``: headers that
    name the user, in lower case."""

    ca: str
    names: tuple[str, ...] = ()
    users: tuple[str, ...] = ("x-remote-user",)

    def trusted(self, context: ssl.SSLContext) -> None:
        """Have a server ask for its certificate. Raises UsageError where the authorities are no PEM."""
        try:
            context.load_verify_locations(cadata=self.ca)
        except (ValueError, ssl.SSLError) as error:
            reason = why(error) if isinstance(error, ssl.SSLError) else str(error)
            raise UsageError(f"the front proxy's authorities can't be used: {reason}") from None
        context.verify_mode = ssl.CERT_OPTIONAL

    def demand(self, scope: Mapping[str, Any]) -> str:
        """The user for whom the front proxy asks. Raises Unauthorized, Forbidden."""
        certificate = scope.get("extensions", {}).get(CERTIFICATE)
        if certificate is None:
            raise Unauthorized("only the API server's front proxy may ask here, with its client certificate")
        name = next(
            (value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"), ""
        )
        if self.names and name not in self.names:
            raise Forbidden(f"the certificate of {name[:80]!r} is not the front proxy's")
        for header in self.users:
            user = next((value for key, value in scope["headers"] if key == header.encode("latin-1")), b"")
            if user:
                return user.decode("latin-1")
        raise Unauthorized("the front proxy has not said who asks")


def of_config_map(data: Mapping[str, str]) -> FrontProxy:
    """As the cluster says. Raises UsageError for what can't be used."""
    if not data.get(CA, "").strip():
        raise UsageError(
            f"{NAMESPACE}/{CONFIG_MAP} has no {CA}: the cluster's API server has no front proxy",
            hint="Start it with --requestheader-client-ca-file.",
        )
    names, users = _listed(data, NAMES), _listed(data, USERS)
    return FrontProxy(data[CA], names, tuple(one.lower() for one in users) or ("x-remote-user",))


def _listed(data: Mapping[str, str], key: str) -> tuple[str, ...]:
    text = data.get(key, "") or "[]"
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UsageError(f"{NAMESPACE}/{CONFIG_MAP}: {key} is {text[:80]!r}, and no list of strings")
    return tuple(found)
