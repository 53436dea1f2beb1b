"""LFS objects in parts, with the real clients; where parts begin is lowered from 4 GiB to 1 MB."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware

from helios.http.server import listen_tcp, make_server
from registry.access import Tenants
from registry.app import Boundary
from registry.hub.api import HubRoute
from registry.hub.gate import Gate
from registry.hub.reads import Reads
from registry.hub.upload.commits import Commits
from registry.hub.upload.lfs import Lfs
from registry.hub.upload.parts import Parts
from registry.hub.upload.pending import Pending
from registry.hub.upload.repos import Repos
from registry.hub.upload.spools import Spools
from registry.ingest.ingest import Ingest
from registry.processes import Processes
from registry.receiver import Receiver
from registry.sessions import Sessions
from registry.xet.tokens import Signer
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.xet_site import xet_parts

DATA = hashlib.shake_256(b"parts").digest(2_345_678)
SHA256 = hashlib.sha256(DATA).hexdigest()
PART = 300_000


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server in this process; yields its URL and the directory of the spools."""
    root = tmp_path_factory.mktemp("parts")
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(xet_parts(root / "parts"))
        sessions = Sessions(held.catalog, held.store, Ingest(held.store, held.catalog.index))
        sock = stack.enter_context(contextlib.closing(listen_tcp("127.0.0.1", 0)))
        servers = []

        async def serve() -> None:
            receiver, pending, spools, processes = (
                Receiver(),
                Pending(sessions),
                Spools(root / "spools"),
                Processes(held.catalog.database, held.catalog.member, Signer(b"k" * 32)),
            )
            parts = Parts(pending, receiver, spools, processes, held.catalog.quotas, least=1_000_000, part=PART)
            groups = [
                Reads(held.catalog, held.mirror, held.reader, held.service(), held.metrics, held.addresses()),
                Lfs(held.catalog, pending, receiver, processes.signer, parts),
                Commits(held.catalog, pending, receiver, spools.committed, Gate(held.mirror)),
                Repos(held.catalog, sessions, Gate(held.mirror)),
            ]
            hub = HubRoute(Tenants({}), [group.handlers() for group in groups])
            boundary = Middleware(Boundary, metrics=held.metrics)
            server = make_server(Starlette(routes=[hub], middleware=[boundary]))
            server.capture_signals = contextlib.nullcontext  # not the main thread
            servers.append(server)
            await server.serve(sockets=[sock])
            await receiver.aclose()
            await pending.aclose()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", root / "spools"
        servers[0].stop()
        thread.join(20)


def ask(site, method: str, path: str, data: bytes | dict | None = None):
    parts = urlsplit(site[0])
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        body = json.dumps(data).encode() if isinstance(data, dict) else data
        connection.request(method, path.removeprefix(site[0]), body)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text[:1] == b"{" else text, answer.headers
    finally:
        connection.close()


def batch(site, repo: str, transfers: list[str] | None = None) -> dict:
    wanted = {
        "operation": "upload",
        "transfers": transfers or ["basic", "multipart"],
        "objects": [{"oid": SHA256, "size": len(DATA)}],
    }
    ask(site, "POST", "/api/repos/create", {"name": repo, "organization": "org"})
    status, answer, _ = ask(site, "POST", f"/org/{repo}.git/info/lfs/objects/batch", wanted)
    assert status == 200, answer
    return answer


@pytest.mark.parametrize("version", VERSIONS)
def test_clients_send_parts(site, version, tmp_path):
    (tmp_path / "w.bin").write_bytes(DATA + version.encode())
    script = f"""
    from huggingface_hub import lfs
    sent = []
    real = lfs._upload_multi_part
    lfs._upload_multi_part = lambda *a, **k: (sent.append(k.get("chunk_size")), real(*a, **k))
    api.create_repo("org/v{version}")
    api.upload_file(path_or_fileobj={str(tmp_path / "w.bin")!r}, path_in_repo="w.bin", repo_id="org/v{version}")
    found = Path(hf_hub_download("org/v{version}", "w.bin"))
    result = [sent, found.read_bytes() == Path({str(tmp_path / "w.bin")!r}).read_bytes()]
    """
    result = run_client(version, script, site[0], tmp_path / "hf", env={"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_x"})
    assert result == [[PART], True]
    assert not list(site[1].rglob("*.part*")), "parts go when the object is made"


def test_parts_come_in_any_order_and_again(site):
    (found,) = batch(site, "order")["objects"]
    upload = found["actions"]["upload"]
    header = upload["header"]
    numbers = sorted(int(key) for key in header if key.isdigit())
    assert numbers == list(range(1, -(-len(DATA) // PART) + 1))
    pieces = {n: DATA[(n - 1) * PART : n * PART] for n in numbers}
    whole = {"oid": SHA256, "parts": [{"partNumber": n, "etag": "x"} for n in numbers]}
    for number in [*reversed(numbers), numbers[0]]:
        status, _, headers = ask(site, "PUT", header[str(number)], pieces[number])
        assert (status, headers["etag"]) == (200, f'"{number}"')
    assert ask(site, "POST", upload["href"], {"oid": "0" * 64})[0] == 400
    assert ask(site, "POST", upload["href"], whole)[0] == 200
    assert ask(site, "POST", upload["href"], whole)[0] == 200, "the answer may have got lost"
    assert ask(site, "POST", found["actions"]["verify"]["href"], {"oid": SHA256, "size": len(DATA)})[0] == 200
    assert "actions" not in batch(site, "order")["objects"][0]


def test_what_is_wrong_with_parts(site):
    answer = batch(site, "wrong")
    assert answer["transfer"] == "multipart"
    upload = answer["objects"][0]["actions"]["upload"]
    first, href = upload["header"]["1"], upload["href"]
    assert ask(site, "PUT", first, DATA[: PART - 1])[0] == 400
    assert ask(site, "PUT", first, DATA[: PART + 1])[0] == 400
    assert ask(site, "PUT", href, DATA)[0] == 401, "the address of the whole takes no bytes"
    assert ask(site, "POST", first, {"oid": SHA256})[0] == 401
    assert ask(site, "PUT", first.replace("/org/wrong", "/org/order"), DATA[:PART])[0] == 403
    status, error, _ = ask(site, "POST", href, {"oid": SHA256})
    assert (status, error["code"]) == (400, "InvalidInput")
    assert "part 1" in error["error"]
    numbers = sorted(int(key) for key in upload["header"] if key.isdigit())
    for number in numbers:
        piece = bytearray(DATA[(number - 1) * PART : number * PART])
        piece[0] ^= number == 3
        assert ask(site, "PUT", upload["header"][str(number)], bytes(piece))[0] == 200
    assert ask(site, "POST", href, {"oid": SHA256})[0] == 400, "it has another sha256"
    assert not list(site[1].rglob("*.part*"))
    assert batch(site, "wrong", ["basic"])["transfer"] == "basic"


def test_a_part_that_breaks_off_is_not_there(site):
    upload = batch(site, "broken")["objects"][0]["actions"]["upload"]
    parts = urlsplit(upload["header"]["1"])
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.putrequest("PUT", parts.path)
    connection.putheader("content-length", str(PART))
    connection.endheaders(DATA[: PART // 2])
    end = time.monotonic() + 20
    while not (files := [p for p in site[1].rglob("*.part0*") if p.stat().st_size]):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert not [p for p in files if p.name.endswith(".part0")]
    connection.close()
    while list(site[1].rglob("*.part0*")):
        assert time.monotonic() < end
        time.sleep(0.02)
