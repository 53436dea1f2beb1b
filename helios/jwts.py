"""JSON Web Tokens (RFC 7519) as credentials: signed by an issuer whose public keys (JWKS, RFC 7517) are known.

What the token says of itself decides nothing (RFC 8725): the algorithm follows from the issuer's key, so ``none`` and
a public key used as an HMAC secret are refused, as are keys for encryption, ``crit`` extensions, and headers that
would bring or fetch a key. Signature, issuer, audience and times are checked by PyJWT over OpenSSL, and a token that
was good is remembered until it expires or the keys change, so the next request costs a lookup.

A token whose key is unknown may be newer than our keys: they are asked for again, at most every ``ASK_AGAIN_S``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

from helios.config import IssuerSettings
from helios.decoding import from_json

if TYPE_CHECKING:
    from jwt import PyJWK

T = TypeVar("T")

ASK_AGAIN_S: Final = 10.0
"""Shortest time between two fetches for tokens with unknown keys, in seconds: strangers must not drive them."""
MAX_TOKEN: Final = 8192
"""Longest token, in characters."""
REMEMBERED: Final = 4096
"""Tokens that are remembered."""
MIN_RSA_BITS: Final = 2048
_KINDS: Final = {("RSA", ""): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}


class BadToken(Exception):
    """A token that is not taken, and why; the text has nothing of the token in it."""


class KeysPending(BadToken):
    """A token whose key the issuer may have published since it was last asked, which is happening now."""


class _Document(msgspec.Struct):
    keys: list[dict[str, Any]]


class KeySet:
    """An issuer's keys, by id; keys of kinds that are not used here are left out."""

    def __init__(self, document: bytes) -> None:
        """Raises ValueError for what is no JWKS, or one without a key that can be used."""
        from jwt import PyJWK
        from jwt.exceptions import PyJWTError

        try:
            listed = from_json(document, _Document).keys
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"it is no JWKS: {error}") from None
        self._keys: dict[str, PyJWK] = {}
        for one in listed:
            kind = str(one.get("kty")), "" if one.get("kty") == "RSA" else str(one.get("crv"))
            algorithm = _KINDS.get(kind)
            if algorithm is None or one.get("use", "sig") != "sig" or one.get("alg", algorithm) != algorithm:
                continue
            try:
                key = PyJWK(one, algorithm)
            except (PyJWTError, ValueError, TypeError, KeyError):
                continue
            strong = kind[0] != "RSA" or key.key.key_size >= MIN_RSA_BITS
            if strong and hasattr(key.key, "verify"):  # else it is a private key, which nobody should publish
                self._keys[str(one.get("kid", ""))] = key
        if not self._keys:
            raise ValueError("it has no key for RS256, ES256 or EdDSA")

    def find(self, kid: str | None) -> PyJWK | None:
        """The key that a token names; one that names none means the only key."""
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid or "")


class TokenVerifier(Generic[T]):
    """Says whose token it is. Keys come from ``learn``; ``now`` gives unix seconds.

    ``on_wanted`` is called when a token's key is unknown and may be worth a fetch; None: nothing can be fetched.
    """

    def __init__(
        self, settings: IssuerSettings, holder: Callable[[Mapping[str, Any]], T], now: Callable[[], float]
    ) -> None:
        """``holder`` makes of a good token's claims whose it is, or raises BadToken."""
        self._settings, self._holder, self._now = settings, holder, now
        self._keys: KeySet | None = None
        self._good: dict[bytes, tuple[float, T]] = {}
        self._learned_at = -ASK_AGAIN_S
        self.on_wanted: Callable[[], None] | None = None

    @property
    def knows_keys(self) -> bool:
        """Whether the issuer's keys have ever been here."""
        return self._keys is not None

    def learn(self, keys: KeySet) -> None:
        """These are the issuer's keys now."""
        self._keys, self._learned_at = keys, self._now()
        self._good.clear()

    def find(self, token: str) -> T:
        """Who has the token. Raises BadToken; KeysPending while keys are fetched that might be its."""
        if len(token) > MAX_TOKEN:
            raise BadToken("the token is too long")
        digest = blake2b(token.encode("utf-8", "surrogatepass"), digest_size=32).digest()
        known = self._good.get(digest)
        if known is not None and self._now() < known[0]:
            return known[1]
        expires, holder = self._verify(token)
        if len(self._good) >= REMEMBERED:
            self._good.clear()
        self._good[digest] = expires, holder
        return holder

    def _verify(self, token: str) -> tuple[float, T]:
        import jwt

        settings = self._settings
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError):
            raise BadToken("it is neither a known key nor a token") from None
        key = self._key(header)
        options: Any = {"require": ["exp", "iss", "aud"], "verify_exp": False, "verify_nbf": False, "verify_iat": False}
        try:
            claims = jwt.decode(
                token, key, algorithms=[key.algorithm_name], issuer=settings.issuer, audience=settings.audience,
                options=options,
            )  # fmt: skip
        except jwt.InvalidIssuerError:
            raise BadToken("the token is of another issuer") from None
        except jwt.InvalidAudienceError:
            raise BadToken("the token is for another audience") from None
        except jwt.MissingRequiredClaimError as error:
            raise BadToken(f"the token has no {error.claim}") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise BadToken("the token's signature or form is wrong") from None
        return self._times(claims), self._holder(claims)

    def _key(self, header: Mapping[str, Any]) -> PyJWK:
        kid, algorithm = header.get("kid"), header.get("alg")
        if algorithm not in _KINDS.values() or "crit" in header or not isinstance(kid, str | None):
            raise BadToken("the token is signed in a way that is not accepted")
        key = None if self._keys is None else self._keys.find(kid)
        if key is None:
            old = self._keys is None or self._now() - self._learned_at >= ASK_AGAIN_S
            if old and self.on_wanted is not None:
                self.on_wanted()
                raise KeysPending("the issuer's keys are being fetched; try again")
            raise BadToken("the token's key is not one of the issuer's")
        if key.algorithm_name != algorithm:
            raise BadToken("the token is not signed as its key says")
        return key

    def _times(self, claims: Mapping[str, Any]) -> float:
        """Until when the token is good, by our clock and the leeway; PyJWT has no clock that could be given."""
        now, leeway = self._now(), self._settings.leeway_s
        expires, begins = claims["exp"], claims.get("nbf", 0)
        if not _number(expires) or not _number(begins):
            raise BadToken("the token's times are no numbers")
        if now >= expires + leeway:
            raise BadToken("the token has expired")
        if begins > now + leeway:
            raise BadToken("the token is not valid yet")
        return float(expires) + leeway


def claim_of(claims: Mapping[str, Any], name: str) -> Any:
    """A claim by its name, or by the path to it."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12
