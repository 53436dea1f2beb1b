"""Replication and bundles from somebody who means harm: nothing of his is stored under a name that it does not have, or
outside the store; he gets no memory, and no request of ours to places that only we reach."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helios.errors import DeadlineExceeded, NotFound
from helios.names import RepoId
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest
from heliosfs.store.recipe import Recipe
from registry.transfer import bundle
from registry.transfer.peer import Peer
from tests.support.command import Command
from tests.support.front import Asked, Front, Strike, nothing
from tests.support.hub_site import write
from tests.support.ingest import seeded
from tests.support.registry import Running, running_registry

MIB = 1 << 20
MEMORY = 400 * MIB
"""What a hostile answer may cost at most: the longest manifest, decoded."""
REPO = RepoId.parse("org/m")


@dataclasses.dataclass
class Scene:
    """The edge takes from the core through a front that lies."""

    core: Running
    edge: Running
    front: Front
    helios: Command
    root: Path
    commit: str

    def replicate(self) -> dict[str, Any]:
        """How a replication ends: its last event."""
        client = self.edge.client(self.edge.socket)
        try:
            body = msgspec.json.encode({"peer": "core"})
            with client.http.request("POST", "/api/v1/replications", body=body, timeout_s=120) as answer:
                assert answer.status == 200
                return json.loads([line for line in answer.lines() if line][-1])
        finally:
            client.close()

    def here(self) -> list[str]:
        client = self.edge.client(self.edge.socket)
        try:
            return [found.repo for found in client.repos()]
        finally:
            client.close()

    def rss(self) -> int:
        text = Path(f"/proc/{self.edge.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))) * 1024

    def native(self, path: str, **params: str) -> bytes:
        client = self.core.client()
        try:
            return client.http.bytes("GET", f"/api/v1/{path}", params={"repo": str(REPO), **params})
        finally:
            client.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("hostile")
    with contextlib.ExitStack() as stack:
        core = stack.enter_context(running_registry(Command(root / "core", HELIOS_REGISTRY__OFFLINE="true")))
        front = stack.enter_context(Front(core.url))
        settings = {"PEERS": json.dumps([{"name": "core", "url": front.url}]), "OFFLINE": "true"}
        edge = Command(root / "edge", **{f"HELIOS_REGISTRY__{k}": v for k, v in settings.items()})
        edge.env["HELIOS_LOG__FORMAT"] = "json"
        running = stack.enter_context(running_registry(edge))
        files = write(root / "m", {"config.json": b"{}", "model.bin": seeded(9 * MIB, 1)})
        push = Command(root / "home", HELIOS_REGISTRY__URLS=core.url)
        yield Scene(core, running, front, edge, root, push("push", str(files), "org/m"))


@pytest.fixture
def refused(scene: Scene) -> Iterator[Callable[[], str]]:
    """Replicate and say why nothing came; afterwards nothing is there that was not before, nor outside the store."""
    outside = sorted(path for path in scene.root.iterdir())
    before = scene.rss()

    def run() -> str:
        last = scene.replicate()
        assert last.get("commits", 0) == 0, last
        return json.dumps(last)

    yield run
    scene.front.plan = nothing
    assert scene.here() == []
    assert sorted(path for path in scene.root.iterdir()) == outside
    assert not list((scene.root / "edge" / "store").glob("**/evil*"))
    assert scene.rss() - before < MEMORY


def lies(part: str, change: Callable[[Any], Any]) -> Callable[[Asked], Strike | None]:
    """A plan: what JSON an answer holds is changed."""

    def changed(body: bytes) -> bytes:
        return msgspec.json.encode(change(msgspec.json.decode(body)))

    return lambda asked: Strike("changed", change=changed) if part in asked.path else None


def instead(data: bytes) -> Strike:
    return Strike("instead", change=lambda _: data)


def told(**values: Any) -> Callable[[Asked], Strike | None]:
    """The commit's record says something else."""
    return lies("/commits", lambda body: {"commits": [body["commits"][0] | values]})


