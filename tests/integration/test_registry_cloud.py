"""A registry on S3: pushed to, read by the Hub's clients and by nodes; who sent which byte is counted at both ends."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from helios.home import Home
from tests.support.cloud_servers import SECRET, azurite, credentials, gcs, moto
from tests.support.cloud_site import FILES, LARGE, MIDDLE, CloudSite, cloud_site, running
from tests.support.command import Command
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.mounts import mounted, write
from tests.support.weights import model, numbers

LARGE_NAME = "data/part 1 (ü).bin"
LARGE_URL = "/org/m/resolve/main/data/part%201%20(%C3%BC).bin"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="module")
def site(tmp_path_factory, s3, databases):
    with cloud_site(tmp_path_factory.mktemp("site"), s3, databases) as found:
        yield found


@pytest.fixture(autouse=True)
def _calm(request):
    if "site" in request.fixturenames:
        request.getfixturevalue("site").proxy.calm()


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


def ask(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One GET that follows no redirect."""
    try:
        with urllib.request.build_opener(_Stay).open(
            urllib.request.Request(url, headers=headers), timeout=30
        ) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


@pytest.mark.both_databases
def test_what_was_pushed_lies_in_the_bucket_and_nowhere_else(site: CloudSite, s3) -> None:
    with credentials(s3):
        import botocore.session

        client = botocore.session.Session().create_client("s3", endpoint_url=s3.url, region_name="us-east-1")
        found = client.list_objects_v2(Bucket="bucket", Prefix=f"{site.prefix}/public/")["Contents"]
        blob = hashlib.sha256(LARGE).hexdigest()
        key = f"{site.prefix}/public/blobs/{blob[:2]}/{blob}"
        assert client.get_object(Bucket="bucket", Key=key)["Body"].read() == LARGE
        client.close()
    kinds = {entry["Key"].removeprefix(f"{site.prefix}/public/").partition("/")[0] for entry in found}
    assert kinds >= {"blobs", "recipes", "manifests", "commits", "registry"}
    home = Path(site.helios.home)
    assert not (home / "store").exists()
    assert not [path for path in (home / "registry/staging").rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.parametrize("version", VERSIONS)
def test_hub_clients_fetch_large_files_from_the_store_itself(site: CloudSite, version: str, tmp_path: Path) -> None:
    before = site.metric("helios_registry_sent_bytes_total")
    result = run_client(
        version,
        """
        result = {"tree": tree(snapshot_download("org/m", token="hf_TellNobody"))}
        with HfFileSystem(token="hf_TellNobody").open("org/m/data/part 1 (ü).bin", "rb", block_size=1 << 20) as file:
            file.seek(9_000_000); result["middle"] = file.read(1000).hex()
        """,
        site.url,
        tmp_path / "hf",
    )
    assert result["tree"] == {path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()}
    assert bytes.fromhex(result["middle"]) == LARGE[9_000_000:9_001_000]
    direct = site.direct()
    whole = [seen for seen in direct if seen.sent == len(LARGE)]
    ranges = [seen for seen in direct if "range" in seen.headers and seen.status == 206]
    assert len(whole) == 1, "the file comes from the store, once"
    assert ranges, "and so do its ranges"
    assert sum(seen.sent for seen in ranges) < 4 << 20
    assert not any("TellNobody" in str(seen.headers) for seen in site.proxy.seen), "the Hub's token stays with us"
    sent = site.metric("helios_registry_sent_bytes_total") - before
    assert sent == sum(len(data) for data in FILES.values()) - len(LARGE), "the other files came through the registry"


def test_a_redirect_says_what_clients_want_to_know(site: CloudSite) -> None:
    status, headers, body = ask(site.url + LARGE_URL, Range="bytes=100-199")
    assert (status, body) == (302, b"")
    assert headers["x-linked-size"] == str(len(LARGE))
    assert headers["x-linked-etag"] == headers["etag"] == f'"{hashlib.sha256(LARGE).hexdigest()}"'
    assert headers["x-repo-commit"] == site.commit
    assert headers["cache-control"] == "no-store"
    assert headers["location"].startswith(site.proxy.url)
    _, again, _ = ask(headers["location"], Range="bytes=100-199")
    assert again["content-range"] == f"bytes 100-199/{len(LARGE)}"
    assert ask(headers["location"], Range="bytes=100-199")[2] == LARGE[100:200]
    assert ask(site.url + LARGE_URL, Range=f"bytes={len(LARGE)}-")[0] == 416
    assert ask(site.url + LARGE_URL, **{"If-None-Match": headers["etag"]})[0] == 304
    request = urllib.request.Request(site.url + LARGE_URL, method="HEAD")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert (answer.status, answer.url) == (200, site.url + LARGE_URL)
        assert answer.headers["content-length"] == answer.headers["x-linked-size"] == str(len(LARGE))


def test_addresses_are_made_for_each_answer(site: CloudSite) -> None:
    blob = hashlib.sha256(LARGE).hexdigest()
    placements = [
        json.loads(ask(f"{site.url}/api/v1/placements?repo=models/org/m&blob={blob}")[2]),
        *(b["placement"] for b in json.loads(
            ask(f"{site.url}/api/v1/content?repo=models/org/m&commit={site.commit}")[2]
        )["blobs"]),
    ]  # fmt: skip
    assert len(placements) == 4
    for placement in placements:
        (at,) = placement["objects"]
        assert at["url"].startswith(f"{site.proxy.url}/bucket/{site.prefix}/{at['key']}?")
        assert "X-Amz-Expires=1200" in at["url"], "the lease of 300 s, and some to spare"
        assert placement["lease_s"] == 300
    assert "X-Amz" not in (Path(site.helios.home) / "registry/metadata.db").read_bytes().decode("latin-1")


def test_a_mount_reads_from_the_store_itself(site: CloudSite, tmp_path: Path) -> None:
    home = Home(tmp_path / "node")
    before = site.metric("helios_registry_sent_bytes_total")
    with mounted(home, tmp_path / "mnt", HELIOS_REGISTRY__URLS=site.url):
        for path, data in FILES.items():
            assert (tmp_path / "mnt/org/m" / site.commit / path).read_bytes() == data
    assert site.metric("helios_registry_sent_bytes_total") == before, "no byte came through the registry"
    assert sum(seen.sent for seen in site.direct()) >= len(LARGE) + len(MIDDLE)


@pytest.mark.both_databases
def test_what_is_compressed_comes_from_the_store_itself_to_nodes_and_through_the_registry_to_others(
    site: CloudSite, tmp_path: Path
) -> None:
    data = model({"w": ("BF16", numbers("BF16", 5 << 20, 1))})
    site.helios("push", str(write(tmp_path / "cold", {"model.safetensors": data})), "org/cold")
    told = json.loads(site.helios("store", "compress", "org/cold", "--unread-for", "0", "--json"))
    assert (told["compressed"], told["problems"]) == (1, [])
    site.proxy.calm()
    before = site.metric("helios_registry_sent_bytes_total")
    with mounted(Home(tmp_path / "node"), tmp_path / "mnt", HELIOS_REGISTRY__URLS=site.url):
        assert (tmp_path / "mnt/org/cold/@main/model.safetensors").read_bytes() == data
    assert site.metric("helios_registry_sent_bytes_total") == before, "no byte came through the registry"
    assert sum(seen.sent for seen in site.direct()) < 0.75 * len(data)
    status, _, body = ask(f"{site.url}/org/cold/resolve/main/model.safetensors")
    assert (status, body == data) == (200, True), "a client that knows no codec gets it decoded, not redirected"


@pytest.mark.parametrize("status", [403, 400, 503])
def test_a_mount_gets_over_expired_addresses_and_a_store_that_is_busy(
    site: CloudSite, tmp_path: Path, status: int
) -> None:
    def signed(seen) -> bool:
        return "authorization" not in seen.headers

    home = Home(tmp_path / "node")
    site.proxy.fault(signed, method="GET", status=status, times=3)
    with mounted(home, tmp_path / "mnt", HELIOS_REGISTRY__URLS=site.url) as mount:
        assert (tmp_path / "mnt/org/m" / site.commit / "middle.bin").read_bytes() == MIDDLE
        assert "X-Amz-Signature" not in mount.log()
    assert [seen.status for seen in site.direct()].count(status) == 3


def test_a_registry_that_sends_everything_itself(tmp_path: Path, s3) -> None:
    """``redirect = "never"``: for clients that can't reach the store."""
    with cloud_site(tmp_path, s3, redirect="never") as site:
        site.proxy.calm()
        status, _, body = ask(site.url + LARGE_URL, Range="bytes=4194000-12000000")
        assert (status, body == LARGE[4194000:12000001]) == (206, True)
        assert ask(site.url + LARGE_URL)[2] == LARGE
        home = Home(tmp_path / "node")
        with mounted(home, tmp_path / "mnt", HELIOS_REGISTRY__URLS=site.url):
            assert (tmp_path / "mnt/org/m" / site.commit / LARGE_NAME).read_bytes() == LARGE
        assert site.direct() == []
        blob = hashlib.sha256(LARGE).hexdigest()
        url = f"{site.url}/api/v1/objects/public/blobs/{blob[:2]}/{blob}"
        assert ask(url)[2] == LARGE
        assert ask(url, Range="bytes=-5")[2] == LARGE[-5:]
        assert ask(url, Range=f"bytes={len(LARGE)}-")[0] == 416
        # One bit changes on the way: it does not get past the registry, and is there the next time.
        site.proxy.fault(blob, method="GET", flip_at=100, times=1)
        assert ask(site.url + LARGE_URL, Range="bytes=0-999")[2] == LARGE[:1000]
        site.proxy.fault(blob, method="GET", flip_at=100, times=2)
        status, _, body = ask(site.url + LARGE_URL, Range="bytes=0-999")
        assert (status, b"damaged" in body) == (502, True)
        site.proxy.calm()
        site.proxy.fault(blob, method="GET", status=503, times=2)
        assert ask(site.url + LARGE_URL, Range="bytes=0-999")[2] == LARGE[:1000], "tried again"
        site.proxy.fault(blob, method="GET", truncate_at=1000, times=1)
        assert ask(site.url + LARGE_URL, Range="bytes=0-99999")[2] == LARGE[:100_000]


def test_no_secret_is_ever_told(tmp_path: Path, s3) -> None:
    """Neither in logs, answers, metrics nor what commands print, whatever goes wrong."""
    told = []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "f").write_bytes(os.urandom(1000))
    with cloud_site(tmp_path, s3) as site:
        for status in (403, 400):
            body = f"<Error><Code>Denied</Code><Message>no</Message><StringToSign>{SECRET}</StringToSign></Error>"
            site.proxy.fault(site.prefix, status=status, times=-1, body=body.encode())
            for path in ("/readyz", "/org/m/resolve/main/config.json", "/metrics"):
                told.append(ask(site.url + path)[2].decode())
            told += site.helios.both("push", str(tmp_path / "other"), "org/other", code=1)
            site.proxy.calm()
        for command in (["status", "--json"], ["doctor"]):
            with site.helios.start(*command) as process:
                told += process.communicate(timeout=60)
    told.append(site.log.read_text(errors="replace"))
    assert sum("Denied" in each for each in told) >= 3, "what happened is told"
    told += [p.read_bytes().decode("latin-1") for p in (tmp_path / "home").rglob("*") if p.is_file()]
    for secret in (SECRET, "AKIATELLNOBODY", "X-Amz-Signature", "X-Amz-Credential"):
        assert not [each for each in told if secret in each]


