"""Domains of a real registry: two tenants upload the same model, neither learns anything of the other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
from pathlib import Path

import pytest

from helios.names import RepoId
from heliosfs.store.keys import blob_key
from tests.integration.test_hub_uploads import Repo, body, lfs
from tests.support.command import Command
from tests.support.hub_clients import run_client
from tests.support.hub_site import Site, write
from tests.support.mounts import MODES
from tests.support.postgres import Databases
from tests.support.registry import running_registry
from tests.support.weights import model, numbers

pytestmark = pytest.mark.both_databases

WEIGHTS = random.Random(1).randbytes(12_000_000)
TOKENS = {name: f"hls_{name * 8}" for name in ("acme", "rival")}
AUTH = {name: {"authorization": f"Bearer {token}"} for name, token in TOKENS.items()}


def settings(root: Path, *names: str) -> str:
    tenants = {}
    for name in names:
        (root / name).write_text(hashlib.sha256(TOKENS[name].encode()).hexdigest())
        tenants[name] = {"owns": [f"{name}/*"], "tokens": str(root / name), "domain": name}
    return json.dumps(tenants)


@pytest.fixture
def helios(tmp_path: Path, databases: Databases) -> Command:
    env = {
        "HELIOS_REGISTRY__TENANTS": settings(tmp_path, "acme", "rival"),
        "HELIOS_REGISTRY__GC_GRACE_S": "0",
        "HELIOS_REGISTRY__LEASE_S": "1",
        **databases(),
    }
    return Command(tmp_path / "home", **env)


def domains(helios: Command) -> dict[str, dict]:
    return {row["domain"]: row for row in json.loads(helios("domain", "ls", "--json"))}


def test_two_tenants_upload_the_same_model(helios, tmp_path):
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    files = write(tmp_path / "m", {"w.bin": WEIGHTS, "config.json": b"{}"})
    with running_registry(helios) as registry:
        site = Site(registry, {}, "", "", tmp_path, helios)
        helios("push", str(files), "org/m")
        stored = domains(helios)["public"]["stored"]
        for tenant in ("acme", "rival"):
            repo = Repo(site, f"{tenant}/m", f"/t/{tenant}", AUTH[tenant])
            (asked,) = repo.batch((WEIGHTS, len(WEIGHTS)))
            assert "upload" in asked["actions"], "what org/m has, which the tenant may read, is no hint"
            (wrong,) = repo.batch((WEIGHTS, len(WEIGHTS) + 1))
            assert "error" not in wrong, "not even of its size"
            status, code, _ = repo.commit(body(lfs("w.bin", WEIGHTS)))
            assert (status, code) == (404, "EntryNotFound")
            repo.upload(WEIGHTS)
            status, _, answer = repo.commit(body(lfs("w.bin", WEIGHTS), summary="weights"))
            assert status == 200, answer
            (again,) = repo.batch((WEIGHTS, len(WEIGHTS)))
            assert "actions" not in again, "in its own domain it is known"
        rows = domains(helios)
        assert {name: row["tenants"] for name, row in rows.items()} == {
            "public": [], "acme": ["acme"], "rival": ["rival"],
        }  # fmt: skip
        for name in ("acme", "rival"):
            assert rows[name]["repositories"] == 1
            assert rows[name]["stored"] >= len(WEIGHTS)
        for domain in rows:
            assert (helios.home / "store" / blob_key(domain, sha256)).stat().st_size == len(WEIGHTS)
        assert json.loads(helios("usage", "--json"))["total"]["stored"] == sum(row["stored"] for row in rows.values())
        assert rows["public"]["stored"] == stored
        assert site.ask("GET", "/t/acme/acme/m/resolve/main/w.bin", AUTH["acme"])[2] == WEIGHTS
        assert site.ask("GET", "/t/rival/acme/m/resolve/main/w.bin", AUTH["rival"])[0] == 404
        # Damage of one tenant's copy is nobody else's.
        path = helios.home / "store" / blob_key("acme", sha256)
        path.chmod(0o600)
        path.write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
        assert site.ask("GET", "/t/rival/rival/m/resolve/main/w.bin", AUTH["rival"])[2] == WEIGHTS
        found = json.loads(helios.both("store", "verify", "--json", code=1)[0])
        assert [damage["object"] for damage in found["damage"]] == [blob_key("acme", sha256)]


@pytest.mark.one_database
@pytest.mark.parametrize(("version", "xet"), [("1.33.0", "1"), ("2.4.0", "0")])
def test_the_hub_s_clients_upload_into_their_own_domains(helios, tmp_path, version, xet):
    files = write(tmp_path / "m", {"w.bin": WEIGHTS, "config.json": b"{}"})
    script = """
    repo = os.environ["TENANT"] + "/m"
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=os.environ["FILES"])
    result = tree(snapshot_download(repo))
    """
    with running_registry(helios) as registry:
        for tenant in ("acme", "rival"):
            env = {"HF_TOKEN": TOKENS[tenant], "TENANT": tenant, "FILES": str(files), "HF_HUB_DISABLE_XET": xet}
            found = run_client(version, script, f"{registry.url}/t/{tenant}", tmp_path / f"hf-{tenant}", env=env)
            assert found["w.bin"] == hashlib.sha256(WEIGHTS).hexdigest()
        rows = domains(helios)
    assert rows["acme"]["unique"] == rows["rival"]["unique"] > len(WEIGHTS)
    assert rows["acme"]["stored"] == rows["rival"]["stored"] > len(WEIGHTS)
    assert "public" not in rows or rows["public"]["stored"] == 0


def test_a_domain_that_came_later_is_refused_and_moved_to_by_a_bundle(helios, tmp_path):
    files = write(tmp_path / "m", {"w.bin": WEIGHTS, "config.json": b"{}"})
    later = helios.env["HELIOS_REGISTRY__TENANTS"]
    helios.env["HELIOS_REGISTRY__TENANTS"] = "{}"
    with running_registry(helios):
        commit = json.loads(helios("push", str(files), "acme/m", "--json"))["commit"]
    helios.env["HELIOS_REGISTRY__TENANTS"] = later
    _, error = helios.both("registry", "--port", "0", code=2)
    assert "acme/m (public, not acme)" in error
    assert "helios bundle export" in error
    helios.env["HELIOS_REGISTRY__TENANTS"] = "{}"
    with running_registry(helios):
        helios("bundle", "export", str(tmp_path / "b.tar"), "acme/m")
        helios("rm", "acme/m", "--yes")
    helios.env["HELIOS_REGISTRY__TENANTS"] = later
    with running_registry(helios) as registry:
        helios("bundle", "import", str(tmp_path / "b.tar"))
        with contextlib.closing(registry.client(registry.socket)) as client:
            assert client.resolve(RepoId.parse("acme/m"), "main").commit == commit
        assert domains(helios)["acme"]["unique"] == len(WEIGHTS) + 2
        assert domains(helios)["public"]["repositories"] == 0


def test_a_domain_goes_when_its_tenant_has_gone(helios, tmp_path):
    files = write(tmp_path / "m", {"w.bin": WEIGHTS, "config.json": b"{}"})
    with running_registry(helios):
        for name in ("org/m", "acme/m", "rival/m"):  # each sends all of it: what others have, no push finds out
            pushed = json.loads(helios("push", str(files), name, "--json"))
            assert (pushed["new_bytes"], pushed["deduplicated_bytes"]) == (len(WEIGHTS) + 2, 0)
            again = json.loads(helios("push", str(files), name, "--json"))
            assert again["new_bytes"] == 0
        _, error = helios.both("domain", "rm", "acme", code=1)
        assert "tenant acme" in error
        helios("rm", "acme/m", "--yes")
    helios.env["HELIOS_REGISTRY__TENANTS"] = settings(tmp_path, "rival")
    with running_registry(helios) as registry:
        done = json.loads(helios("domain", "rm", "acme", "--json"))
        assert (done["removed_blobs"], done["busy"]) == (2, 0)
        assert done["freed_bytes"] > len(WEIGHTS)
        end, error = time.monotonic() + 60, ""
        while "no domain acme" not in error:  # once the leases of a second are over, by this or by the registry itself
            assert time.monotonic() < end, error
            with helios.start("domain", "rm", "acme", "--json") as again:
                _, error = again.communicate(timeout=60)
        assert not [path for path in (helios.home / "store" / "acme").rglob("*") if path.is_file()]
        assert "acme" not in domains(helios)
        with contextlib.closing(registry.client(registry.socket)) as client:
            assert client.usage(RepoId.parse("rival/m")).unique == len(WEIGHTS) + 2


# --- encryption ---


@pytest.fixture
def sealed(helios: Command, tmp_path: Path) -> Command:
    """acme's domain is encrypted."""
    (tmp_path / "key").write_text("ab" * 32 + "\n")
    helios.env["HELIOS_REGISTRY__DOMAINS"] = json.dumps({"acme": {"key_file": str(tmp_path / "key")}})
    return helios


