"""The Hub's own uploads to two registry processes behind a load balancer: each call may land on either of them."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.balancer import Balancer
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.kill_journal import block
from tests.support.registry import Registries, Running

ROOT = Path(__file__).resolve().parents[2]
SMALLER = """
import registry.hub.upload.parts as parts
parts.Parts.__init__.__kwdefaults__ |= {"least": 1_000_000, "part": 300_000}
from helios.cli.main import main
main()
"""
"""``helios`` with objects in parts from 1 MB on, where it is 4 GiB."""


@dataclass
class Site:
    """Processes of one registry."""

    start: Callable[[str], Running]
    running: list[Running] = field(default_factory=list)


@pytest.fixture
def site(helios: Any, helios_home: Any, tmp_path: Path, postgres_url: str) -> Iterator[Site]:
    def start(name: str) -> Running:
        settings = {"STORE": str(tmp_path / "store"), "DATABASE": postgres_url, "PROCESS_LEASE_S": "1.5"}
        environ = {f"HELIOS_REGISTRY__{key}": value for key, value in settings.items()}
        environ["HELIOS_HOME"] = str(helios_home.root / name)
        command = [sys.executable, "-c", SMALLER, "registry", "--port", "0", "--json"]

        def process(log: int) -> subprocess.Popen[str]:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environ}
            )

        (found,) = registries.start(process)
        return found

    with Registries(helios_home.root) as registries:
        yield Site(start)


def ask(registry: Running, method: str, path: str, data: bytes | dict[str, Any] | None = None) -> tuple[int, Any]:
    """One request to one process, whatever host the path names."""
    connection = http.client.HTTPConnection(urlsplit(registry.url).netloc, timeout=30)
    try:
        body = json.dumps(data).encode() if isinstance(data, dict) else data
        parts = urlsplit(path)
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), body)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text[:1] == b"{" else text
    finally:
        connection.close()


def batch(registry: Running, repo: str, data: bytes, *transfers: str) -> dict[str, Any]:
    oid = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    wanted = {"operation": "upload", "transfers": list(transfers), "objects": [oid]}
    status, answer = ask(registry, "POST", f"/{repo}.git/info/lfs/objects/batch", wanted)
    assert status == 200, answer
    found: dict[str, Any] = answer["objects"][0]
    return found


def commit(registry: Running, repo: str, data: bytes) -> tuple[int, Any]:
    value = {"path": "w.bin", "algo": "sha256", "oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": value}]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return ask(registry, "POST", f"/api/models/{repo}/commit/main", body)


def create(registry: Running, name: str) -> str:
    assert ask(registry, "POST", "/api/repos/create", {"name": name, "organization": "org"})[0] == 200
    return f"org/{name}"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_client_whose_calls_are_spread(site: Site, version: str, tmp_path: Path) -> None:
    """Over Xet where the client does that, then over LFS in parts."""
    for number, name in enumerate(("xet.bin", "lfs.bin")):
        (tmp_path / name).write_bytes(block(2_345_678, number))
    a, b = site.start("a"), site.start("b")
    with Balancer(a.url, b.url) as balancer:
        for name, disabled in (("xet.bin", "0"), ("lfs.bin", "1")):
            script = f"""
            api.create_repo("org/m", exist_ok=True)
            api.upload_file(path_or_fileobj={str(tmp_path / name)!r}, path_in_repo={name!r}, repo_id="org/m")
            found = Path(hf_hub_download("org/m", {name!r}))
            result = found.read_bytes() == Path({str(tmp_path / name)!r}).read_bytes()
            """
            env = {"HF_HUB_DISABLE_XET": disabled, "HF_TOKEN": "hf_x"}
            assert run_client(version, script, balancer.url, tmp_path / "hf", env=env)
        assert all(balancer.passed.values())
        parts = [[call for call in calls if "/part." in call] for calls in balancer.passed.values()]
        assert all(parts), "parts went to both"


def test_blobs_and_parts_and_the_commit_at_different_processes(site: Site) -> None:
    a, b = site.start("a"), site.start("b")
    repo = create(a, "m")
    small, large = block(50_000, 1), block(1_200_000, 2)
    upload = batch(a, repo, small, "basic")["actions"]
    assert ask(b, "PUT", upload["upload"]["href"], small)[0] == 200
    assert (
        ask(a, "POST", upload["verify"]["href"], {"oid": hashlib.sha256(small).hexdigest(), "size": 50_000})[0] == 200
    )
    assert commit(a, repo, small)[0] == 200
    parts = batch(a, repo, large, "basic", "multipart")["actions"]["upload"]
    for number in range(4):
        at = (a, b)[number % 2]
        assert (
            ask(at, "PUT", parts["header"][str(number + 1)], large[number * 300_000 : (number + 1) * 300_000])[0] == 200
        )
    wrong = ask(b, "PUT", parts["header"]["1"], large[:1000])
    assert wrong[0] == 400, "what is wrong with it is said as at the process itself"
    oid = {"oid": hashlib.sha256(large).hexdigest()}
    assert ask(b, "POST", parts["href"], oid)[0] == 200
    assert commit(b, repo, large)[0] == 200
    assert ask(a, "GET", f"/{repo}/resolve/main/w.bin") == (200, large)
    assert commit(a, repo, block(10, 3))[0] == 404, "what nobody uploaded can't be named"


def test_a_blob_outlives_the_process_that_took_it(site: Site, wait_for: Callable[..., None]) -> None:
    a, b = site.start("a"), site.start("b")
    repo = create(b, "m")
    data, lost = block(1_000_000 - 1, 4), block(1_200_000, 5)
    upload = batch(a, repo, data, "basic")["actions"]["upload"]
    assert ask(a, "PUT", upload["href"], data)[0] == 200
    parts = batch(a, repo, lost, "basic", "multipart")["actions"]["upload"]
    a.kill()

    def gone() -> bool:
        status, answer = ask(b, "PUT", parts["header"]["1"], lost[:300_000])
        assert status in (404, 503)
        return status == 404 and "start it again" in str(answer)

    wait_for(gone, 20, "its lease being over")  # and all that it held given up
    assert commit(b, repo, data)[0] == 200
    assert ask(b, "GET", f"/{repo}/resolve/main/w.bin") == (200, data)


def test_what_no_commit_comes_for_is_forgotten_by_whoever_is_left(
    site: Site, postgres_url: str, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    from registry.metadata.database import Database
    from registry.metadata.sharing_tables import uploads

    a, b = site.start("a"), site.start("b")
    repo = create(b, "m")
    data = block(900_000, 6)
    assert ask(a, "PUT", batch(a, repo, data, "basic")["actions"]["upload"]["href"], data)[0] == 200
    a.kill()
    stored = tmp_path / "store" / "public" / "blobs"
    assert list(stored.rglob(hashlib.sha256(data).hexdigest()))
    with contextlib.closing(Database.postgres(postgres_url)) as database, database.write() as connection:
        connection.execute(uploads.update().values(used=uploads.c.used - 3601))  # an hour later
    wait_for(lambda: not list(stored.rglob(hashlib.sha256(data).hexdigest())), 40, "its object going")