@pytest.mark.both_databases
def test_a_registry_starts_again_and_finds_everything(tmp_path: Path, s3, databases) -> None:
    with cloud_site(tmp_path, s3, databases) as site:
        site.registry.kill()
        with running(site.helios, tmp_path / "again.log") as registry:
            assert ask(registry.url + "/org/m/resolve/main/middle.bin")[2] == MIDDLE
            assert ask(registry.url + "/readyz")[0] == 200
            site.proxy.fault("list-type=2", status=403, times=-1)
            assert ask(registry.url + "/readyz")[0] == 503
            assert ask(registry.url + "/healthz")[0] == 200
            site.proxy.calm()
        other = Command(tmp_path / "other-home", **site.helios.env)
        other.env |= {"HELIOS_HOME": str(tmp_path / "other-home"), **databases()}
        _, err = other.both("registry", "--port", "0", code=1)
        assert "belongs to another registry" in err


@pytest.mark.parametrize("kind", ["azure", "gcs", "s3 through fsspec", "azure through fsspec"])
def test_other_services_from_end_to_end(tmp_path: Path, kind: str) -> None:
    """Azurite and the fake of GCS check what is signed: an address that was tampered with is refused."""
    (tmp_path / "server").mkdir()
    start = {"azure": azurite, "gcs": gcs, "s3": moto}[kind.partition(" ")[0]]
    more = {"store_engine": "fsspec"} if "fsspec" in kind else {}
    with start(tmp_path / "server") as server, cloud_site(tmp_path, server, **more) as site:
        status, headers, _ = ask(site.url + LARGE_URL)
        assert status == 302
        location = headers["location"]
        assert ask(location, Range="bytes=5-9")[2] == LARGE[5:10]
        other = location.replace(hashlib.sha256(LARGE).hexdigest(), hashlib.sha256(MIDDLE).hexdigest())
        if start is not moto:
            assert ask(other)[0] == 403
        home = Home(tmp_path / "node")
        with mounted(home, tmp_path / "mnt", HELIOS_REGISTRY__URLS=site.url):
            for path, data in FILES.items():
                assert (tmp_path / "mnt/org/m" / site.commit / path).read_bytes() == data
        assert sum(seen.sent for seen in site.direct()) >= len(LARGE) + len(MIDDLE)
