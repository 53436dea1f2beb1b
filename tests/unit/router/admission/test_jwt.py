"""JSON Web Tokens: those of the issuer are taken, whatever else is sent is not."""

from __future__ import annotations

import base64
import json
from functools import cache
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from helios import jwks
from helios.config import AdmissionSettings, JwtSettings, RoleSettings, RouterTenantSettings
from helios.errors import UsageError
from helios.jwts import ASK_AGAIN_S, KeySet
from router.admission.jwt import Verifier
from router.admission.rights import RANKS, Tenants
from router.errors import ApiError

NOW = 1_800_000_000
CLAIMS = {"iss": "https://issuer", "aud": "helios", "exp": NOW + 600, "tenant": "acme"}


@cache
def private(kind: str) -> Any:
    match kind:
        case "RS256":
            return rsa.generate_private_key(65537, 2048)
        case "weak":
            return rsa.generate_private_key(65537, 1024)
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def jwk(kind: str, kid: str, **more: Any) -> dict[str, Any]:
    algorithm = "RS256" if kind == "weak" else kind.partition("-")[0]
    public = private(kind).public_key()
    return {**jwt.get_algorithm_by_name(algorithm).to_jwk(public, as_dict=True), "kid": kid, **more}


def keys(*listed: dict[str, Any]) -> KeySet:
    return KeySet(json.dumps({"keys": listed}).encode())


ALL = ("RS256", "ES256", "EdDSA")


class Scene:
    def __init__(self, known: bool = True, **settings: Any) -> None:
        self.now = float(NOW)
        ours = AdmissionSettings(
            roles={
                "user": RoleSettings(models=["org/*"], routes=["/v1/chat/*"]),
                "batch": RoleSettings(models=["big"], priority="low"),
            },
            tenants={"acme": RouterTenantSettings(models=["org/*", "big"], weight=2)},
        )
        settings = {"jwks": "https://issuer/jwks", "issuer": "https://issuer", "audience": "helios", **settings}
        self.verifier = Verifier(JwtSettings(**settings), Tenants(ours), lambda: self.now)
        self.asked = 0
        self.verifier.on_wanted = self.ask
        if known:
            self.verifier.learn(keys(*(jwk(kind, kind) for kind in ALL)))

    def ask(self) -> None:
        self.asked += 1

    def refusal(self, token: str) -> ApiError:
        with pytest.raises(ApiError) as caught:
            self.verifier.find(token)
        return caught.value


def token(kind: str = "ES256", header: dict[str, Any] | None = None, **claims: Any) -> str:
    content = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not None}
    algorithm = "RS256" if kind == "weak" else kind.partition("-")[0]
    return jwt.encode(content, private(kind), algorithm, {"kid": kind, **(header or {})})


