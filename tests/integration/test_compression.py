"""A model that nobody has read for a while is compressed; then it is read and copied in every way there is.

Everything is real: registries, the Hub's clients, hf-xet, a mount, the client library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import heliosfs.client
from helios.errors import Conflict, HeliosError
from helios.home import Home
from tests.support.command import Command
from tests.support.hub_clients import run_client
from tests.support.mounts import MODES, mounted, write
from tests.support.postgres import Databases
from tests.support.registry import Running, running_registry
from tests.support.weights import model, numbers

pytestmark = pytest.mark.both_databases

MIB = 1 << 20
AT_ONCE = {
    "HELIOS_REGISTRY__GC_GRACE_S": "0.5",
    "HELIOS_REGISTRY__GC_EVERY_S": "0",
    "HELIOS_REGISTRY__LEASE_S": "1",
    "HELIOS_REGISTRY__RECOMPRESS_AFTER_S": "0",
    "HELIOS_REGISTRY__RECOMPRESS_MB_S": "0",
    "HELIOS_REGISTRY__XET_MIN_GIB": "0.01",
}
BASE = model(
    {
        "embed": ("BF16", numbers("BF16", 5 * MIB, 1)),
        "layer": ("BF16", numbers("BF16", 5 * MIB, 2)),
        "head": ("F32", numbers("F32", MIB, 3)),
        "quantised": ("I8", numbers("I8", 3 * MIB, 4)),
    }
)
TUNED = model(
    {
        "embed": ("BF16", numbers("BF16", 5 * MIB, 1)),
        "layer": ("BF16", numbers("BF16", 5 * MIB, 5)),
        "head": ("F32", numbers("F32", MIB, 3)),
        "quantised": ("I8", numbers("I8", 3 * MIB, 4)),
    }
)
FILES = {
    "model.safetensors": BASE,
    "tokenizer.json": json.dumps({f"token {n}": n * 7 for n in range(80_000)}).encode(),
    "config.json": b"{}",
}
HASHES = {path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()}


@dataclass
class Site:
    registry: Running
    helios: Command
    before: dict[str, Any]
    """What ``helios usage`` said before."""
    plan: dict[str, Any]
    done: dict[str, Any]

    @property
    def objects(self) -> dict[str, int]:
        store = self.helios.home / "store" / "public"
        return {str(p.relative_to(store)): p.stat().st_size for p in store.rglob("*") if p.is_file()}

    def call(self, *args: str) -> Any:
        return json.loads(self.helios(*args, "--registry", self.registry.url, "--json"))


def metric(registry: Running, name: str) -> float:
    with urllib.request.urlopen(f"{registry.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Iterator[Site]:
    """Compressed, and the old objects are gone."""
    root = tmp_path_factory.mktemp("compressed")
    helios = Command(root / "home", **AT_ONCE, **databases())
    with running_registry(helios) as registry:
        found = Site(registry, helios, {}, {}, {})
        helios("push", str(write(root / "base", FILES)), "org/base", "--registry", registry.url)
        helios(
            "push", str(write(root / "tuned", {"model.safetensors": TUNED})), "org/tuned", "--registry", registry.url
        )
        deadline = time.monotonic() + 60
        while metric(registry, "helios_registry_xet_layouts_total") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        found.before = found.call("usage")
        found.plan = found.call("store", "compress", "--unread-for", "0", "--dry-run")
        found.done = found.call("store", "compress", "--unread-for", "0")
        time.sleep(1.6)
        found.call("gc")
        yield found


def test_it_takes_less_room_and_the_report_says_so(site: Site) -> None:
    done, plan = site.done, site.plan
    assert (done["problems"], done["compressed"]) == ([], plan["compressed"])
    assert done["compressed"] == 3, "two models' objects, and the tokenizer"
    assert abs(plan["after"] - done["after"]) < 0.03 * done["before"]
    saved = {name: 1 - part["after"] / part["before"] for name, part in done["by_type"].items()}
    assert saved["BF16"] > 0.3
    assert saved["F32"] > 0.12
    assert saved["I8"] == 0
    now = site.call("usage")
    assert now["total"]["logical"] == site.before["total"]["logical"]
    freed = site.before["total"]["stored"] - now["total"]["stored"]
    assert abs(freed - (done["before"] - done["after"])) < 0.01 * done["before"]
    for row in now["repos"]:
        assert row["stored"] < row["unique"]
    stored = sum(size for key, size in site.objects.items() if not key.startswith(("manifests", "commits", "registry")))
    assert abs(stored - now["total"]["stored"]) < 100, "what is accounted for is what is there"
    assert not [key for key, size in site.objects.items() if key.startswith("blobs/") and size > MIB]
    assert site.call("store", "verify")["damaged"] == 0


def test_the_command_tells_people(site: Site) -> None:
    out = site.helios("store", "compress", "org/base", "--unread-for", "0", "--registry", site.registry.url)
    assert "0 of 1 cold objects" in out, "the pack with the quantised weights"
    assert "1 that would save too little" in out
    again = site.helios("store", "compress", "--unread-for", "0", "--registry", site.registry.url)
    assert "0 of 0 cold objects" in again, "that is remembered"
    assert site.call("store", "compress")["objects"] == 0, "nothing is cold after 30 days"


@pytest.mark.one_database
@pytest.mark.parametrize("version", ["0.36.2", "2.4.0"])
def test_the_hubs_clients_get_the_same_bytes(site: Site, version: str, tmp_path: Path) -> None:
    env = {"HF_HUB_DISABLE_XET": "1"}
    script = "result = tree(snapshot_download('org/base'))"
    assert run_client(version, script, site.registry.url, tmp_path, env=env) == HASHES


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (len(BASE) - 1, len(BASE)), (4 * MIB - 7, 13 * MIB + 3), (0, len(BASE))]
)
def test_ranges_are_of_the_file(site: Site, start: int, stop: int) -> None:
    request = urllib.request.Request(
        f"{site.registry.url}/org/base/resolve/main/model.safetensors", headers={"range": f"bytes={start}-{stop - 1}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 206
        assert answer.read() == BASE[start:stop]


def test_it_comes_over_xet(site: Site, tmp_path: Path) -> None:
    before = metric(site.registry, "helios_registry_xorb_bytes_total")
    script = """
    from huggingface_hub import constants
    constants.MAX_HTTP_DOWNLOAD_SIZE = 1_000_000
    result = hashlib.sha256(Path(hf_hub_download('org/base', 'model.safetensors')).read_bytes()).hexdigest()
    """
    assert run_client("2.4.0", script, site.registry.url, tmp_path) == HASHES["model.safetensors"]
    assert metric(site.registry, "helios_registry_xorb_bytes_total") - before > 0.9 * len(BASE)


@pytest.mark.one_database
def test_a_client_of_the_store_reads_it(site: Site, tmp_path: Path) -> None:
    sent = metric(site.registry, "helios_registry_sent_bytes_total")
    with heliosfs.client.connect(registry=site.registry.url, home=tmp_path) as store:
        found = store.resolve("org/tuned")
        with found.open("model.safetensors") as file:
            for offset, count in ((len(TUNED) - 100, 100), (0, len(TUNED))):
                buffer = bytearray(count)
                assert file.read_into(buffer, offset) == count
                assert buffer == TUNED[offset : offset + count]
    assert metric(site.registry, "helios_registry_sent_bytes_total") - sent < 0.95 * len(TUNED), "fewer bytes travelled"


@pytest.mark.one_database
@pytest.mark.fuse
@pytest.mark.parametrize("mode", MODES)
def test_a_mount_shows_it(site: Site, tmp_path: Path, mode: str) -> None:
    env = {"HELIOS_REGISTRY__URLS": site.registry.url, "HELIOS_MOUNT__MODE": mode}
    with mounted(Home(tmp_path / "home"), tmp_path / "mnt", **env) as mount:
        for path, data in FILES.items():
            assert (mount.path / "org/base/@main" / path).read_bytes() == data


def test_another_registry_gets_it_by_replication_and_in_a_bundle(
    site: Site, tmp_path: Path, databases: Databases
) -> None:
    peers = json.dumps([{"name": "core", "url": site.registry.url, "repos": ["org/*"]}])
    edge = Command(tmp_path / "edge", **AT_ONCE, HELIOS_REGISTRY__PEERS=peers, **databases())
    bundle = str(tmp_path / "base.tar")
    site.helios("bundle", "export", bundle, "org/base", "--registry", site.registry.url)
    with running_registry(edge) as registry:
        told = json.loads(edge("replicate", "core", "org/tuned", "--registry", registry.url, "--json"))
        assert told["problems"] == []
        edge("bundle", "import", bundle, "--registry", registry.url)
        for repo, path, data in (("base", "model.safetensors", BASE), ("tuned", "model.safetensors", TUNED)):
            with urllib.request.urlopen(f"{registry.url}/org/{repo}/resolve/main/{path}", timeout=30) as answer:
                assert answer.read() == data


def test_what_is_pushed_later_shares_what_is_compressed(site: Site, tmp_path: Path) -> None:
    third = model({"embed": ("BF16", numbers("BF16", 5 * MIB, 1)), "new": ("BF16", numbers("BF16", MIB, 9))})
    before = sum(site.objects.values())
    directory = write(tmp_path / "third", {"model.safetensors": third})
    site.helios("push", str(directory), "org/third", "--registry", site.registry.url)
    assert sum(site.objects.values()) - before < 2.2 * MIB
    url = f"{site.registry.url}/org/third/resolve/main/model.safetensors"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.read() == third


def test_a_registry_killed_in_the_middle_goes_on(tmp_path: Path, databases: Databases) -> None:
    """At several moments: nothing is lost, nothing half-written is left, and the work is done in the end."""
    settings = {**AT_ONCE, "HELIOS_REGISTRY__PROCESS_LEASE_S": "2", **databases()}
    slow = Command(tmp_path / "home", **{**settings, "HELIOS_REGISTRY__RECOMPRESS_MB_S": "20"})
    quick = Command(tmp_path / "home", **settings)
    names = [f"org/m{n}" for n in range(4)]
    files = {
        name: model({"w": ("BF16", numbers("BF16", 2 * MIB, n)), "v": ("BF16", numbers("BF16", 2 * MIB, 50 + n))})
        for n, name in enumerate(names)
    }
    with running_registry(quick) as registry:
        for name, data in files.items():
            directory = write(tmp_path / name, {"model.safetensors": data})
            quick("push", str(directory), name, "--registry", registry.url)

    def compress(registry: Running) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        with contextlib.closing(registry.client()) as client:
            while True:
                try:
                    return list(client.compress(None, 0.0, dry_run=False, timeout_s=60))[-1]
                except Conflict:  # where processes share the database: until the killed one's lease is over
                    assert time.monotonic() < deadline
                    time.sleep(0.1)

    def work(registry: Running) -> None:
        with contextlib.suppress(HeliosError, OSError):
            compress(registry)

    def check(registry: Running) -> None:
        for name, data in files.items():
            url = f"{registry.url}/{name}/resolve/main/model.safetensors"
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.read() == data

    for seconds in (0.4, 1.0):
        with running_registry(slow) as registry:
            check(registry)
            thread = threading.Thread(target=work, args=(registry,))
            thread.start()
            time.sleep(seconds)
            registry.kill()
            thread.join(30)
    with running_registry(quick) as registry:
        check(registry)
        found = Site(registry, quick, {}, {}, {})
        assert compress(registry)["problems"] == []
        time.sleep(1.6)
        found.call("gc")
        check(registry)
        verified = found.call("store", "verify")
        assert (verified["damaged"], verified["stray_objects"]) == (0, 0)
        assert not [key for key, size in found.objects.items() if key.startswith("blobs/") and size > MIB]
        assert sum(found.objects.values()) < 0.75 * sum(map(len, files.values()))
