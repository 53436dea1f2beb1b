"""A Sigstore of our own: an authority that certifies identities, a log of its certificates, and a log of signatures.

All keys are made here and nothing is asked over a network. What it makes has the form of the public instance's:
certificates as Fulcio issues them (github.com/sigstore/fulcio, docs/certificate-specification.md) with an embedded
timestamp of a certificate log (RFC 6962), and entries as Rekor's first version keeps them (kind ``dsse``), with a proof
of inclusion, a signed checkpoint (transparency.dev's notes) and a signed promise that says when.
"""

from __future__ import annotations

import hashlib
import json
import struct
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ISSUER_V1: Final = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
SCT_LIST: Final = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
LOG: Final = "rekor.test - 1"
VALID: Final = timedelta(minutes=10)
"""How long a certificate is valid."""
OTHER_LEAF: Final = hashlib.sha256(b"\x00an earlier entry").digest()

Json = dict[str, Any]


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Sigstore:
    """Everything an instance has keys for."""

    authority: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    certificates: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    """Signs what the log of certificates says."""
    entries: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    """Signs what the log of signatures says."""
    since: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0) - timedelta(days=30))

    def __post_init__(self) -> None:
        public = self.authority.public_key()
        self.root = (
            x509.CertificateBuilder(_name("root"), _name("root"), public, x509.random_serial_number())
            .not_valid_before(self.since)
            .not_valid_after(self.since + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.authority, hashes.SHA256())
        )

    def trust(self) -> str:
        """A client's trust configuration, as a file has it."""
        valid = {"start": self.since.isoformat().replace("+00:00", "Z")}

        def log(key: ec.EllipticCurvePrivateKey, url: str) -> Json:
            public = {"rawBytes": _b64(_spki(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": valid}
            return {
                "baseUrl": url, "hashAlgorithm": "SHA2_256", "publicKey": public, "logId": {"keyId": _b64(_id(key))}
            }  # fmt: skip

        chain = {"certificates": [{"rawBytes": _b64(_der(self.root))}]}
        authority = {
            "subject": {"organization": "test", "commonName": "root"}, "uri": "https://fulcio.test",
            "certChain": chain, "validFor": valid,
        }  # fmt: skip
        return json.dumps({
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self.entries, "https://rekor.test")],
                "certificateAuthorities": [authority],
                "ctlogs": [log(self.certificates, "https://ct.test")],
            },
            "signingConfig": {"mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json"},
        })  # fmt: skip

    def sign(
        self,
        statement: bytes,
        identity: str,
        issuer: str,
        *,
        at: datetime | None = None,
        logged: datetime | None = None,
    ) -> Json:
        """The bundle of somebody whom ``issuer`` knew at ``at`` as ``identity``; the log took it at ``logged``."""
        at = at or datetime.now(UTC)
        key = _key()
        certificate = self._certify(key, identity, issuer, at)
        body = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(statement)} ".encode() + statement
        signature = _sign(key, body)
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": _b64(_der(certificate))},
                "tlogEntries": [self._entry(certificate, statement, signature, logged or at)],
            },
            "dsseEnvelope": {
                "payload": _b64(statement),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": _b64(signature)}],
            },
        }

    def _certify(self, key: ec.EllipticCurvePrivateKey, identity: str, issuer: str, at: datetime) -> x509.Certificate:
        public, at = key.public_key(), at.replace(microsecond=0)
        names: list[x509.GeneralName] = [
            x509.RFC822Name(identity) if "://" not in identity else x509.UniformResourceIdentifier(identity)
        ]
        of_authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.public_key())
        built = (
            x509.CertificateBuilder(self.root.subject, x509.Name([]), public, x509.random_serial_number())
            .not_valid_before(at)
            .not_valid_after(at + VALID)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(of_authority, critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.UnrecognizedExtension(ISSUER_V1, issuer.encode()), critical=False)
        )
        logged = self._timestamp(built.sign(self.authority, hashes.SHA256()).tbs_certificate_bytes, at)
        return built.add_extension(x509.UnrecognizedExtension(SCT_LIST, logged), critical=False).sign(
            self.authority, hashes.SHA256()
        )

    def _timestamp(self, certificate: bytes, at: datetime) -> bytes:
        """The list of one timestamp that goes into a certificate, made of that without it (RFC 6962, 3.2 and 3.3)."""
        when = int(at.timestamp() * 1000)
        of_issuer = hashlib.sha256(_spki(self.authority)).digest()
        signed = struct.pack("!BBQH", 0, 0, when, 1) + of_issuer + len(certificate).to_bytes(3) + certificate
        signature = _sign(self.certificates, signed + b"\0\0")
        timestamp = struct.pack("!B32sQHBBH", 0, _id(self.certificates), when, 0, 4, 3, len(signature)) + signature
        listed = struct.pack("!HH", len(timestamp) + 2, len(timestamp)) + timestamp
        assert len(listed) < 128
        return bytes([0x04, len(listed)]) + listed  # as an OCTET STRING

    def _entry(self, certificate: x509.Certificate, statement: bytes, signature: bytes, at: datetime) -> Json:
        signer = _b64(certificate.public_bytes(serialization.Encoding.PEM))
        spec = {
            "envelopeHash": {"algorithm": "sha256", "value": "0" * 64},  # of JSON that nobody can make again
            "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(statement).hexdigest()},
            "signatures": [{"signature": _b64(signature), "verifier": signer}],
        }
        body = _canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        when, log_id = int(at.timestamp()), _id(self.entries)
        promised = {"body": _b64(body), "integratedTime": when, "logID": log_id.hex(), "logIndex": 1}
        leaf = hashlib.sha256(b"\x00" + body).digest()
        top = hashlib.sha256(b"\x01" + OTHER_LEAF + leaf).digest()
        note = f"{LOG}\n2\n{_b64(top)}\n"
        mark = _b64(log_id[:4] + _sign(self.entries, note.encode()))
        return {
            "logIndex": "1",
            "logId": {"keyId": _b64(log_id)},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(when),
            "inclusionPromise": {"signedEntryTimestamp": _b64(_sign(self.entries, _canonical(promised)))},
            "inclusionProof": {
                "logIndex": "1",
                "rootHash": _b64(top),
                "treeSize": "2",
                "hashes": [_b64(OTHER_LEAF)],
                "checkpoint": {"envelope": f"{note}\n\u2014 {LOG.split()[0]} {mark}\n"},
            },
            "canonicalizedBody": _b64(body),
        }


def statement_of(signature: bytes) -> bytes:
    """What was signed, of any bundle around a statement."""
    return b64decode(json.loads(signature)["dsseEnvelope"]["payload"])


def changed(bundle: Json, change: Callable[[Json], object]) -> Json:
    """A copy of the bundle after ``change``."""
    copy: Json = json.loads(json.dumps(bundle))
    change(copy)
    return copy


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs, key_cert_sign=not signs, crl_sign=not signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def _spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(encoding, form)


def _id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_spki(key)).digest()


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _canonical(document: Json) -> bytes:
    """RFC 8785, for documents of plain ASCII and whole numbers."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _b64(data: bytes) -> str:
    return b64encode(data).decode()
