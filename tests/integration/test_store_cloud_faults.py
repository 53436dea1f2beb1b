"""Cloud stores when something between us and the service goes wrong, and when a writer is killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import botocore.session
import pytest

from helios.config import RegistrySettings
from helios.errors import HeliosError, IntegrityError, NotFound, Unavailable, UsageError
from heliosfs.store import aws, cloud, remote
from heliosfs.store.objects import ObjectStore
from heliosfs.store.opening import open_objects
from tests.support.cloud_proxy import CloudProxy
from tests.support.cloud_servers import SECRET, Server, azurite, credentials, gcs, moto, some_prefix
from tests.support.engines import SMALL_PART, read, small_parts, staged

BIG = random.Random(2).randbytes(2 * SMALL_PART + 1_000_005)
"""Three parts."""
BIG_KEY = f"public/blobs/{hashlib.sha256(BIG).hexdigest()[:2]}/{hashlib.sha256(BIG).hexdigest()}"
PART_2 = {"s3": "partNumber=2", "az": "comp=block&", "gs": "partNumber=2"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[dict[str, Server]]:
    directory = tmp_path_factory.mktemp("servers")
    with moto(directory) as s3, azurite(directory) as azure, gcs(directory) as google:
        yield {"s3": s3, "az": azure, "gs": google}


@pytest.fixture(params=["s3 obstore", "s3 fsspec", "az obstore", "az fsspec", "gs obstore"])
def kind(request) -> tuple[str, str]:
    scheme, _, engine = request.param.partition(" ")
    return scheme, engine


@pytest.fixture
def server(servers, kind) -> Iterator[Server]:
    with credentials(servers[kind[0]]):
        yield servers[kind[0]]


@pytest.fixture
def proxy(server: Server) -> Iterator[CloudProxy]:
    with CloudProxy(server.url) as found:
        yield found


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)


@pytest.fixture
def store(server: Server, proxy: CloudProxy, kind, tmp_path: Path) -> Iterator[ObjectStore]:
    settings = server.settings(endpoint=proxy.url, prefix=some_prefix(), engine=kind[1])
    with open_objects(settings, tmp_path / "none", tmp_path / "staging") as opened:
        yield opened


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 500}, {"reset": True}], ids=["busy", "broken", "reset"])
def test_what_passes_is_tried_again(store: ObjectStore, proxy: CloudProxy, fault) -> None:
    for method in ("PUT", "HEAD", "GET", "DELETE"):
        proxy.fault("", method=method, times=1, **fault)
    store.put_bytes("public/a/1", b"one")
    assert store.info("public/a/1").size == 3
    assert read(store, "public/a/1") == b"one"
    assert [info.key for info in store.list("public/")] == ["public/a/1"]
    store.delete("public/a/1")
    with pytest.raises(NotFound):
        store.info("public/a/1")
    assert sum(fault.hits for fault in proxy.faults) >= 3


def test_a_write_whose_answer_is_lost(store: ObjectStore, proxy: CloudProxy) -> None:
    proxy.fault("public/a/1", method="PUT", lose_answer=True)
    store.put_bytes("public/a/1", b"one")
    assert read(store, "public/a/1") == b"one"


def test_a_read_that_breaks_off_goes_on(store: ObjectStore, proxy: CloudProxy) -> None:
    data = os.urandom(2 << 20)
    store.put_bytes("public/a/1", data)
    proxy.calm()
    proxy.fault("public/a/1", method="GET", truncate_at=700_000)
    assert read(store, "public/a/1") == data
    assert proxy.faults[0].hits == 1


@pytest.mark.parametrize("size", ["small", "large"])
def test_bytes_that_change_on_the_way_are_written_again(store: ObjectStore, proxy: CloudProxy, kind, size: str) -> None:
    """moto and Azurite believe whatever comes: reading back notices."""
    data, key = (BIG, BIG_KEY) if size == "large" else (b"0123456789", "public/a/1")
    fault = proxy.fault(PART_2[kind[0]] if size == "large" else key, method="PUT", flip_sent_at=5, times=1)
    store.put_file(key, staged(store, data))
    assert fault.hits == 1
    assert read(store, key) == data


def test_bytes_that_always_change_are_never_stored(store: ObjectStore, proxy: CloudProxy) -> None:
    proxy.fault("public/a/1", method="PUT", flip_sent_at=5, times=-1)
    path = staged(store, b"0123456789")
    with pytest.raises(IntegrityError, match="gave other bytes than were written"):
        store.put_file("public/a/1", path)
    assert path.exists()
    with pytest.raises(NotFound):
        store.info("public/a/1")


def test_an_upload_that_fails_leaves_nothing(store: ObjectStore, proxy: CloudProxy, kind, server: Server) -> None:
    proxy.fault(PART_2[kind[0]], method="PUT", status=403, times=-1)
    path = staged(store, BIG)
    with pytest.raises(Unavailable):
        store.put_file(BIG_KEY, path)
    assert path.exists()
    with pytest.raises(NotFound):
        store.info(BIG_KEY)
    assert list(store.list("public/")) == []
    if kind[0] == "s3":
        assert uploads(server, BIG_KEY) == []
    proxy.calm()
    store.put_file(BIG_KEY, path)
    assert read(store, BIG_KEY) == BIG


def test_a_service_that_is_silent_is_not_waited_for_long(
    server: Server, proxy: CloudProxy, kind, tmp_path: Path, monkeypatch
) -> None:
    from heliosfs.store import through_fsspec

    monkeypatch.setattr(cloud, "READ", {"connect_timeout": "1s", "read_timeout": "1s", "timeout": "5s"})
    monkeypatch.setattr(cloud, "READ_RETRIES_S", 1.0)
    monkeypatch.setattr(through_fsspec, "READ_S", 2.0)
    settings = server.settings(endpoint=proxy.url, prefix=some_prefix(), engine=kind[1])
    with open_objects(settings, tmp_path / "none", tmp_path / "staging") as store:
        store.put_bytes("public/a/1", b"one")
        proxy.fault("public/a/1", stall=True, times=-1)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            store.info("public/a/1")
        with pytest.raises(Unavailable):
            store.read_into("public/a/1", 0, memoryview(bytearray(3)))
        assert time.monotonic() - began < 20


def test_errors_say_what_is_wrong_and_no_secret(store: ObjectStore, proxy: CloudProxy, kind) -> None:
    body = f"<Error><Code>AccessDenied</Code><Message>Not you.</Message><StringToSign>{SECRET}</StringToSign></Error>"
    proxy.fault("", status=403, times=-1, body=body.encode())
    for call in (
        lambda: store.put_bytes("public/a/1", b"one"),
        lambda: store.read_into("public/a/1", 0, memoryview(bytearray(3))),
        lambda: list(store.list("public/")),
        lambda: store.delete("public/a/1"),
        lambda: store.check(),
        lambda: store.put_file(BIG_KEY, staged(store, BIG)),
    ):
        with pytest.raises(Unavailable) as raised:
            call()
        shown = f"{raised.value} {raised.value.__cause__ or ''}"
        assert store.describe() in shown
        assert SECRET not in shown
        assert "X-Amz-Sig" not in shown
        assert "sig=" not in shown
        assert raised.value.__suppress_context__


def test_a_killed_writer_is_cleaned_up_after(servers, tmp_path: Path) -> None:
    server = servers["s3"]
    prefix = some_prefix()
    script = """
