"""What a publish must pass, and what of it can be read then."""

from __future__ import annotations

import datetime
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from helios.config import AdmissionRule
from helios.errors import BadSignature, NotAdmitted, NotFound, Quarantined, UsageError
from helios.names import RepoId
from registry.admission.admission import Admission
from tests.unit.registry.conftest import Registry

REPO = RepoId.parse("org/m")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


PICKLE = pickle.dumps(Evil())


def rules(registry: Registry, *given: AdmissionRule) -> None:
    catalog = registry.catalog
    catalog.admission = catalog.contents.admission = catalog.publisher.admission = Admission(given)


def sha256_of(registry: Registry, path: str) -> str:
    commit = registry.catalog.resolve(REPO, "main").commit
    return registry.catalog.contents.manifest(REPO, commit).files[path].sha256


def test_a_pickled_file_is_published_and_kept_back_until_it_is_released(registry: Registry) -> None:
    registry.publish("org/m", {"config.json": b"{}", "pytorch_model.bin": PICKLE})
    catalog, sha256 = registry.catalog, sha256_of(registry, "pytorch_model.bin")
    assert catalog.contents.recipe_bytes(REPO, sha256_of(registry, "config.json"))
    for read in (catalog.contents.recipe_bytes, catalog.contents.placement, catalog.contents.blob_reader):
        with pytest.raises(Quarantined, match="posix system"):
            read(REPO, sha256)
    told = catalog.contents.commit_content(REPO, catalog.resolve(REPO, "main").commit)
    assert sha256 not in {blob.placement.blob for blob in told.blobs}
    (kept,) = catalog.kept()
    assert (kept.repo, kept.path, kept.sha256, kept.released) == ("models/org/m", "pytorch_model.bin", sha256, None)

    catalog.release(REPO, sha256, "ada")
    assert catalog.contents.blob_reader(REPO, sha256).read(0, 1 << 20) == PICKLE
    assert catalog.kept() == []
    assert [k.released_by for k in catalog.kept(REPO, released=True)] == ["ada"]
    with pytest.raises(NotFound):
        catalog.release(REPO, sha256, "ada")


def test_a_released_file_stays_released_and_only_in_its_repository(registry: Registry) -> None:
    registry.publish("org/m", {"a.bin": PICKLE})
    registry.catalog.release(REPO, sha256_of(registry, "a.bin"), "ada")
    registry.publish("org/m", {"a.bin": PICKLE, "b.txt": b"more"})
    registry.publish("org/other", {"a.bin": PICKLE})
    sha256 = sha256_of(registry, "a.bin")
    assert registry.catalog.contents.placed(REPO, sha256)
    with pytest.raises(Quarantined):
        registry.catalog.contents.placed(RepoId.parse("org/other"), sha256)


def test_the_quarantine_is_there_after_a_restart_and_goes_with_the_repository(registry: Registry) -> None:
    registry.publish("org/m", {"a.bin": PICKLE})
    again = registry.reopen()
    with pytest.raises(Quarantined):
        again.catalog.contents.placed(REPO, sha256_of(again, "a.bin"))
    again.catalog.delete_repo(REPO)
    assert again.catalog.kept() == []
    again.close()


def test_bytes_that_no_loader_unpickles_are_not_kept_back(registry: Registry) -> None:
    registry.publish("org/m", {"weights.bin": b"\x00\x01\x02 raw", "empty.pt": b"", "model.gguf": PICKLE})
    assert registry.catalog.kept() == []


def test_the_first_rule_that_fits_decides(registry: Registry) -> None:
    rules(
        registry,
        AdmissionRule(repo="trusted/*", pickle="allow"),
        AdmissionRule(repo="strict/*", pickle="refuse", formats=["json", "safetensors"]),
    )
    registry.publish("trusted/m", {"a.bin": PICKLE})
    assert registry.catalog.kept() == []
    with pytest.raises(NotAdmitted, match=r"a\.bin is read with pickle"):
        registry.publish("strict/m", {"a.bin": PICKLE})
    with pytest.raises(NotAdmitted, match=r"run\.py is a code file; only json, safetensors"):
        registry.publish("strict/m", {"run.py": b"print()"})
    registry.publish("strict/m", {"config.json": b"{}"})
    registry.publish("org/m", {"a.bin": PICKLE})
    assert len(registry.catalog.kept()) == 1