def raw(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.mark.parametrize("kind", ALL)
def test_a_token_of_the_issuer_is_taken(kind: str) -> None:
    scene = Scene()
    text = token(kind, roles=["user", "batch", "unknown"])
    who = scene.verifier.find(text)
    assert (who.tenant, who.weight, who.rank) == ("acme", 2, RANKS["normal"])
    assert who.may("org/a", "/v1/chat/completions")
    assert not who.may("org/a", "/v1/embeddings")
    assert who.may("big", "/v1/embeddings")
    assert scene.verifier.find(text) is who


def test_roles_are_rights_and_without_any_nothing_may_be_used() -> None:
    scene = Scene(roles_claim="realm_access.roles")
    assert not scene.verifier.find(token()).may_use("/v1/chat/completions")
    assert scene.verifier.find(token(realm_access={"roles": "batch other"})).rank == RANKS["low"]
    assert not scene.verifier.find(token(realm_access={"roles": [1, None]})).may("big", "/x")


FORGED = {
    "alg none": lambda: raw({"alg": "none", "kid": "RS256"}, CLAIMS),
    "alg None": lambda: raw({"alg": "None"}, CLAIMS),
    "no alg": lambda: raw({"kid": "RS256"}, CLAIMS, b"x"),
    "signature cut": lambda: token().rpartition(".")[0] + ".",
    "signature of another": lambda: ".".join([*token().split(".")[:2], token(exp=NOW + 5).split(".")[2]]),
    "claims changed": lambda: ".".join([token().split(".")[0], raw({}, {**CLAIMS, "tenant": "evil"}).split(".")[1],
                                        token().split(".")[2]]),
    "another key of the same kind": lambda: token("EdDSA-other", {"kid": "EdDSA"}),
    "another key's id": lambda: token("ES256", {"kid": "RS256"}),
    "crit": lambda: token(header={"crit": ["exp"]}),
    "kid no text": lambda: raw({"alg": "ES256", "kid": 5}, CLAIMS, b"x"),
    "kid a path": lambda: token(header={"kid": "../../dev/null"}),
    "no kid among several": lambda: raw({"alg": "ES256"}, CLAIMS, b"x"),
    "key of its own": lambda: token("EdDSA-other", {"kid": "EdDSA", "jwk": jwk("EdDSA-other", "EdDSA")}),
    "expired": lambda: token(exp=NOW - 30),
    "not valid yet": lambda: token(nbf=NOW + 31),
    "no expiry": lambda: token(exp=None),
    "expiry a text": lambda: token(exp=str(NOW + 5)),
    "expiry too far to be a time": lambda: token(exp=1e300),
    "another issuer": lambda: token(iss="https://issuer/"),
    "no issuer": lambda: token(iss=None),
    "another audience": lambda: token(aud=["other", "Helios"]),
    "no audience": lambda: token(aud=None),
    "no tenant": lambda: token(tenant=None),
    "tenant no name": lambda: token(tenant="../x"),
    "tenant a list": lambda: token(tenant=["acme"]),
    "too long": lambda: token(more="x" * 9000),
    "nonsense": lambda: "a.b.c",
    "empty": lambda: "..",
    "surrogates": lambda: "\udce4.\udce4.\udce4",
}  # fmt: skip


@pytest.mark.parametrize("how", FORGED)
def test_what_is_not_the_issuer_s_is_refused(how: str) -> None:
    scene = Scene()
    error = scene.refusal(FORGED[how]())
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.challenge == 'Bearer error="invalid_token"'
    assert not scene.asked


@pytest.mark.parametrize("kind", ALL)
def test_a_public_key_is_no_secret(kind: str) -> None:
    """Algorithm confusion (CVE-2015-9235): HMAC with the public key, in whatever form it is published."""
    import hashlib
    import hmac

    public = private(kind).public_key()
    forms = [
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        json.dumps(jwk(kind, kind)).encode(),
    ]
    for form in forms:
        signed = raw({"alg": "HS256", "kid": kind}, CLAIMS).rpartition(".")[0]
        signature = hmac.new(form, signed.encode(), hashlib.sha256).digest()
        forged = f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
        assert Scene().refusal(forged).status == 401


def test_times_are_looked_at_with_leeway_each_time() -> None:
    scene = Scene(leeway_s=60.0)
    text = token(exp=NOW + 10, nbf=NOW + 50)
    assert scene.verifier.find(text).tenant == "acme"
    scene.now += 69
    assert scene.verifier.find(text).tenant == "acme"
    scene.now += 1
    assert "expired" in scene.refusal(text).message


def test_a_token_of_a_new_key_waits_for_the_keys() -> None:
    scene = Scene()
    new = token("EdDSA-new")
    assert scene.refusal(new).status == 401  # they were asked for a moment ago
    scene.now += ASK_AGAIN_S
    error = scene.refusal(new)
    assert (error.status, error.code, error.retry_after_s, scene.asked) == (503, "issuer_keys_pending", 1, 1)
    scene.verifier.learn(keys(jwk("EdDSA-new", "EdDSA-new")))
    assert scene.verifier.find(new).tenant == "acme"


def test_a_token_whose_key_is_gone_is_not_remembered() -> None:
    scene = Scene()
    old = token("ES256")
    scene.verifier.find(old)
    scene.verifier.learn(keys(jwk("RS256", "RS256")))
    assert scene.refusal(old).status == 401


def test_before_the_keys_are_here() -> None:
    assert Scene(known=False).refusal(token()).status == 503


def test_the_only_key_needs_no_name() -> None:
    scene = Scene()
    scene.verifier.learn(keys(jwk("ES256", "x")))
    assert scene.verifier.find(jwt.encode(CLAIMS, private("ES256"), "ES256")).tenant == "acme"


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b'{"keys":[]}', b'{"keys":[{"kty":"oct","k":"AAAA","kid":"a"}]}',
     b'{"keys":[{"kty":"RSA","kid":"a"}]}',
     json.dumps({"keys": [jwk("ES256", "a", use="enc")]}).encode(),
     json.dumps({"keys": [jwk("ES256", "a", alg="HS256")]}).encode(),
     json.dumps({"keys": [jwk("weak", "a")]}).encode(),
     json.dumps({"keys": [jwk("ES256", "a", d=jwk("ES256", "a")["x"])]}).encode()],
)  # fmt: skip
def test_documents_without_a_key_that_can_be_used(document: bytes) -> None:
    with pytest.raises(ValueError, match=r"JWKS|no key"):
        KeySet(document)


@pytest.mark.parametrize("url", ["http://issuer/jwks", "ftp://issuer/jwks", "https://"])
def test_keys_are_not_fetched_where_others_could_send_theirs(url: str) -> None:
    with pytest.raises(UsageError, match="jwks"):
        jwks.check(JwtSettings(jwks=url), "router.admission.jwt")


def test_issuer_and_audience_are_needed() -> None:
    with pytest.raises(UsageError, match="issuer and audience"):
        Scene(audience="")
