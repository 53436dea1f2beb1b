"""Keyless signatures: who signed is what an authority vouches for and a log has seen, all of it checked offline."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import signing

from helios.config import AdmissionRule
from helios.errors import BadSignature, UsageError
from helios.names import RepoId
from registry.admission.admission import Admission
from tests.support.sigstore import Json, Sigstore, changed, statement_of
from tests.unit.registry.conftest import Registry

REPO: Final = RepoId.parse("org/m")
FILES: Final = {"config.json": b"{}", "sub/model.gguf": b"weights"}
RELEASE: Final = "https://github.com/org/m/.github/workflows/release.yml@refs/tags/v1"
GITHUB: Final = "https://token.actions.githubusercontent.com"
ADA, ACCOUNTS = "ada@example.org", "https://accounts.example.org"


@pytest.fixture
def registry(tmp_path: Path, engine_url: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry, and no network."""

    def no_network(*args: object) -> None:
        raise AssertionError("nothing is to be asked over a network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    parts = Registry.open(tmp_path, engine_url)
    yield parts
    parts.close()


@pytest.fixture(scope="module")
def sigstore() -> Sigstore:
    return Sigstore()


@pytest.fixture(scope="module")
def statement(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The statement over ``FILES`` as model_signing makes it."""
    root = tmp_path_factory.mktemp("signed")
    for path, content in FILES.items():
        (root / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "model" / path).write_bytes(content)
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (root / "key").write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    signing.Config().use_elliptic_key_signer(private_key=root / "key").sign(root / "model", root / "model.sig")
    return statement_of((root / "model.sig").read_bytes())


def trusting(registry: Registry, root: Path, sigstore: Sigstore, identity: str, issuer: str) -> None:
    (root / "trust.json").write_text(sigstore.trust())
    rule = AdmissionRule(signature="require", identity=identity, issuer=issuer, trust_config=str(root / "trust.json"))
    catalog = registry.catalog
    catalog.admission = catalog.contents.admission = catalog.publisher.admission = Admission([rule])


def publish(registry: Registry, bundle: Json, files: dict[str, bytes] = FILES) -> str:
    return registry.publish("org/m", {**files, "model.sig": json.dumps(bundle).encode()}).commit


@pytest.mark.parametrize(("identity", "issuer"), [(RELEASE, GITHUB), (ADA, ACCOUNTS)])
def test_who_is_named_may_sign(
    registry: Registry, tmp_path: Path, sigstore: Sigstore, statement: bytes, identity: str, issuer: str
) -> None:
    trusting(registry, tmp_path, sigstore, identity, issuer)
    # The certificate was good for ten minutes, weeks ago: it was when it signed, which the log says.
    signed = sigstore.sign(statement, identity, issuer, at=datetime.now(UTC) - timedelta(days=20))
    commit = publish(registry, signed)
    assert registry.catalog.signer(REPO, commit) == f"identity {identity}"


@pytest.mark.parametrize(
    ("identity", "issuer", "reason"),
    [
        (RELEASE.replace("org/m", "evil/m"), GITHUB, r"SANs do not match .*release\.yml"),
        (ADA, GITHUB, "SANs do not match"),
        (RELEASE, "https://evil.example.org", "OIDCIssuer does not match.*evil"),
    ],
)
def test_another_identity_or_issuer_is_refused(
    registry: Registry, tmp_path: Path, sigstore: Sigstore, statement: bytes, identity: str, issuer: str, reason: str
) -> None:
    trusting(registry, tmp_path, sigstore, RELEASE, GITHUB)
    with pytest.raises(BadSignature, match=f"nobody who is trusted: identity .*{reason}"):
        publish(registry, sigstore.sign(statement, identity, issuer))
    assert registry.catalog.count() == 0


def test_a_file_that_was_changed_afterwards_is_refused(
    registry: Registry, tmp_path: Path, sigstore: Sigstore, statement: bytes
) -> None:
    trusting(registry, tmp_path, sigstore, RELEASE, GITHUB)
    signed = sigstore.sign(statement, RELEASE, GITHUB)
    with pytest.raises(BadSignature, match=r"config\.json has changed"):
        publish(registry, signed, {**FILES, "config.json": b'{"evil": 1}'})
    with pytest.raises(BadSignature, match=r"run\.py is not signed"):
        publish(registry, signed, {**FILES, "run.py": b"1"})


def _entry(bundle: Json) -> Any:
    return bundle["verificationMaterial"]["tlogEntries"][0]


def _without_entry(bundle: Json) -> None:
    del bundle["verificationMaterial"]["tlogEntries"][0]


def _without_promise(bundle: Json) -> None:
    del _entry(bundle)["inclusionPromise"]


def _later(bundle: Json) -> None:
    _entry(bundle)["integratedTime"] = str(int(_entry(bundle)["integratedTime"]) + 1)


def _other_place(bundle: Json) -> None:
    _entry(bundle)["inclusionProof"]["hashes"] = []


def _other_payload(bundle: Json) -> None:
    envelope = bundle["dsseEnvelope"]
    envelope["payload"] = envelope["payload"][:-8] + envelope["payload"][-4:] + envelope["payload"][-8:-4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_entry, "expected exactly one log entry"),
        (_without_promise, "must contain an inclusion promise or signed timestamp"),
        (_later, "invalid log entry: SET: invalid inclusion promise"),
        (_other_place, "invalid log entry: inclusion proof has wrong size"),
        (_other_payload, "DSSE: invalid signature"),
    ],
)
def test_what_the_log_does_not_vouch_for_is_refused(
    registry: Registry, tmp_path: Path, sigstore: Sigstore, statement: bytes, change: Any, reason: str
) -> None:
    trusting(registry, tmp_path, sigstore, RELEASE, GITHUB)
    with pytest.raises(BadSignature, match=reason):
        publish(registry, changed(sigstore.sign(statement, RELEASE, GITHUB), change))


def test_a_signature_made_after_its_certificate_had_ended_is_refused(
    registry: Registry, tmp_path: Path, sigstore: Sigstore, statement: bytes
) -> None:
    trusting(registry, tmp_path, sigstore, RELEASE, GITHUB)
    then = datetime.now(UTC) - timedelta(days=1)
    signed = sigstore.sign(statement, RELEASE, GITHUB, at=then, logged=then + timedelta(hours=1))
    with pytest.raises(BadSignature, match="cert is not valid at validation time"):
        publish(registry, signed)


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("authority", "failed to build timestamp certificate chain"),
        ("certificates", "failed to verify SCT"),
        ("entries", "invalid log entry: checkpoint"),
    ],
)
def test_another_sigstore_is_not_believed(
    registry: Registry, tmp_path: Path, sigstore: Sigstore, statement: bytes, which: str, reason: str
) -> None:
    """Each of the three keys has a part that the other two can't play."""
    trusting(registry, tmp_path, sigstore, RELEASE, GITHUB)
    keys = {name: getattr(sigstore, name) for name in ("authority", "certificates", "entries") if name != which}
    with pytest.raises(BadSignature, match=reason):
        publish(registry, Sigstore(**keys, since=sigstore.since).sign(statement, RELEASE, GITHUB))


def test_an_identity_needs_an_issuer() -> None:
    """Without one anybody's word for it would do."""
    for rule in (AdmissionRule(identity=ADA), AdmissionRule(issuer=ACCOUNTS)):
        with pytest.raises(UsageError, match="identity and issuer belong together"):
            Admission([rule])
