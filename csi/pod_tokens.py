"""The pod's service-account token, as Kubernetes hands it to a driver (CSIDriver ``tokenRequests``). No I/O.

It comes as JSON, ``{"<audience>": {"token": …, "expirationTimestamp": …}}``, in the publish context, or, where the
CSIDriver has ``serviceAccountTokenInSecrets`` (Kubernetes 1.35), among the request's secrets. Nothing here, nor what
uses it, puts a token into a message or a log.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

import msgspec

from csi.errors import Precondition
from helios.decoding import from_json
from helios.errors import InvalidInput

KEY: Final = "csi.storage.k8s.io/serviceAccount.tokens"
MAX_TOKEN: Final = 8192
"""Longest token, in characters: longer ones the registry does not take."""


class _Issued(msgspec.Struct, frozen=True):
    token: str


class PodToken:
    """A token that shows itself to nobody who does not ask for it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.digest = blake2b(text.encode(), digest_size=16).hexdigest()
        """The same for the same token."""

    def reveal(self) -> str:
        """The token itself."""
        return self._text

    def __repr__(self) -> str:
        return "PodToken(…)"


def token_for(audience: str, context: Mapping[str, str], secrets: Mapping[str, str]) -> PodToken:
    """The pod's token for our audience; secrets count before the context, into which a pod's own attributes go.

    Raises Precondition where Kubernetes sends none, InvalidInput for what is none.
    """
    text = secrets.get(KEY) or context.get(KEY, "")
    wanted = f'tokenRequests: [{{audience: "{audience}"}}]'
    if not text:
        raise Precondition(
            f'csi.authorise is "token", and the request has no token of the pod ({KEY})',
            hint=f"Set {wanted} in the CSIDriver object.",
        )
    try:
        tokens = from_json(text.encode("utf-8", "surrogatepass"), dict[str, _Issued])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidInput(f"{KEY} is not as Kubernetes writes it: JSON with a token for each audience") from None
    found = tokens.get(audience)
    if found is None:
        raise Precondition(
            f"the request has tokens of the pod, and none for the audience {audience!r}",
            hint=f"Set {wanted} in the CSIDriver object, or csi.audience to the one that is there.",
        )
    if not found.token.isascii() or not 0 < len(found.token) <= MAX_TOKEN:
        raise InvalidInput(f"the pod's token is none: at most {MAX_TOKEN} ASCII characters are")
    return PodToken(found.token)
