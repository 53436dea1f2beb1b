"""A registry on S3 with a front store: who has which bytes when, through kills, outages and disks that fail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from heliosfs.store.keys import blob_key
from tests.support.cloud_servers import Server, credentials, moto
from tests.support.cloud_site import FILES, LARGE, MIDDLE, CloudSite, cloud_site, running
from tests.support.disks import covered, fill_up, small_disk
from tests.support.hub_clients import run_client
from tests.support.hub_site import write

LARGE_URL = "/org/m/resolve/main/data/part%201%20(%C3%BC).bin"
LARGE_KEY = blob_key("public", hashlib.sha256(LARGE).hexdigest())


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@contextlib.contextmanager
def bucket(site: CloudSite, s3: Server) -> Iterator[Callable[[], dict[str, int]]]:
    """What lies in the bucket: key -> bytes."""
    import botocore.session

    with credentials(s3):
        client = botocore.session.Session().create_client("s3", endpoint_url=s3.url, region_name="us-east-1")

        def look() -> dict[str, int]:
            found = client.list_objects_v2(Bucket="bucket", Prefix=f"{site.prefix}/public/").get("Contents", [])
            return {entry["Key"].removeprefix(f"{site.prefix}/"): entry["Size"] for entry in found}

        yield look
        client.close()


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):  # type: ignore[no-untyped-def]
        return None


def ask(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One GET that follows no redirect."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def where(site: CloudSite, url: str = "") -> dict[str, Any]:
    return json.loads(ask(f"{url or site.url}/api/v1/where?repo=models/org/m&rev=main")[2])["levels"]


def metrics(url: str) -> dict[str, float]:
    lines = ask(f"{url}/metrics")[2].decode().splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("helios_registry_front_")
    }


def only_uploads(seen) -> bool:  # type: ignore[no-untyped-def]
    return seen.method in ("PUT", "POST") and "registry/owner" not in seen.path


def test_writes_count_before_the_cloud_has_them_and_survive_kill_9(tmp_path: Path, s3: Server) -> None:
    """The cloud takes nothing; pushes are acknowledged, read, and there after a kill; the cloud gets them later."""
    front = tmp_path / "front"
    with cloud_site(tmp_path, s3, front=front, front_writes="back") as site, bucket(site, s3) as look:
        until(lambda: metrics(site.url)["helios_registry_front_waiting"] == 0)
        assert where(site)["waiting"] == 0
        before = look().keys()
        site.proxy.fault(only_uploads, status=503, times=-1)
        new = {"big.bin": random.Random(9).randbytes(18 << 20), "config.json": b'{"x": 1}'}
        commit = site.helios("push", str(write(tmp_path / "next", new)), "org/m")
        key = blob_key("public", hashlib.sha256(new["big.bin"]).hexdigest())
        assert look().keys() == before, "nothing of it is in the cloud"
        levels = where(site)
        assert levels["front"] == levels["stored"]
        assert 18 << 20 < levels["waiting"] <= levels["stored"]
        out, _ = site.helios.both("where", "org/m")
        assert [line.split()[-1] for line in out.splitlines()[-2:]] == ["100%", "0%"], out
        assert ask(f"{site.url}/org/m/resolve/main/big.bin")[0] == 200, "and no redirect to where it is not"
        assert metrics(site.url)["helios_registry_front_waiting"] >= 3
        site.registry.kill()
        with running(site.helios, tmp_path / "again.log") as again:
            assert ask(f"{again.url}/org/m/resolve/{commit}/big.bin")[2] == new["big.bin"]
            assert where(site, again.url)["waiting"] == levels["waiting"]
            problems = metrics(again.url)
            assert look().keys() == before
            site.proxy.calm()
            until(lambda: metrics(again.url)["helios_registry_front_waiting"] == 0, 60)
            assert problems["helios_registry_front_waiting_bytes"] >= 18 << 20
            assert look()[key] == len(new["big.bin"])
            assert {k.split("/")[1] for k in look().keys() - before} >= {"blobs", "recipes", "manifests", "commits"}
            assert where(site, again.url)["waiting"] == 0
            assert ask(f"{again.url}/org/m/resolve/main/big.bin")[0] == 302, "from now on the cloud sends it"
        # The cloud alone has everything.
        wiped(site, front)
        del site.helios.env["HELIOS_REGISTRY__FRONT"]
        with running(site.helios, tmp_path / "alone.log") as alone:
            assert site.helios.both("store", "verify", "--registry", alone.url)[0].splitlines()[-1]
            assert ask(f"{alone.url}/org/m/resolve/main/config.json")[2] == new["config.json"]


def test_a_cloud_store_is_complete_and_keeps_every_version(tmp_path: Path, s3: Server) -> None:
    """Everything but the database goes; the bucket serves each revision that a ref ever named, and nothing in it was
    written twice."""
    versions = [{"config.json": b'{"version": %d}' % n, "big.bin": random.Random(n).randbytes(9 << 20)} for n in (1, 2)]
    with cloud_site(tmp_path, s3, front=tmp_path / "front") as site, bucket(site, s3) as look:
        commits = [site.commit]
        for number, files in enumerate(versions):
            commits.append(site.helios("push", str(write(tmp_path / f"v{number}", files)), "org/m"))
        there = look()
        # At once, or by the call that puts parts together.
        whole = [*site.proxy.find("PUT", "/public/"), *site.proxy.find("POST", "uploadId=")]
        made = [seen.path for seen in whole if seen.status < 300 and "partNumber" not in seen.query]
        site.registry.kill()
        for path in [*(site.helios.home / "registry").iterdir(), tmp_path / "front"]:
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("metadata.db"):
                path.unlink()
        with running(site.helios, tmp_path / "again.log") as again:
            found = json.loads(ask(f"{again.url}/api/v1/refs/history?repo=models/org/m&ref=main")[2])["moves"]
            assert [move["new"] for move in found] == commits[::-1]
            for commit, files in zip(commits, [FILES, *versions], strict=True):
                for path, data in files.items():
                    status, headers, body = ask(f"{again.url}/org/m/resolve/{commit}/{quote(path)}")
                    assert (body if status == 200 else ask(headers["location"])[2]) == data, (commit, path)
            assert site.helios.both("store", "verify", "--registry", again.url)[0].splitlines()[-1]
            assert look() == there
    assert {path.partition(f"{site.prefix}/")[2] for path in made} == set(there)
    assert len(made) == len(there), "each object was written once"


@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere_in_the_middle_of_write_back(tmp_path: Path, s3: Server, seed: int) -> None:
    """What was acknowledged is whole after the kill, and in the cloud some time later; nothing else is visible."""
    chance = random.Random(seed)
    front = tmp_path / "front"
    pushed: dict[str, bytes] = {}
    with cloud_site(tmp_path, s3, front=front, front_writes="back", front_limit_gib=0.03) as site:
        site.proxy.fault(only_uploads, status=503, times=4)

        def push() -> None:
            for number in range(20):
                data = random.Random(f"{seed} {number}").randbytes(chance.choice((10_000, 6 << 20)))
                directory = write(tmp_path / f"m{number}", {"a.bin": data})
                with site.helios.start("push", str(directory), f"org/k{number}", "--registry", site.url) as process:
                    process.communicate(timeout=60)
                if process.returncode:
                    return
                pushed[f"org/k{number}"] = data

        pusher = threading.Thread(target=push)
        pusher.start()
        time.sleep(chance.uniform(1.5, 4.0))
        site.registry.kill()
        pusher.join(120)
        site.proxy.calm()
        with running(site.helios, tmp_path / "again.log") as again, bucket(site, s3) as look:
            names = {
                row["repo"].removeprefix("models/") for row in json.loads(ask(f"{again.url}/api/v1/repos")[2])["repos"]
            }
            assert pushed.keys() | {"org/m"} <= names
            for repo, data in pushed.items():
                assert fetched(f"{again.url}/{repo}/resolve/main/a.bin") == data
            until(lambda: metrics(again.url)["helios_registry_front_waiting"] == 0, 60)
            for data in pushed.values():
                assert look()[blob_key("public", hashlib.sha256(data).hexdigest())] == len(data)
            assert metrics(again.url)["helios_registry_front_used_bytes"] <= 0.03 * (1 << 30)
            report = json.loads(site.helios("store", "verify", "--json", "--registry", again.url))
            assert (report["damaged"], report["stray_objects"]) == (0, 0), report


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


def test_what_is_read_often_comes_to_the_front(tmp_path: Path, s3: Server) -> None:
    """The front is too small for everything: what is asked for comes, whole and in the background; parts do not."""
    settings = {"front": tmp_path / "front", "front_limit_gib": 0.017, "redirect": "never"}
    with cloud_site(tmp_path, s3, **settings) as site:
        data = os.urandom(12 << 20)
        key = blob_key("public", hashlib.sha256(data).hexdigest())
        site.helios("push", str(write(tmp_path / "n", {"w": data})), "org/n")
        assert (tmp_path / "front" / key).exists(), "what is new is here"
        site.helios("push", str(write(tmp_path / "o", {"w": os.urandom(12 << 20)})), "org/o")
        assert not (tmp_path / "front" / key).exists(), "something newer took its place"
        url = f"{site.url}/org/n/resolve/main/w"
        site.proxy.calm()
        for _ in range(3):
            assert ask(url, Range="bytes=0-99999")[2] == data[:100_000]
        time.sleep(0.3)
        before = metrics(site.url)
        assert before["helios_registry_front_evictions_total"] >= 1
        assert not (tmp_path / "front" / key).exists(), "its beginning is no reason"
        for _ in range(2):
            assert ask(url)[2] == data
        until(lambda: (tmp_path / "front" / key).exists())
        brought = "helios_registry_front_brought_bytes_total"
        until(lambda: metrics(site.url)[brought] == before[brought] + len(data))
        site.proxy.calm()
        assert ask(url)[2] == data
        assert not site.proxy.find("GET", key), "from the disk"
        found = metrics(site.url)
        assert found["helios_registry_front_used_bytes"] <= 0.017 * (1 << 30)
        assert found['helios_registry_front_reads_total{level="front"}'] > 0
        assert found['helios_registry_front_reads_total{level="store"}'] > 0
        # Rot in the front: what clients get is right all the same, and the copy goes.
        path = tmp_path / "front" / key
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(1000)
            file.write(b"rotten")
        assert ask(url)[2] == data
        assert site.proxy.find("GET", key)
        assert not path.exists() or path.read_bytes() == data


def test_nodes_and_clients_are_redirected_for_what_is_not_in_front(tmp_path: Path, s3: Server) -> None:
    with cloud_site(tmp_path, s3, front=tmp_path / "front", redirect="absent") as site:
        blob = hashlib.sha256(LARGE).hexdigest()
        placement = f"{site.url}/api/v1/placements?repo=models/org/m&blob={blob}"
        status, _, body = ask(site.url + LARGE_URL)
        assert (status, body == LARGE) == (200, True)
        assert json.loads(ask(placement)[2])["objects"][0]["url"].startswith("/api/v1/objects/")
        assert site.direct() == []
        site.registry.kill()
        shutil.rmtree(tmp_path / "front")
        (site.helios.home / "registry/front.json").unlink()
        with running(site.helios, tmp_path / "again.log") as again:
            assert ask(again.url + LARGE_URL)[0] == 302
            at = json.loads(ask(placement.replace(site.url, again.url))[2])["objects"][0]
            assert at["url"].startswith(site.proxy.url)


def test_settings_that_would_lose_something_are_refused(tmp_path: Path, s3: Server) -> None:
    front = tmp_path / "front"
    with cloud_site(tmp_path, s3, front=front, front_writes="back") as site:
        until(lambda: metrics(site.url)["helios_registry_front_waiting"] == 0)
        site.proxy.fault(only_uploads, status=503, times=-1)
        site.helios("push", str(write(tmp_path / "next", {"a": os.urandom(1000)})), "org/next")
        site.registry.kill()
        helios = site.helios
        helios.env["HELIOS_REGISTRY__FRONT"] = ""
        assert f"{front} holds objects that are not in" in helios.both("registry", "--port", "0", code=2)[1]
        helios.env["HELIOS_REGISTRY__FRONT"] = str(tmp_path / "other")
        assert f"{front} holds objects that are not in" in helios.both("registry", "--port", "0", code=2)[1]
        helios.env["HELIOS_REGISTRY__FRONT"] = str(front)
        helios.env["HELIOS_REGISTRY__DATABASE"] = "postgresql://nobody@127.0.0.1:1/none"
        assert 'front_writes = "through"' in helios.both("registry", "--port", "0", code=2)[1]
        del helios.env["HELIOS_REGISTRY__DATABASE"]
        helios.env["HELIOS_REGISTRY__FRONT_MIN_FREE"] = "1.5"
        assert "front_min_free" in helios.both("registry", "--port", "0", code=2)[1]
        del helios.env["HELIOS_REGISTRY__FRONT_MIN_FREE"]
        # A missing disk: what is in the cloud is served, what is nowhere is not lost, and the disk brings it back.
        front.rename(tmp_path / "away")
        front.mkdir()
        with running(helios, tmp_path / "missing.log") as missing:
            assert ask(f"{missing.url}/org/m/resolve/main/middle.bin")[2] == MIDDLE
            status, _, body = ask(f"{missing.url}/org/next/resolve/main/a")
            assert status in (502, 503), body
            assert list(front.iterdir()) == [], "a mount point is not filled"
            assert metrics_of(missing.url, "helios_registry_store_problems") == 1
            front.rmdir()
            (tmp_path / "away").rename(front)
            until(lambda: metrics_of(missing.url, "helios_registry_store_problems") == 0 or
                  ask(f"{missing.url}/org/next/resolve/main/a")[0] == 200)  # fmt: skip
            assert ask(f"{missing.url}/org/next/resolve/main/a")[0] == 200
            site.proxy.calm()
            until(lambda: metrics(missing.url)["helios_registry_front_waiting"] == 0)
        helios.env["HELIOS_REGISTRY__FRONT"] = ""
        with running(helios, tmp_path / "without.log") as without:
            assert ask(f"{without.url}/org/next/resolve/main/a")[0] == 200
        helios.env["HELIOS_REGISTRY__FRONT"] = str(front)
        helios.env["HELIOS_REGISTRY__STORE"] = str(tmp_path / "store")
        assert "registry.front is for a store in the cloud" in helios.both("registry", "--port", "0", code=2)[1]


def metrics_of(url: str, name: str) -> float:
    lines = ask(f"{url}/metrics")[2].decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


@pytest.mark.parametrize("writes", ["back", "through"])
def test_a_disk_that_is_full_or_read_only_stops_nothing(tmp_path: Path, s3: Server, writes: str) -> None:
    with (
        small_disk(tmp_path / "disk", 30) as disk,
        cloud_site(tmp_path, s3, front=disk / "front", front_writes=writes) as site,
    ):
        until(lambda: metrics(site.url)["helios_registry_front_waiting"] == 0)
        fill_up(disk)
        big = os.urandom(6 << 20)
        site.helios("push", str(write(tmp_path / "big", {"a": big})), "org/big")
        assert fetched(f"{site.url}/org/big/resolve/main/a") == big
        for path, data in FILES.items():
            assert fetched(f"{site.url}/org/m/resolve/main/{quote(path)}") == data
        until(lambda: metrics(site.url)["helios_registry_front_waiting"] == 0)
        (disk / "others").unlink()
        with covered(disk / "front"):
            more = os.urandom(300_000)
            site.helios("push", str(write(tmp_path / "more", {"a": more})), "org/more")
            assert fetched(f"{site.url}/org/more/resolve/main/a") == more
            site.helios("rm", "--yes", "org/big")
            assert metrics_of(site.url, "helios_registry_store_problems") == 1
            assert fetched(f"{site.url}/org/m/resolve/main/config.json") == FILES["config.json"]
        until(lambda: metrics_of(site.url, "helios_registry_store_problems") == 0)
        again = os.urandom(300_000)
        site.helios("push", str(write(tmp_path / "again", {"a": again})), "org/again")
        key = blob_key("public", hashlib.sha256(again).hexdigest())
        assert (disk / "front" / key).read_bytes() == again


def wiped(site: CloudSite, front: Path) -> None:
    """The front's disk is lost; what the cloud had by then is all there is."""
    shutil.rmtree(front)
    (site.helios.home / "registry/front.json").unlink()