import sys
from pathlib import Path
from helios.config import RegistrySettings, StoreOptions
from heliosfs.store.opening import open_objects
options = StoreOptions(endpoint=sys.argv[2], region="us-east-1")
store = open_objects(RegistrySettings(store=sys.argv[1], store_options=options), Path("x"), Path(sys.argv[3]))
path = store.staging() / "big"
path.write_bytes(bytes(40 << 20))
print("ready", flush=True)
store.put_file("public/blobs/big", path)
"""
    with credentials(server), CloudProxy(server.url) as proxy:
        proxy.fault("partNumber=2", method="PUT", stall=True, times=-1)
        command = [sys.executable, "-c", script, f"{server.store}/{prefix}", proxy.url, str(tmp_path / "staging")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        end = time.monotonic() + 30
        while not proxy.find("PUT", "partNumber=2"):
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(uploads(server, prefix)) == 1
        settings = server.settings(prefix=prefix)
        with open_objects(settings, tmp_path, tmp_path / "staging") as store:
            left = [path for path in (tmp_path / "staging").rglob("*") if path.is_file() and path.name != ".lock"]
            assert left == [], "its file is gone"
            # moto says of every upload that it was begun in 2010: how old one must be is shown below.
            with open_objects(server.settings(prefix=some_prefix()), tmp_path, tmp_path / "other") as other:
                assert other.tidy() == 0, "another store's uploads are not ours"
            assert store.tidy() == 1
            assert uploads(server, prefix) == []
            assert list(store.list("")) == []


def test_only_old_uploads_are_given_up() -> None:
    aborted = []
    ages = {"young": 10.0, "old": remote.INTERRUPTED_S + 10}

    class Client:
        """As much of S3's client as is used."""

        def get_paginator(self, call: str) -> Client:
            assert call == "list_multipart_uploads"
            return self

        def paginate(self, **kwargs: str) -> list[dict[str, object]]:
            assert kwargs == {"Bucket": "bucket", "Prefix": "a/"}
            now = datetime.now(UTC)
            found = [{"Key": key, "UploadId": key, "Initiated": now - timedelta(seconds=s)} for key, s in ages.items()]
            return [{}, {"Uploads": found}]

        def abort_multipart_upload(self, **kwargs: str) -> None:
            aborted.append(kwargs)

    assert aws.abandon(Client(), "bucket", "a/", remote.INTERRUPTED_S) == 1
    assert aborted == [{"Bucket": "bucket", "Key": "old", "UploadId": "old"}]


