"""Names in a real mount: what moves, what appears, what is asked, and what happens without a registry."""

import errno
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helios.embedded import running
from helios.names import RepoId
from tests.fakes.metadata_registry import MetadataRegistry
from tests.support.mounts import MODES, fails, mounted, push, run, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.fuse

OLD, NEW = os.urandom(50_000), os.urandom(60_000)


@pytest.fixture
def mnt(tmp_path):
    return tmp_path / "mnt"


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """The mode that the test mounts in: these tests show what the way to the kernel might change."""
    monkeypatch.setenv("HELIOS_MOUNT__MODE", request.param)


@pytest.fixture
def fake():
    with MetadataRegistry() as registry:
        yield registry


def absent(path):
    """Whether somebody can say that there is no such file: without a registry nobody can, which is EIO."""
    try:
        return not path.exists()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False


def test_a_manifest_that_is_too_long_is_eio_and_harms_no_other(helios_home, mnt, fake):
    huge = fake.publish("org/huge", {"a": b"x"})
    good = fake.publish("org/good", {f"file-{number}": b"" for number in range(100)})
    record = fake.records[RepoId.parse("org/huge"), huge]
    fake.manifests[record.manifest] = b"x" * (33 << 20)  # a million files would have 300 MB
    with mounted(helios_home, mnt, HELIOS_REGISTRY__URLS=fake.url) as mount:
        with fails(errno.EIO):
            os.listdir(mnt / "org/huge" / huge)
        assert len(os.listdir(mnt / "org/good" / good)) == 100
        assert "the manifest of models/org/huge" in mount.log()
        assert json.loads(mount.page("/api/v1/status"))["manifest_bytes"] < 1 << 20


@pytest.mark.usefixtures("mode")
def test_a_push_moves_the_link_and_leaves_the_old_commit(helios_home, mnt, tmp_path, wait_for):
    first = push(helios_home, write(tmp_path / "one", {"w.bin": OLD}), "org/name")
    with mounted(helios_home, mnt):
        main, hub = mnt / "org/name/@main", mnt / ".hub/models--org--name"
        assert os.readlink(main) == (hub / "refs/main").read_text() == first
        assert (main / "w.bin").read_bytes() == OLD
        second = push(helios_home, write(tmp_path / "two", {"w.bin": NEW}), "org/name")
        wait_for(lambda: os.readlink(main) == second, timeout_s=5, what="the link to move")
        wait_for(lambda: (hub / "refs/main").read_text() == second, timeout_s=5, what="the ref in .hub to move")
        assert (main / "w.bin").read_bytes() == NEW
        assert (mnt / "org/name" / first / "w.bin").read_bytes() == OLD
        assert (hub / "snapshots" / first / "w.bin").read_bytes() == OLD
        assert first not in os.listdir(mnt / "org/name")
        assert second in os.listdir(mnt / "org/name")


@pytest.mark.usefixtures("mode")
def test_an_open_file_keeps_its_content_when_its_ref_moves(helios_home, mnt, tmp_path, wait_for):
    push(helios_home, write(tmp_path / "one", {"w.bin": OLD}), "org/name")
    with mounted(helios_home, mnt):
        with open(mnt / "org/name/@main/w.bin", "rb") as file:
            second = push(helios_home, write(tmp_path / "two", {"w.bin": NEW}), "org/name")
            wait_for(lambda: os.readlink(mnt / "org/name/@main") == second, timeout_s=5)
            assert file.read() == OLD


def test_a_new_repository_appears_and_a_removed_one_goes(helios_home, mnt, tmp_path, wait_for):
    model = write(tmp_path / "one", {"w.bin": OLD})
    push(helios_home, model, "org/name")
    with mounted(helios_home, mnt):
        assert os.listdir(mnt / "org") == ["name"]
        with pytest.raises(FileNotFoundError):
            os.stat(mnt / "late/comer")
        push(helios_home, model, "org/other")
        push(helios_home, model, "late/comer")
        wait_for(lambda: sorted(os.listdir(mnt / "org")) == ["name", "other"], timeout_s=5)
        wait_for(
            lambda: (mnt / "late/comer/@main/w.bin").exists(), timeout_s=10, what="an unknown name to become known"
        )
        run(helios_home, "rm", "org/other", "--yes")
        wait_for(lambda: os.listdir(mnt / "org") == ["name"], timeout_s=5)
        wait_for(lambda: not (mnt / "org/other").exists(), timeout_s=5)