def stored_files(helios: Command, domain: str) -> list[Path]:
    return [path for path in (helios.home / "store" / domain).rglob("*") if path.is_file()]


@pytest.mark.one_database
@pytest.mark.parametrize(("version", "xet"), [("0.36.2", "1"), ("1.33.0", "0"), ("2.4.0", "1")])
def test_a_hub_client_uses_an_encrypted_domain(sealed, tmp_path, version, xet):
    text = b"a very secret sentence\n" * 1000
    files = write(tmp_path / "m", {"w.bin": WEIGHTS, "config.json": b"{}", "deep/notes.txt": text})
    upload = """
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=os.environ["FILES"])
    """
    download = """
    part = urllib.request.Request(f"{ENDPOINT}/{REPO}/resolve/main/w.bin", headers={
        "range": "bytes=5000000-5000999", "authorization": "Bearer " + os.environ["HF_TOKEN"]})
    result = {"files": tree(snapshot_download(REPO)), "part": urllib.request.urlopen(part).read().hex()}
    """
    old = version == "0.36.2"  # its create_repo knows no prefix
    script = '\n    REPO = "acme/m"\n' + ("" if old else upload) + download
    with running_registry(sealed) as registry:
        if old:
            sealed("push", str(files), "acme/m")
        env = {"HF_TOKEN": TOKENS["acme"], "FILES": str(files), "HF_HUB_DISABLE_XET": xet}
        found = run_client(version, script, f"{registry.url}/t/acme", tmp_path / "hf", env=env)
        assert found["part"] == WEIGHTS[5_000_000:5_001_000].hex()
        for path, data in (("w.bin", WEIGHTS), ("deep/notes.txt", text)):
            assert found["files"][path] == hashlib.sha256(data).hexdigest()
        assert domains(sealed)["acme"]["unique"] > len(WEIGHTS)
        verified = json.loads(sealed("store", "verify", "--json"))
        assert (verified["damaged"], verified["stray_objects"]) == (0, 0)
    assert len(stored_files(sealed, "acme")) > 6
    for path in stored_files(sealed, "acme"):
        raw = path.read_bytes()
        assert b"secret sentence" not in raw
        assert WEIGHTS[1000:1032] not in raw
        assert hashlib.sha256(WEIGHTS).hexdigest().encode() not in raw
        assert hashlib.sha256(WEIGHTS).hexdigest() not in str(path)


