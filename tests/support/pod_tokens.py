"""A Kubernetes cluster's service-account issuer for tests: it has real keys, signs tokens as the API server does, and
shows its public keys over HTTP on the loopback or in a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.support.loopback import Asked, Loopback, Said

ISSUER = "https://kubernetes.default.svc.cluster.local"


class Issuer:
    """``sign`` gives tokens; ``serving`` its keys at ``url``. ``away``: it answers 503."""

    def __init__(self, algorithm: str = "RS256", issuer: str = ISSUER) -> None:
        self.issuer, self.algorithm = issuer, algorithm
        self.keys: dict[str, Any] = {}
        self.away, self.asked, self.url, self.seen = False, 0, "", [""]
        self.rotate("first")

    def rotate(self, kid: str) -> None:
        """Sign with a new key from now on; the old one is gone."""
        key = (
            rsa.generate_private_key(65537, 2048)
            if self.algorithm == "RS256"
            else ec.generate_private_key(ec.SECP256R1())
        )
        self.keys = {kid: key}

    def document(self) -> bytes:
        kind = jwt.get_algorithm_by_name(self.algorithm)
        listed = [
            {**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig", "alg": self.algorithm}
            for kid, key in self.keys.items()
        ]
        return json.dumps({"keys": listed}).encode()

    def write(self, path: Path) -> Path:
        path.write_bytes(self.document())
        return path

    def claims(self, namespace: str = "acme", **more: Any) -> dict[str, Any]:
        """What a token has that is bound to a pod (KEP-1205); ``None`` leaves a claim out."""
        now = int(time.time())
        ours = {
            "namespace": namespace,
            "node": {"name": "node-1", "uid": "n-uid"},
            "pod": {"name": "reader", "uid": "pod-uid"},
            "serviceaccount": {"name": "default", "uid": "sa-uid"},
        }
        claims = {
            "iss": self.issuer,
            "aud": ["helios"],
            "sub": f"system:serviceaccount:{namespace}:default",
            "iat": now,
            "nbf": now,
            "exp": now + 3600,
            "jti": "4a0b",
            "kubernetes.io": ours,
        }
        return {name: value for name, value in {**claims, **more}.items() if value is not None}

    def sign(self, namespace: str = "acme", **more: Any) -> str:
        ((kid, key),) = self.keys.items()
        return jwt.encode(self.claims(namespace, **more), key, self.algorithm, {"kid": kid})

    def __enter__(self) -> Issuer:
        self._server = Loopback(self._answer).__enter__()
        self.url = f"{self._server.url}/openid/v1/jwks"
        return self

    def __exit__(self, *how: object) -> None:
        self._server.__exit__(*how)

    def _answer(self, asked: Asked) -> Said:
        self.asked += 1
        self.seen.append(asked.headers.get("Authorization", ""))
        if self.away:
            return Said(status=503)
        return Said(self.document(), kind="application/jwk-set+json")


def published(token: str, audience: str = "helios") -> str:
    """A token as the kubelet hands it to a driver."""
    return json.dumps({audience: {"token": token, "expirationTimestamp": "2030-01-01T00:00:00Z"}})