def drained(url: str) -> None:
    until(lambda: metrics(url)["helios_registry_front_waiting"] == 0, 60)


def test_replication_between_fronts_whose_clouds_take_nothing(tmp_path: Path, s3: Server) -> None:
    """A peer gives out what waits in its front, and what arrives waits here; later the cloud alone has it all."""
    front = tmp_path / "edge-front"
    back = {"front_writes": "back", "redirect": "never"}
    for name in ("core", "edge"):
        (tmp_path / name).mkdir()
    with cloud_site(tmp_path / "core", s3, front=tmp_path / "core-front", **back) as core:
        peers = json.dumps([{"name": "core", "url": core.url, "repos": ["net/*"], "history": True}])
        with cloud_site(tmp_path / "edge", s3, front=front, peers=peers, **back) as edge:
            for site in (core, edge):
                drained(site.url)
                site.proxy.fault(only_uploads, status=503, times=-1)

            def replicate() -> tuple[int, int]:
                done = json.loads(edge.helios("replicate", "core", "--registry", edge.url, "--json"))
                assert done["problems"] == []
                return done["commits"], done["travelled_bytes"]

            first = random.Random(21).randbytes(24 << 20)
            second = first[: 8 << 20] + random.Random(22).randbytes(4 << 20) + first[12 << 20 :]
            core.helios("push", str(write(tmp_path / "n", {"w.bin": first})), "net/m")
            assert replicate() == (1, len(first))
            core.helios("push", str(write(tmp_path / "n", {"w.bin": second})), "net/m")
            assert replicate() == (1, 4 << 20), "of the rest the front has the chunks"
            assert metrics(core.url)["helios_registry_front_waiting_bytes"] > len(first)
            assert metrics(edge.url)["helios_registry_front_waiting_bytes"] > len(first)
            edge.registry.kill()
            with running(edge.helios, tmp_path / "again.log") as again:
                assert fetched(f"{again.url}/net/m/resolve/main/w.bin") == second
                edge.proxy.calm()
                drained(again.url)
            wiped(edge, front)
            with running(edge.helios, tmp_path / "wiped.log") as alone:
                assert fetched(f"{alone.url}/net/m/resolve/main/w.bin") == second
                report = json.loads(edge.helios("store", "verify", "--json", "--registry", alone.url))
                assert (report["damaged"], report["stray_objects"]) == (0, 0), report