def test_refs_with_slashes_datasets_and_short_names(helios_home, mnt, fake):
    fake.publish("org/name", {"a": b"1"}, ref="refs/pr/1")
    fake.publish("gpt2", {"b": b"2"})
    fake.publish("org/data", {"c": b"3"}, kind="datasets")
    with mounted(helios_home, mnt, "--registry", fake.url):
        assert os.listdir(mnt / "org/name/@refs%2Fpr%2F1") == ["a"]
        assert os.listdir(mnt / "_/gpt2/@main") == ["b"]
        assert os.listdir(mnt / ".datasets/org/data/@main") == ["c"]
        assert sorted(os.listdir(mnt)) == [".datasets", ".hub", ".volumes", "_", "org"]
        assert os.listdir(mnt / ".volumes") == []


def test_listing_100_models_of_200_files_fetches_nothing(helios_home, mnt, fake):
    for number in range(100):
        fake.publish(f"org/m{number}", {f"d{i % 5}/f{i}.safetensors": b"%d %d" % (number, i) for i in range(200)})
    with mounted(helios_home, mnt, "--registry", fake.url) as mount:
        fake.asked.clear()
        found = [name for top, _, names in os.walk(mnt / "org") for name in names]
        assert len(found) == 20_000
        for path in (mnt / "org/m7/@main/d0").iterdir():
            assert path.stat().st_size > 0
        assert mount.metric("helios_mount_fetched_bytes_total") == 0
        assert mount.metric("helios_mount_operation_seconds_count", operation="open") == 0
        assert set(fake.asked) <= {"/api/v1/repos", "/api/v1/refs", "/api/v1/commits", "/api/v1/manifest"}
        assert (fake.asked["/api/v1/commits"], fake.asked["/api/v1/manifest"]) == (100, 100)
        assert mount.metric("helios_rss_anon_shmem_bytes") < 250 << 20


class Hub:
    """An upstream that counts what it is asked."""

    def __init__(self):
        hub = self
        self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.asked.append(self.path)
                self.send_error(404)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def test_a_lookup_never_asks_the_upstream(helios_home, mnt, tmp_path):
    hub = Hub()
    environ = {"HELIOS_REGISTRY__UPSTREAM": hub.url, "HF_ENDPOINT": hub.url}
    with mounted(helios_home, mnt, **environ):
        for path in ("org/unknown", "_/gpt2", ".hub/models--meta-llama--Llama-3/refs/main", ".datasets/a/b/@main"):
            with pytest.raises(FileNotFoundError):
                os.stat(mnt / path)
        os.listdir(mnt)
        os.listdir(mnt / ".hub")
    hub.stop()
    assert hub.asked == []


# --- without a registry ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mode")
def test_without_a_registry_known_content_stays_and_unknown_names_are_eio(helios, helios_home, mnt, tmp_path, wait_for):
    model = write(tmp_path / "one", {"w.bin": OLD})
    with running_registry(helios) as registry, mounted(helios_home, mnt, "--registry", registry.url) as mount:
        commit = run(helios_home, "push", model, "org/name", HELIOS_REGISTRY__URLS=registry.url).stdout.strip()
        file = mnt / "org/name/@main/w.bin"
        assert file.read_bytes() == OLD
        wait_for(lambda: os.getxattr(file, "user.helios.tier") == b"l1", what="the file to be cached whole")
        registry.process.send_signal(signal.SIGTERM)
        assert registry.process.wait(15) == 0
        time.sleep(1.1)
        assert file.read_bytes() == OLD
        assert os.listdir(mnt / "org/name" / commit) == ["w.bin"]
        assert os.listdir(mnt / "org") == ["name"]
        begin = time.monotonic()
        for path in ("org/unknown", f"org/name/{'0' * 40}", ".hub/models--x--y"):
            with fails(errno.EIO):
                os.stat(mnt / path)
        assert time.monotonic() - begin < 20
        assert "the registry does not answer" in mount.log()
        assert mount.page("/readyz") == "ready\n"
        assert json.loads(mount.page("/api/v1/status"))["registry_answers"] is False
        with running_registry(helios, "--port", registry.url.rpartition(":")[2]):
            wait_for(lambda: absent(mnt / "org/unknown"), timeout_s=15, what="the registry to be noticed")
            assert file.read_bytes() == OLD


