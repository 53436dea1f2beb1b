"""Who reads what, as a registry sees it: clients of the Hub over HTTP, nodes through their mounts."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from helios.home import Home
from tests.support.command import Command
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.mirror_site import ask
from tests.support.mounts import MODES, call, mounted, write
from tests.support.registry import Running, running_registry

pytestmark = pytest.mark.both_databases

FILES = {"config.json": b'{"a": 1}', "weights.bin": random.Random(1).randbytes(3_000_000)}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def site(tmp_path, databases):
    helios = Command(tmp_path / "home", **databases())
    with running_registry(helios) as registry:
        commit = helios("push", str(write(tmp_path / "model", FILES)), "org/m", "--registry", registry.url)
        yield helios, registry, commit


def reads(registry: Running, query: str) -> list[dict]:
    answer = ask(registry.url, f"/api/v1/usage/reads?{query}")
    assert answer.status == 200, answer.body
    return json.loads(answer.body)["rows"]


def test_downloads_of_the_hubs_clients_are_counted_and_survive_a_restart(site, tmp_path):
    helios, registry, commit = site
    script = """
        found = snapshot_download("org/m")
        result = tree(found)
    """
    run_client(VERSIONS[1], script, registry.url, tmp_path / "hf", env={"HF_HUB_DISABLE_XET": "1"})
    for first, last in ((0, 99), (100, 199)):
        answer = ask(
            registry.url, "/org/m/resolve/main/weights.bin", range=f"bytes={first}-{last}", x_helios_node="gpu-7"
        )
        assert answer.status == 206
    assert ask(registry.url, "/org/m/resolve/main/weights.bin", method="HEAD").status == 200
    rows = {row["node"]: row for row in reads(registry, "by=repo,commit,node")}
    of_client, of_gpu = rows["127.0.0.1"], rows["gpu-7"]
    assert (of_client["repo"], of_client["commit"]) == ("models/org/m", commit)
    assert (of_client["reads"], of_client["bytes"]) == (len(FILES), SIZE)
    assert (of_gpu["reads"], of_gpu["bytes"]) == (1, 200)
    (hour,) = reads(registry, "by=time&repo=models/org/m")
    assert hour["time"] % 3600 == 0
    assert hour["span"] == 3600
    assert 0 <= time.time() - hour["time"] < 2 * 3600
    shown = helios("usage", "--reads", "--registry", registry.url)
    assert shown.splitlines()[1].split()[:2] == ["org/m", "3"]
    told = json.loads(helios("usage", "org/m", "--reads", "--by", "node", "--json", "--registry", registry.url))
    assert {row["node"] for row in told["rows"]} == {"127.0.0.1", "gpu-7"}
    registry.process.send_signal(signal.SIGTERM)
    registry.process.wait(15)
    with running_registry(helios) as again:
        assert reads(again, "by=repo") == [{"repo": "models/org/m", "reads": 3, "bytes": SIZE + 200}]


def test_what_comes_over_xet_counts_for_its_revision(tmp_path, databases):
    """Files that plain HTTP would refuse, of two revisions that hold different ones."""
    check_counts_of_xet(tmp_path, VERSIONS[-1], databases())


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_what_comes_to_an_older_client_over_xet_counts_for_its_revision(tmp_path, version):
    check_counts_of_xet(tmp_path, version, {})


def check_counts_of_xet(tmp_path: Path, version: str, settings: dict[str, str]) -> None:
    other = random.Random(2).randbytes(2_500_000)
    helios = Command(tmp_path / "home", HELIOS_REGISTRY__XET_MIN_GIB="0", **settings)
    with running_registry(helios) as registry:
        to = ("org/m", "--registry", registry.url)
        old = helios("push", str(write(tmp_path / "model", FILES)), *to)
        new = helios("push", str(write(tmp_path / "model", {**FILES, "weights.bin": other})), *to)
        wait_for_layouts(registry, 2)
        script = f"""
            from huggingface_hub import constants
            constants.MAX_HTTP_DOWNLOAD_SIZE = 1_000_000
            before = Path(hf_hub_download("org/m", "weights.bin", revision="{old}")).stat().st_size
            result = [before, len(tree(snapshot_download("org/m", revision="main")))]
        """
        assert run_client(version, script, registry.url, tmp_path / "hf") == [3_000_000, len(FILES)]
        found = {row["commit"]: (row["reads"], row["bytes"]) for row in reads(registry, "by=commit&repo=models/org/m")}
        assert found == {old: (1, 3_000_000), new: (len(FILES), len(FILES["config.json"]) + len(other))}


def wait_for_layouts(registry: Running, count: int) -> None:
    end = time.monotonic() + 60
    while f'xet_layouts_total{{result="made"}} {count}.0' not in ask(registry.url, "/metrics").body.decode():
        assert time.monotonic() < end, "no layouts"
        time.sleep(0.1)


@pytest.mark.one_database
@pytest.mark.fuse
@pytest.mark.parametrize("mode", MODES)
def test_what_is_read_through_a_mount_is_told_when_it_ends(site, tmp_path, mode):
    helios, registry, commit = site
    home = Home(tmp_path / "node")
    env = {"HELIOS_REGISTRY__URLS": registry.url, "HELIOS_MOUNT__MODE": mode, "HELIOS_MOUNT__NODE": "node-a"}
    with mounted(home, tmp_path / "mnt", **env) as mount:
        for path, content in FILES.items():
            assert (mount.path / "org/m/@main" / path).read_bytes() == content
        (mount.path / "org/m" / commit / "config.json").stat()
    (row,) = reads(registry, "by=repo,commit,node")
    assert (row["repo"], row["commit"], row["node"]) == ("models/org/m", commit, "node-a")
    assert row["reads"] == len(FILES)
    assert row["bytes"] == SIZE
    assert helios("usage", "org/m", "--reads", "--registry", registry.url).splitlines()[1].split()[0] == commit


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"{}", "node"),
        ({"node": "a b"}, "names no node"),
        ({"reporter": "x"}, "no reporter"),
        ({"sequence": -1}, "sequence"),
        ({"rows": [{"repo": "models/org/m", "commit": "x", "reads": 1, "bytes": 1}]}, "not a commit"),
        ({"rows": [{"repo": "../x", "commit": "c" * 40, "reads": 1, "bytes": 1}]}, "not a kind"),
        ({"rows": [{"repo": "models/org/m", "commit": "c" * 40, "reads": -1, "bytes": 1}]}, "reads"),
        ({"rows": [{"repo": "models/org/m", "commit": "c" * 40, "reads": 1, "bytes": 1}] * 1001}, "rows"),
        ({"age_s": 1e9}, "age_s"),
    ],
)
def test_a_report_that_is_wrong_is_refused_with_the_reason(checked, body, what):
    sent = {"node": "n", "reporter": "ab" * 8, "sequence": 1, "rows": []}
    answer = post(checked, body if isinstance(body, bytes) else json.dumps(sent | body).encode())
    assert answer[0] == 400
    assert what in answer[1]


@pytest.mark.parametrize("query", ["by=color", "since=-1", "since=x", "until=1e3", "repo=nothing"])
def test_a_question_that_is_wrong_is_refused(checked, query):
    assert ask(checked.url, f"/api/v1/usage/reads?{query}").status == 400


@pytest.fixture(scope="module")
def checked(tmp_path_factory, databases):
    with running_registry(Command(tmp_path_factory.mktemp("checked"), **databases())) as registry:
        yield registry


def post(registry: Running, body: bytes) -> tuple[int, str]:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    request = Request(f"{registry.url}/api/v1/usage/reads", body, {"content-type": "application/json"}, method="POST")
    try:
        with urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.one_database
@pytest.mark.fuse
def test_a_node_takes_over_the_class_that_the_registry_tells(site, tmp_path):
    helios, registry, _ = site
    url = ("--registry", registry.url)
    helios("priority", "org/m", "scratch", *url)
    assert "scratch" in helios("priority", *url)
    home = Home(tmp_path / "node")
    with mounted(home, tmp_path / "mnt", HELIOS_REGISTRY__URLS=registry.url) as mount:
        (mount.path / "org/m/@main/weights.bin").read_bytes()
        end = time.monotonic() + 30
        while {entry["class"] for entry in call(mount, "GET", "cache")["entries"]} != {"scratch"}:
            assert time.monotonic() < end
            time.sleep(0.1)
        call(mount, "POST", "pin", {"repo": "models/org/m", "revision": "main", "priority": "normal"})
        while {entry["class"] for entry in call(mount, "GET", "cache")["entries"]} != {"normal"}:
            assert time.monotonic() < end
            time.sleep(0.1)
    helios("priority", "org/m", "--clear", *url)
    assert json.loads(helios("priority", "--json", *url)) == []