def test_files_over_xet_come_into_and_out_of_the_front(tmp_path: Path, s3: Server) -> None:
    """hf-xet uploads while the cloud takes nothing, and downloads from the front, after a kill, and from the cloud."""
    front = tmp_path / "front"
    data = random.Random(31).randbytes(9 << 20)
    upload = f"""
        Path("w.onnx").write_bytes(__import__("random").Random(31).randbytes({len(data)}))
        api.create_repo("org/x")
        result = api.upload_file(path_or_fileobj="w.onnx", path_in_repo="w.onnx", repo_id="org/x").oid
    """
    download = """
        from huggingface_hub import constants
        constants.MAX_HTTP_DOWNLOAD_SIZE = 1_000_000
        result = tree(snapshot_download("org/x"))["w.onnx"]
    """

    def client(url: str, script: str, name: str) -> str:
        (tmp_path / name).mkdir()
        script = f"os.chdir({str(tmp_path / name)!r})\n" + textwrap.dedent(script)
        return str(run_client("2.4.0", script, url, tmp_path / name / "hf"))

    settings = {"front_writes": "back", "xet_min_gib": 0}
    with cloud_site(tmp_path, s3, front=front, **settings) as site, bucket(site, s3) as look:
        until(lambda: layouts(site.url) == 2)
        drained(site.url)
        before = look().keys()
        site.proxy.fault(only_uploads, status=503, times=-1)
        commit = client(site.url, upload, "up")
        until(lambda: layouts(site.url) == 3)
        assert client(site.url, download, "down") == hashlib.sha256(data).hexdigest()
        assert metrics_of(site.url, "helios_registry_xorb_bytes_total") >= len(data)
        assert look().keys() == before, "nothing of it is in the cloud"
        site.registry.kill()
        with running(site.helios, tmp_path / "again.log") as again:
            assert client(again.url, download, "again") == hashlib.sha256(data).hexdigest()
            site.proxy.calm()
            drained(again.url)
            assert {key.split("/")[1] for key in look().keys() - before} >= {"blobs", "xet", "commits"}
        wiped(site, front)
        with running(site.helios, tmp_path / "wiped.log") as alone:
            site.proxy.calm()
            assert client(alone.url, download, "alone") == hashlib.sha256(data).hexdigest()
            assert site.proxy.find("GET", hashlib.sha256(data).hexdigest()), "from the cloud"
            assert json.loads(ask(f"{alone.url}/api/models/org/x/refs")[2])["branches"][0]["targetCommit"] == commit


def layouts(url: str) -> float:
    lines = ask(f"{url}/metrics")[2].decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if 'xet_layouts_total{result="made"}' in line)