def test_a_rule_that_lets_pickles_through_lets_those_kept_back_through(registry: Registry) -> None:
    registry.publish("org/m", {"a.bin": PICKLE})
    rules(registry, AdmissionRule(repo="org/*", pickle="allow"))
    assert registry.catalog.contents.placed(REPO, sha256_of(registry, "a.bin"))


def test_a_rule_with_a_format_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="known: "):
        Admission([AdmissionRule(formats=["tarball"])])


# --- signatures: made with model_signing's own signer, as people make them


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (root / name).write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (root / f"{name}.pub").write_bytes(public)
    return root


FILES = {"config.json": b"{}", "sub/model.gguf": b"weights"}


def signed(root: Path, key: Path, files: dict[str, bytes] = FILES, **options: object) -> bytes:
    from model_signing import hashing, signing

    directory = root / "model"
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    if options:
        hasher = hashing.Config().use_shard_serialization(**options)  # type: ignore[arg-type]
        config.set_hashing_config(hasher)
    config.sign(directory, root / "model.sig")
    return (root / "model.sig").read_bytes()


def rule(keys: Path, signature: str, *names: str) -> AdmissionRule:
    return AdmissionRule(signature=signature, keys=[str(keys / f"{name}.pub") for name in names])  # type: ignore[arg-type]