LISTINGS = {
    "a name that leaves": lambda body: {"repos": [body["repos"][0] | {"repo": "models/../../evil"}]},
    "another kind": lambda body: {"repos": [body["repos"][0] | {"repo": "evil/org/m"}]},
    "a ref that leaves": lambda body: {"repos": [body["repos"][0] | {"refs": {"../../evil": "0" * 40}}]},
    "a commit that is none": lambda body: {"repos": [body["repos"][0] | {"refs": {"main": "../../evil"}}]},
    "a commit that it has not": lambda body: {"repos": [body["repos"][0] | {"refs": {"main": "0" * 40}}]},
    "a thousand bad refs": lambda body: {"repos": [body["repos"][0] | {"refs": {f"-{n}": "x" for n in range(5000)}}]},
    "a kind that no ref is of": lambda body: {"repos": [body["repos"][0] | {"kinds": {"main": "evil" * 1000}}]},
    "nonsense": lambda body: {"repos": [7]},
    "another form": lambda body: [body],
}


@pytest.mark.parametrize("what", LISTINGS)
def test_lists_that_lie(scene: Scene, refused: Callable[[], str], what: str) -> None:
    scene.front.plan = lies("/api/v1/repos", LISTINGS[what])
    assert len(refused()) < 1 << 20


@pytest.mark.parametrize(
    "values",
    [
        {"time": 2**63}, {"time": -1}, {"time": 2**200}, {"repo": "models/other/m"}, {"commit": "0" * 40},
        {"parent": "../evil"}, {"parent": "0" * 39}, {"manifest": "../evil"}, {"manifest": "0" * 64},
        {"message": "x" * (2 * MIB)}, {"lineage": {"x": "y" * (2 * MIB)}}, {"lineage": {"x": 1}}, {"author": 7},
    ],
    ids=lambda values: str(values)[:40],
)  # fmt: skip
def test_records_that_lie(scene: Scene, refused: Callable[[], str], values: dict[str, Any]) -> None:
    scene.front.plan = told(**values)
    refused()


@pytest.mark.parametrize(
    "values",
    [{"commit": "../evil"}, {"state": "evil"}, {"message": "a\nb"}, {"message": "x" * (2 * MIB)}, {"time": 2**70}],
    ids=lambda values: str(values)[:40],
)
def test_notices_that_lie(scene: Scene, refused: Callable[[], str], values: dict[str, Any]) -> None:
    notice = {"commit": "", "state": "retired", "message": "x", "replacement": None, "author": "", "time": 1}
    scene.front.plan = lies("/notices", lambda body: {"notices": [notice | values]})
    assert len(json.loads(refused())["problems"]) == 1


def entry(data: bytes, **changes: Any) -> FileEntry:
    sha256 = hashlib.sha256(data).hexdigest()
    made = FileEntry(sha256, len(data), hashlib.sha1(b"x").hexdigest(), hashlib.sha256(b"recipe").hexdigest(), lfs=True)
    return msgspec.structs.replace(made, **changes)


def record_of(files: dict[str, FileEntry]) -> bytes:
    """A manifest that a careless encoder would write."""
    return Manifest(files).encode()


def many(count: int) -> bytes:
    """A manifest of so many files of one byte."""
    one = json.dumps(msgspec.to_builtins(entry(b"x")), sort_keys=True, separators=(",", ":")).encode()
    return b'helios-manifest 1\n{"files":{' + b",".join(b'"%07d":%b' % (n, one) for n in range(count)) + b"}}"