def test_an_encrypted_domain_through_restarts_and_wrong_keys(sealed, tmp_path):
    files = write(tmp_path / "m", {"w.bin": WEIGHTS, "config.json": b"{}"})
    good = sealed.env["HELIOS_REGISTRY__DOMAINS"]
    with running_registry(sealed):
        sealed("push", str(files), "acme/m")
    before = {path: path.read_bytes() for path in stored_files(sealed, "acme")}
    (tmp_path / "wrong").write_text("cd" * 32)
    for wrong in ("{}", json.dumps({"acme": {"key_file": str(tmp_path / "wrong")}})):
        sealed.env["HELIOS_REGISTRY__DOMAINS"] = wrong
        _, error = sealed.both("registry", "--port", "0", code=2)
        assert "encrypted with a key that is not here" in error
        assert "cdcdcd" not in error
    assert {path: path.read_bytes() for path in stored_files(sealed, "acme")} == before
    # A new key: what is there can be read, what is new lies under it.
    rotated = {"acme": {"key_file": str(tmp_path / "wrong"), "old_key_files": [str(tmp_path / "key")]}}
    sealed.env["HELIOS_REGISTRY__DOMAINS"] = json.dumps(rotated)
    write(tmp_path / "m", {"more.bin": WEIGHTS[::-1]})
    with running_registry(sealed) as registry:
        sealed("push", str(files), "acme/m")
        site = Site(registry, {}, "", "", tmp_path, sealed)
        for name, data in (("w.bin", WEIGHTS), ("more.bin", WEIGHTS[::-1])):
            assert site.ask("GET", f"/t/acme/acme/m/resolve/main/{name}", AUTH["acme"])[2] == data
        log = sealed("domain", "ls")
        assert "abababab" not in log
    sealed.env["HELIOS_REGISTRY__DOMAINS"] = good
    _, error = sealed.both("registry", "--port", "0", code=2)
    assert "encrypted with a key that is not here" in error
    for path in (sealed.home / "registry").rglob("*"):
        if path.is_file():
            assert b"abababab" not in path.read_bytes()


