"""OpenSSF model signatures, checked against a manifest: no weights are read for it.

A signature (``model.sig``) is a Sigstore bundle around an in-toto statement that lists every file with its sha256
(github.com/ossf/model-signing-spec). The library checks who signed; the list is compared here with the manifest, whose
sha256 are those of verified bytes. Only signatures over whole files by sha256 can be compared, which is what the
signers make unless told otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from helios.config import AdmissionRule
from helios.errors import BadSignature, UsageError

SIGNATURE: Final = "model.sig"
MAX_SIGNATURE: Final = 32 << 20
"""Longest signature in bytes: some 100,000 files."""


def verify(where: str, signature: bytes, files: Mapping[str, str], rule: AdmissionRule) -> str:
    """Check a signature over ``files`` (path -> sha256); returns who signed, for people.

    ``where`` names the snapshot in errors. Raises BadSignature for one that is by nobody the rule trusts, or that lists
    other files than there are; UsageError when the rule's keys can't be read.
    """
    reasons = []
    for name, verifier, reader in _verifiers(rule):
        try:
            with tempfile.NamedTemporaryFile(suffix=".sig") as file:
                file.write(signature)
                file.flush()
                signed = verifier.verify(reader.read(Path(file.name)))
        except Exception as error:  # the library raises whatever its parsers and OpenSSL do: all of it means "no"
            reasons.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        _compare(where, signed, files)
        return name
    why = "; ".join(reasons) or "the rule for this repository names no key, certificate or identity"
    raise BadSignature(
        f"{where}: its signature is by nobody who is trusted: {why}",
        hint="Have it signed by somebody whom registry.admission names (keys, certificates, identity), or add who did.",
    )


def _verifiers(rule: AdmissionRule) -> Iterable[tuple[str, Any, Any]]:
    """(who, verifier, reader of signatures) for everybody whom the rule trusts."""
    try:
        from model_signing._signing import sign_certificate, sign_ec_key, sign_sigstore, sign_sigstore_pb
    except ImportError as error:
        raise UsageError(
            f"model signatures can't be checked: {error}", hint="Install it with: pip install 'helios-llm[signing]'"
        ) from None
    try:
        found: list[tuple[str, Any, Any]] = [
            (f"key {key}", sign_ec_key.Verifier(Path(key)), sign_sigstore_pb.Signature) for key in rule.keys
        ]
        if rule.certificates:
            chain = [Path(path) for path in rule.certificates]
            verifier = sign_certificate.Verifier(chain)
            found.append((f"a certificate under {', '.join(rule.certificates)}", verifier, sign_sigstore_pb.Signature))
        if rule.identity:
            trust = Path(rule.trust_config) if rule.trust_config else None
            keyless = sign_sigstore.Verifier(identity=rule.identity, oidc_issuer=rule.issuer, trust_config=trust)
            found.append((f"identity {rule.identity}", keyless, sign_sigstore.Signature))
    except Exception as error:
        raise UsageError(f"registry.admission for {rule.repo!r} names trust that can't be used: {error}") from error
    return found


def _compare(where: str, signed: Any, files: Mapping[str, str]) -> None:
    """Raise BadSignature unless the signed list is the manifest's."""
    listed: dict[str, str] = {}
    for item in signed.resource_descriptors():
        if item.digest.algorithm != "sha256":
            raise BadSignature(
                f"{where}: its signature names {item.identifier} by {item.digest.algorithm}, not by the file's sha256",
                hint="Sign with sha256 over whole files, which is the default of model_signing.",
            )
        listed[item.identifier] = item.digest.digest_hex
    present = {path: sha256 for path, sha256 in files.items() if not _ignored(path)}
    listed = {path: sha256 for path, sha256 in listed.items() if not _ignored(path)}
    for path in sorted(listed.keys() | present.keys()):
        if listed.get(path) != present.get(path):
            problem = "is not signed" if path not in listed else "is missing" if path not in present else "has changed"
            raise BadSignature(
                f"{where}: {path} {problem}: the signature is of other files than these",
                hint="Publish the directory as it was signed, or sign it again.",
            )


def _ignored(path: str) -> bool:
    """Whether the signers leave the file out: the signature, and what git keeps for itself (``.gitattributes``)."""
    return path == SIGNATURE or path.startswith(".git")