MANIFESTS = {
    "a path that leaves": lambda: record_of({"../evil": entry(b"x")}),
    "an absolute path": lambda: record_of({"/evil": entry(b"x")}),
    "a path with NUL": lambda: record_of({"evil\0": entry(b"x")}),
    "a file that is a directory": lambda: record_of({"a": entry(b"x"), "a/evil": entry(b"x")}),
    "a blob that is no hash": lambda: record_of({"a": entry(b"x", sha256="../../evil".ljust(64, "0"))}),
    "a recipe that is no hash": lambda: record_of({"a": entry(b"x", recipe="../../evil".ljust(64, "0"))}),
    "a size near 2**63": lambda: record_of({"a": entry(b"x", size=2**63 - 1)}),
    "a size beyond": lambda: record_of({"a": entry(b"x", size=2**64)}),
    "a negative size": lambda: record_of({"a": entry(b"x", size=-1)}),
    "a million files": lambda: many(1_000_000),
    "as many as fit": lambda: many(100_000),
    "very many directories": lambda: record_of({"/".join("abcdefgh") * 20 + f"/{n}": entry(b"x") for n in range(9000)}),
    "no manifest": lambda: b"helios-manifest 1\n[]",
    "nested": lambda: b"helios-manifest 1\n" + b'{"files":' * 100_000,
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifests_that_lie(scene: Scene, refused: Callable[[], str], what: str) -> None:
    """Each has the digest that the commit names: the peer is consistent in its lies."""
    data = MANIFESTS[what]()
    record = told(manifest=hashlib.sha256(data).hexdigest())

    def plan(asked: Asked) -> Strike | None:
        return instead(data) if "/manifest" in asked.path else record(asked)

    scene.front.plan = plan
    refused()


def with_recipe(scene: Scene, data: bytes, **changes: Any) -> Callable[[Asked], Strike | None]:
    """One file, whose recipe is this record, consistently announced."""
    manifest = record_of({"evil.bin": entry(b"", recipe=hashlib.sha256(data).hexdigest(), **changes)})
    record = told(manifest=hashlib.sha256(manifest).hexdigest())

    def plan(asked: Asked) -> Strike | None:
        if "/manifest" in asked.path:
            return instead(manifest)
        return instead(data) if "/recipe" in asked.path else record(asked)

    return plan


def test_recipes_that_lie(scene: Scene, refused: Callable[[], str]) -> None:
    good = scene.native("recipe", blob=hashlib.sha256(seeded(9 * MIB, 1)).hexdigest())
    recipe = Recipe.decode(good)
    other = hashlib.sha256(b"another blob").hexdigest()
    cases = {
        "of another blob": (good, {"sha256": other, "size": recipe.size}),
        "of another size": (good, {"sha256": recipe.blob, "size": recipe.size + 1}),
        "cut short": (good[:-1], {"sha256": recipe.blob, "size": recipe.size}),
        "an empty chunk": (good[:-4] + b"\0\0\0\0", {"sha256": recipe.blob, "size": recipe.size}),
        "more chunks than bytes": (
            good[:44] + b"\xff\xff\xff\xff" + good[48:],
            {"sha256": recipe.blob, "size": recipe.size},
        ),
        "one that is too long": (bytes(70 * MIB), {"sha256": recipe.blob, "size": 2**62}),
    }
    for what, (data, changes) in cases.items():
        scene.front.plan = with_recipe(scene, data, **changes)
        assert ("bytes, more than" if "too long" in what else "recipe") in refused(), what


def test_a_blob_that_does_not_hash_to_its_name(scene: Scene, refused: Callable[[], str]) -> None:
    """A good recipe and good chunks, under the name of another blob: only the whole shows it."""
    data = seeded(9 * MIB, 1)
    recipe = Recipe.decode(scene.native("recipe", blob=hashlib.sha256(data).hexdigest()))
    other = hashlib.sha256(b"another blob").hexdigest()
    forged = Recipe(other, recipe.ids, recipe.ends).encode()
    placement = msgspec.json.decode(scene.native("placements", blob=recipe.blob)) | {"blob": other}
    recipes = with_recipe(scene, forged, sha256=other, size=recipe.size)

    def plan(asked: Asked) -> Strike | None:
        if "/placements" in asked.path:
            return instead(msgspec.json.encode(placement))
        return recipes(asked)

    scene.front.plan = plan
    assert "sha256" in refused()
    client = scene.edge.client(scene.edge.socket)
    with pytest.raises(NotFound):
        client.http.bytes("GET", f"/api/v1/objects/public/blobs/{other[:2]}/{other}")
    client.close()


class Trap:
    """A service on this machine that nobody should be led to: it counts who comes."""

    def __enter__(self) -> Trap:
        self._listener = socket.create_server(("127.0.0.2", 0))
        self.asked: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.2:{self._listener.getsockname()[1]}/secret"

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.settimeout(5)
            with client, contextlib.suppress(OSError):
                self.asked.append(client.recv(65536))
                client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret")

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


ELSEWHERE = {
    "file:///etc/passwd": "is not an address",
    "http://169.254.169.254/latest/meta-data/": "",
    "http://[fe80::1]/": "",
    "http:///secret": "is not an address",
    "http://host:99999999/": "is not an address",
    "http://[::1/": "is not an address",
    "gopher://127.0.0.1/": "is not an address",
    "/api/v1/objects/../../../etc/passwd": "",
    "//169.254.169.254/latest": "",
    "http://x/\r\nx: y": "is not an address",
}


def placed_at(url: str) -> Callable[[Asked], Strike | None]:
    return lies("/placements", lambda body: body | {"objects": [at | {"url": url} for at in body["objects"]]})


@pytest.mark.parametrize("url", ELSEWHERE)
def test_placements_that_lead_elsewhere(scene: Scene, refused: Callable[[], str], url: str) -> None:
    scene.front.plan = placed_at(url)
    assert ELSEWHERE[url] in refused()


def test_a_peer_on_this_machine_may_lead_around_on_it(scene: Scene, refused: Callable[[], str]) -> None:
    """And what answers there is still no chunk."""
    with Trap() as trap:
        scene.front.plan = placed_at(trap.url)
        assert "an object" in refused()
        assert trap.asked
        assert all(b"authorization" not in request.lower() for request in trap.asked)


def test_bodies_without_end_and_bombs(scene: Scene, refused: Callable[[], str]) -> None:
    bomb = gzip.compress(bytes(64 * MIB))
    for part in ("/api/v1/repos", "/commits", "/manifest", "/recipe", "/placements"):
        for strike in (Strike("endless"), instead(bomb)):
            scene.front.plan = lambda asked, part=part, strike=strike: strike if part in asked.path else None
            refused()


def test_an_answer_that_drips_ends_at_its_deadline(scene: Scene, refused: Callable[[], str]) -> None:
    """What comes byte by byte has no more time than what comes at once: 30 s here, cut short for the test."""
    client = Peer(scene.front.url, timeout_s=1)
    scene.front.plan = lambda asked: Strike("trickle")
    before = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.repos()
    assert time.monotonic() - before < 10
    client.close()
    scene.front.plan = nothing
    scene.front.plan = lies("/api/v1/repos", lambda body: {"repos": []})
    refused()


def test_what_is_honest_comes_after_all(scene: Scene) -> None:
    """The last test of the module: nothing of the above has left anything in the way."""
    assert scene.replicate()["commits"] == 1
    assert scene.here() == [str(REPO)]
    client = scene.edge.client(scene.edge.socket)
    assert client.http.bytes("GET", "/org/m/resolve/main/model.bin") == seeded(9 * MIB, 1)
    client.close()


def test_bundles_that_lie(scene: Scene, tmp_path: Path) -> None:
    """A bundle is a tar archive: its names choose nothing here."""

    def packed(*members: tuple[str, bytes | None, int | None]) -> bytes:
        out = bytearray()
        for name, data, size in members:
            info = tarfile.TarInfo(name)
            info.size = len(data or b"") if size is None else size
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            out += info.tobuf(tarfile.GNU_FORMAT) + (data or b"") + b"\0" * (-len(data or b"") % 512)
        return bytes(out) + bytes(1024)

    record = CommitRecord("models/org/m", "0" * 40, "0" * 64, "", 0)

    def head(**values: Any) -> bytes:
        piece = {"repo": "models/org/m", "commit": "0" * 40, "refs": ["main"]} | values
        return msgspec.json.encode({"commits": [piece], "format": 1})

    commit = ("commits/0", record.encode(), None)
    cases = [
        packed(("../../evil", b"x", None)), packed(("/evil", b"x", None)), packed((bundle.HEAD, None, None)),
        packed((bundle.HEAD, b"", 2**40)), packed((bundle.HEAD, head(), None), ("../evil", b"x", None)),
        packed((bundle.HEAD, head(repo="models/../evil"), None), commit),
        packed((bundle.HEAD, head(refs=["../evil"]), None), commit),
        packed((bundle.HEAD, head(commit="../evil"), None), commit),
        packed((bundle.HEAD, head(), None), commit, ("manifests/0", b"", 2**40)),
        packed((bundle.HEAD, head(), None), commit, ("manifests/0", record_of({"../evil": entry(b"x")}), None)),
        packed((bundle.HEAD, b"[" * 1_000_000, None)), b"", b"\xff" * 5000, os.urandom(5000),
    ]  # fmt: skip
    before, names = scene.rss(), scene.here()
    client = scene.edge.client(scene.edge.socket)
    for data in cases:
        with client.http.request("POST", "/api/v1/bundles", body=data) as answer:
            assert answer.status == 400, answer.read()
            assert json.loads(answer.read())["error"]["message"]
    client.close()
    assert scene.here() == names
    assert scene.rss() - before < MEMORY