def test_a_signed_snapshot_is_taken_and_its_signer_known(registry: Registry, keys: Path, tmp_path: Path) -> None:
    rules(registry, rule(keys, "require", "theirs", "ours"))
    signature = signed(tmp_path, keys / "ours")
    record = registry.publish("org/m", {**FILES, "model.sig": signature, ".gitattributes": b"*.gguf filter=lfs"})
    assert registry.catalog.signer(REPO, record.commit) == f"key {keys / 'ours.pub'}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"a": 1}', "sub/model.gguf": b"weights"}, r"config\.json has changed"),
        ({"config.json": b"{}"}, r"sub/model\.gguf is missing"),
        ({**FILES, "extra.json": b"1"}, r"extra\.json is not signed"),
    ],
)
def test_a_signature_of_other_files_is_refused(
    registry: Registry, keys: Path, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    rules(registry, rule(keys, "verify", "ours"))
    with pytest.raises(BadSignature, match=message):
        registry.publish("org/m", {**files, "model.sig": signed(tmp_path, keys / "ours")})
    assert registry.catalog.count() == 0


def test_who_is_not_trusted_is_refused_and_a_missing_signature_only_where_it_is_required(
    registry: Registry, keys: Path, tmp_path: Path
) -> None:
    signature = signed(tmp_path, keys / "theirs")
    for mode in ("verify", "require"):
        rules(registry, rule(keys, mode, "ours"))
        with pytest.raises(BadSignature, match="nobody who is trusted"):
            registry.publish("org/m", {**FILES, "model.sig": signature})
        with pytest.raises(BadSignature):
            registry.publish("org/m", {**FILES, "model.sig": b'{"verificationMaterial": {}}'})
    with pytest.raises(BadSignature, match="required"):
        registry.publish("org/m", FILES)
    rules(registry, rule(keys, "verify", "ours"))
    registry.publish("org/m", FILES)
    rules(registry, rule(keys, "ignore"))
    registry.publish("org/m", {**FILES, "model.sig": signature})


def test_a_payload_that_was_changed_is_refused(registry: Registry, keys: Path, tmp_path: Path) -> None:
    import base64
    import hashlib
    import json

    bundle = json.loads(signed(tmp_path, keys / "ours"))
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    for resource in payload["predicate"]["resources"]:
        if resource["name"] == "config.json":
            resource["digest"] = hashlib.sha256(b"evil").hexdigest()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    rules(registry, rule(keys, "require", "ours"))
    with pytest.raises(BadSignature):
        registry.publish("org/m", {**FILES, "config.json": b"evil", "model.sig": json.dumps(bundle).encode()})


def test_a_signature_over_parts_of_files_is_refused_with_the_reason(
    registry: Registry, keys: Path, tmp_path: Path
) -> None:
    rules(registry, rule(keys, "require", "ours"))
    signature = signed(tmp_path, keys / "ours", shard_size=4)
    with pytest.raises(BadSignature):
        registry.publish("org/m", {**FILES, "model.sig": signature})


def test_a_key_that_cannot_be_read_is_the_operators_error(registry: Registry, keys: Path, tmp_path: Path) -> None:
    signature = signed(tmp_path, keys / "ours")
    rules(registry, rule(keys, "require", "missing"))
    with pytest.raises(UsageError, match=r"registry\.admission"):
        registry.publish("org/m", {**FILES, "model.sig": signature})
    assert io.BytesIO(signature).read(1) == b"{"


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, and a signer under each: ``<name>.ca``, ``<name>.crt``, ``<name>.key``."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root, now = tmp_path_factory.mktemp("certificates"), datetime.datetime.now(datetime.UTC)
    pem = serialization.Encoding.PEM

    def certificate(name: str, key: Any, issuer: str, by: Any, *, ca: bool) -> Any:
        def named(text: str) -> Any:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        usage = x509.KeyUsage(
            digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        built = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(issuer))
        built = built.public_key(key.public_key()).serial_number(x509.random_serial_number())
        built = built.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
            now + datetime.timedelta(days=1)
        )
        built = built.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        return built.add_extension(usage, critical=True).sign(by, hashes.SHA256())

    for name in ("ours", "theirs"):
        authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        top = certificate(f"{name} authority", authority, f"{name} authority", authority, ca=True)
        leaf = certificate(name, key, f"{name} authority", authority, ca=False)
        (root / f"{name}.ca").write_bytes(top.public_bytes(pem))
        (root / f"{name}.crt").write_bytes(leaf.public_bytes(pem))
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (root / f"{name}.key").write_bytes(private)
    return root


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_a_certificate_counts_under_an_authority_that_is_trusted(
    registry: Registry, certified: Path, tmp_path: Path, name: str
) -> None:
    from model_signing import signing

    for path, content in FILES.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(content)
    signer = signing.Config().use_certificate_signer(
        private_key=certified / f"{name}.key",
        signing_certificate=certified / f"{name}.crt",
        certificate_chain=[certified / f"{name}.ca"],
    )
    signer.sign(tmp_path / "model", tmp_path / "model.sig")
    files = {**FILES, "model.sig": (tmp_path / "model.sig").read_bytes()}
    rules(registry, AdmissionRule(signature="require", certificates=[str(certified / "ours.ca")]))
    if name == "theirs":
        with pytest.raises(BadSignature, match="nobody who is trusted"):
            registry.publish("org/m", files)
    else:
        record = registry.publish("org/m", files)
        assert registry.catalog.signer(REPO, record.commit) == f"a certificate under {certified / 'ours.ca'}"


def test_trust_for_keyless_signatures_that_cannot_be_read_is_the_operators_error(
    registry: Registry, keys: Path, tmp_path: Path
) -> None:
    (tmp_path / "trust.json").write_text("{}")
    trust = str(tmp_path / "trust.json")
    rules(registry, AdmissionRule(signature="verify", identity="a@b", issuer="https://c", trust_config=trust))
    with pytest.raises(UsageError, match="trust that can't be used"):
        registry.publish("org/m", {**FILES, "model.sig": signed(tmp_path, keys / "ours")})