@pytest.mark.one_database
def test_what_is_encrypted_is_compressed_before(sealed, tmp_path):
    """And what two domains have is compressed in each of them."""
    data = model({"w": ("BF16", numbers("BF16", 4 << 20, 1))})
    files = write(tmp_path / "m", {"model.safetensors": data})
    with running_registry(sealed) as registry:
        for name in ("acme", "rival"):
            sealed("push", str(files), f"{name}/m")
        told = json.loads(sealed("store", "compress", "--unread-for", "0", "--json"))
        assert (told["compressed"], told["problems"]) == (2, [])
        time.sleep(1.2)
        sealed("gc")
        site = Site(registry, {}, "", "", tmp_path, sealed)
        for name in ("acme", "rival"):
            path = f"/t/{name}/{name}/m/resolve/main/model.safetensors"
            assert site.ask("GET", path, AUTH[name])[2] == data
            assert sum(path.stat().st_size for path in stored_files(sealed, name)) < 0.75 * len(data)
        verified = json.loads(sealed("store", "verify", "--json"))
        assert (verified["damaged"], verified["stray_objects"]) == (0, 0)


def test_what_is_encrypted_moves_is_collected_and_removed(sealed, tmp_path, databases):
    files = write(tmp_path / "m", {"w.bin": WEIGHTS, "config.json": b"{}"})
    with running_registry(sealed) as registry:
        sealed("push", str(files), "acme/m")
        sealed("bundle", "export", str(tmp_path / "b.tar"), "acme/m")
        peers = json.dumps([{"name": "near", "url": registry.url}])
        peer = Command(tmp_path / "peer", HELIOS_REGISTRY__PEERS=peers, **databases())
        with running_registry(peer) as other:
            peer("bundle", "import", str(tmp_path / "b.tar"))
            site = Site(other, {}, "", "", tmp_path, peer)
            assert site.ask("GET", "/acme/m/resolve/main/w.bin")[2] == WEIGHTS
        # Damage is found, and named as what it is.
        victim = max(stored_files(sealed, "acme"), key=lambda path: path.stat().st_size)
        raw = victim.read_bytes()
        victim.chmod(0o600)
        victim.write_bytes(raw[:5_000_000] + bytes([raw[5_000_000] ^ 1]) + raw[5_000_001:])
        found = json.loads(sealed.both("store", "verify", "--json", code=1)[0])
        assert {damage["object"] for damage in found["damage"]} == {
            blob_key("acme", hashlib.sha256(WEIGHTS).hexdigest())
        }
        victim.write_bytes(raw)
        assert json.loads(sealed("store", "verify", "--json"))["damaged"] == 0
        sealed("rm", "acme/m", "--yes")
    sealed.env["HELIOS_REGISTRY__TENANTS"] = settings(tmp_path, "rival")
    sealed.env["HELIOS_REGISTRY__DOMAINS"] = "{}"  # and the key may be destroyed
    with running_registry(sealed):
        assert json.loads(sealed("domain", "rm", "acme", "--json"))["removed_blobs"] == 2
        end = time.monotonic() + 20
        while stored_files(sealed, "acme"):
            assert time.monotonic() < end
            with contextlib.suppress(AssertionError):
                sealed("domain", "rm", "acme")
        _, error = sealed.both("domain", "rm", "acme", code=1)
        assert "no domain acme" in error


@pytest.mark.one_database
@pytest.mark.parametrize("mode", MODES)
def test_a_mount_reads_an_encrypted_domain(sealed, tmp_path, mode):
    files = write(tmp_path / "m", {"w.bin": WEIGHTS, "config.json": b"{}"})
    with running_registry(sealed) as registry:
        sealed("push", str(files), "acme/m")
        mnt = tmp_path / "mnt"
        sealed.env["HELIOS_MOUNT__MODE"] = mode
        sealed("mount", str(mnt), "--registry", registry.socket)
        try:
            assert (mnt / "acme" / "m" / "@main" / "w.bin").read_bytes() == WEIGHTS
            with (mnt / "acme" / "m" / "@main" / "w.bin").open("rb") as file:
                file.seek(7_000_001)
                assert file.read(1000) == WEIGHTS[7_000_001:7_001_001]
        finally:
            sealed("umount", str(mnt))