def test_credentials_come_from_the_usual_chain(servers, tmp_path: Path, monkeypatch) -> None:
    """From the environment in all other tests; here from a profile in a file; and what is said when there are none."""
    server = servers["s3"]
    with credentials(server):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(Unavailable, match="no credentials for S3 were found"):
            open_objects(server.settings(), tmp_path, tmp_path / "staging")
        (tmp_path / "credentials").write_text(
            "[work]\naws_access_key_id = AKIAPROFILE\naws_secret_access_key = secret\n"
        )
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_PROFILE", "work")
        with CloudProxy(server.url) as proxy:
            for engine in ("obstore", "fsspec"):
                settings = server.settings(endpoint=proxy.url, prefix=some_prefix(), engine=engine)
                with open_objects(settings, tmp_path, tmp_path / "staging") as store:
                    store.put_bytes("public/a/1", b"one")
            assert all("AKIAPROFILE" in seen.headers["authorization"] for seen in proxy.seen)
            assert any("x-amz-checksum-sha256" in seen.headers for seen in proxy.find("PUT"))


@pytest.mark.parametrize(
    "store", ["ftp://bucket/x", "s3://", "s3://Big", "s3://bucket/../x", "s3://bucket//x", "s3:/b"]
)
def test_addresses_that_are_none(tmp_path: Path, store: str) -> None:
    settings = RegistrySettings(store=store)
    if "://" not in store:
        assert settings.store_directory(tmp_path) == Path(store), "a directory of an odd name"
        return
    with pytest.raises(UsageError, match=r"registry\.store"):
        open_objects(settings, tmp_path, tmp_path / "staging")


def test_a_bucket_that_is_not_there(servers, kind, tmp_path: Path) -> None:
    server = servers[kind[0]]
    with credentials(server):
        options = server.settings().store_options
        settings = RegistrySettings(store=f"{server.store}none", store_engine=kind[1], store_options=options)
        with open_objects(settings, tmp_path, tmp_path / "staging") as store:
            for call in (store.check, lambda: store.put_bytes("public/a/1", b"")):
                with pytest.raises(HeliosError, match=rf"{server.store}none"):
                    call()


def uploads(server: Server, part: str) -> list[str]:
    client = botocore.session.Session().create_client("s3", endpoint_url=server.url, region_name="us-east-1")
    try:
        found = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        return [upload["Key"] for upload in found if part in upload["Key"]]
    finally:
        client.close()