def test_a_mount_that_starts_without_its_registry_shows_what_was_seen(helios_home, mnt, fake):
    commit = fake.publish("org/name", {"a": b"1", "d/b": b"2"})
    with mounted(helios_home, mnt, "--registry", fake.url):
        os.listdir(mnt / "org/name/@main/d")
    fake.stop()
    with mounted(helios_home, mnt, "--registry", fake.url):
        assert os.listdir(mnt / "org") == ["name"]
        assert os.readlink(mnt / "org/name/@main") == commit
        assert sorted(os.listdir(mnt / "org/name/@main/")) == ["a", "d"]


def test_an_embedded_registry_that_was_killed_is_started_again(helios_home, mnt, tmp_path, wait_for):
    model = write(tmp_path / "one", {"w.bin": OLD})
    push(helios_home, model, "org/name")
    with mounted(helios_home, mnt):
        os.kill(running(helios_home).pid, signal.SIGKILL)
        wait_for(lambda: running(helios_home) is None)
        time.sleep(1.1)

        wait_for(lambda: absent(mnt / "org/unknown"), timeout_s=30, what="the registry to come back")
        assert (mnt / "org/name/@main/w.bin").read_bytes() == OLD


def test_a_silent_registry_delays_only_what_is_not_known(helios_home, mnt, fake):
    fake.publish("org/name", {"a": b"1"})
    with mounted(helios_home, mnt, "--registry", fake.url):
        main = mnt / "org/name/@main"
        assert os.listdir(main) == ["a"]
        fake.silent_s = 3600.0
        commit = os.open(mnt / "org/name" / os.readlink(main), os.O_RDONLY | os.O_DIRECTORY)
        try:
            unknown = threading.Thread(target=lambda: (mnt / "org/unknown").exists, daemon=True)
            unknown.start()
            begin = time.monotonic()
            for _ in range(50):
                assert os.stat("a", dir_fd=commit).st_size == 1
            assert time.monotonic() - begin < 1
        finally:
            os.close(commit)
        fake.silent_s = 0.0


def test_a_silent_registry_delays_a_known_name_once(helios_home, mnt, fake, wait_for):
    """Until somebody has found out that it is silent; then it is asked behind the answers, and a moved name is seen."""
    old = fake.publish("org/name", {"a": b"1"})
    with mounted(helios_home, mnt, "--registry", fake.url):
        main = mnt / "org/name/@main"
        assert os.readlink(main) == old
        fake.silent_s = 3600.0
        waited = 0.0
        for _ in range(5):
            time.sleep(1.1)
            begin = time.monotonic()
            assert os.readlink(main) == old
            waited += time.monotonic() - begin
        assert waited < 2 * 2.5, "more than once"
        fake.silent_s = 0.0
        new = fake.publish("org/name", {"a": b"2"})
        wait_for(lambda: os.readlink(main) == new, timeout_s=15, what="the registry to be noticed")


def test_a_second_registry_answers_for_a_dead_first(helios_home, mnt, fake):
    fake.publish("org/name", {"a": b"1"})
    with mounted(helios_home, mnt, "--registry", "http://127.0.0.1:1", "--registry", fake.url):
        assert os.listdir(mnt / "org/name/@main") == ["a"]


def test_names_that_must_not_be_shown_hide_no_others(helios_home, mnt, fake):
    fake.publish("org/name", {"a": b"1"})
    good = fake.refs[RepoId.parse("org/name")]
    for bad in ("..", "@main", "a/b", ".hidden", "_"):
        fake.refs[RepoId("models", "org", bad)] = dict(good)
    fake.refs[RepoId.parse("org/refs")] = {"../../x": good["main"]}
    with mounted(helios_home, mnt, "--registry", fake.url) as mount:
        assert os.listdir(mnt / "org") == ["name"]
        assert mount.log().count("a repository can't be shown") == 6


@pytest.mark.usefixtures("mode")
def test_a_manifest_that_lies_is_eio(helios_home, mnt, fake):
    commit = fake.publish("org/name", {"a": b"1"})
    other = fake.publish("org/other", {"b": b"2"})
    digest = fake.records[RepoId.parse("org/name"), commit].manifest
    fake.manifests[digest] = fake.manifests[fake.records[RepoId.parse("org/other"), other].manifest]
    with mounted(helios_home, mnt, "--registry", fake.url):
        with fails(errno.EIO):
            os.listdir(mnt / "org/name/@main/")
        assert os.listdir(mnt / "org/other/@main/") == ["b"]
