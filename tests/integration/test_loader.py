"""The loader on real mounts and registries: a directory of a mount, whole and not; of another home; a name; vLLM's own
way to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helios.config import LoaderSettings
from helios.errors import HeliosError, InvalidInput, RepoNotFound
from helios.home import Home
from heliosfs.loader.folders import open_folder
from heliosfs.loader.load import load_tensors
from tests.support.command import Command
from tests.support.mounts import Mount, mounted
from tests.support.registry import Running, running_registry
from tests.support.slow_link import SlowLink

SETTINGS = LoaderSettings(threads=4, ahead_mib=8)
ROOT = Path(__file__).parents[2]


@dataclass
class Site:
    """A registry with org/m, a node that uses it, and the directory the model was pushed from."""

    registry: Running
    node: Home
    directory: Path
    commit: str

    @property
    def environ(self) -> dict[str, str]:
        return {"HELIOS_HOME": str(self.node.root), "HELIOS_REGISTRY__URLS": self.registry.url}

    @contextlib.contextmanager
    def mount(self, path: Path) -> Iterator[Mount]:
        with mounted(self.node, path, HELIOS_REGISTRY__URLS=self.registry.url) as mount:
            yield mount


def make_model(directory: Path) -> Path:
    """Two shards of about 20 MB with an index, and one more in a subfolder."""
    random = torch.Generator().manual_seed(5)
    weight_map = {}
    (directory / "draft").mkdir(parents=True)
    for number in range(2):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        kinds = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
        tensors = {f"l.{number}.{n}": torch.randn(1500, 1024, generator=random).to(kinds[n % 3]) for n in range(6)}
        tensors[f"norm.{number}"] = torch.randn(77, generator=random)
        save_file(tensors, directory / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    save_file({"draft": torch.randn(9, generator=random)}, directory / "draft" / "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path, str]]:
    root = tmp_path_factory.mktemp("loader")
    helios = Command(root / "home")
    directory = make_model(root / "m")
    with running_registry(helios) as running:
        yield running, directory, helios("push", str(directory), "org/m")


@pytest.fixture
def site(registry: tuple[Running, Path, str], tmp_path: Path) -> Site:
    return Site(registry[0], Home(tmp_path / "node"), *registry[1:])


def theirs(directory: Path) -> dict[str, torch.Tensor]:
    out = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return out


@contextlib.contextmanager
def using(environ: dict[str, str]) -> Iterator[None]:
    """This process is configured so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HELIOS_REGISTRY__URLS", raising=False)
        for name, value in environ.items():
            patch.setenv(name, value)
        yield


def check(place: str | Path, like: Path, environ: dict[str, str], way: str, **where: str) -> None:
    """Load it, and compare every bit with what safetensors reads from the plain directory."""
    expected = theirs(like)
    with using(environ), open_folder(str(place), **where) as folder:
        assert folder.way == way
        seen = set()
        for name, tensor in load_tensors(folder, SETTINGS):
            seen.add(name)
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
    assert seen == set(expected)


@pytest.mark.fuse
def test_a_directory_of_a_mount_comes_through_the_mount(site, tmp_path):
    with site.mount(tmp_path / "mnt") as mount:
        at = mount.path / "org/m" / site.commit
        check(at, site.directory, site.environ, "the mount")  # nothing of it is local
        check(mount.path / "org/m/@main", site.directory, site.environ, "the mount")
        check(mount.path / f".hub/models--org--m/snapshots/{site.commit}", site.directory, site.environ, "the mount")
        check(at, site.directory / "draft", site.environ, "the mount", subfolder="draft")


@pytest.mark.fuse
def test_whole_files_are_read_where_the_mount_keeps_them(site, tmp_path):
    """No READ reaches the mount, and what is mapped are the cache's own files."""
    with site.mount(tmp_path / "mnt") as mount:
        at = mount.path / "org/m" / site.commit
        call_warm(site, mount)
        before = mount.reads()
        with using(site.environ), open_folder(str(at)) as folder:
            sources = [folder.open(name) for name in folder.files if name.endswith(".safetensors")]
            found = [os.readlink(f"/proc/self/fd/{source.fileno()}") for source in sources]
            for source in sources:
                source.close()
        assert all(path.startswith(f"{mount.state['cache']}/") for path in found)
        check(at, site.directory, site.environ, "the mount")
        assert mount.reads() == before


def call_warm(site: Site, mount: Mount) -> None:
    """Have the mount fetch the model."""
    command = [Path(sys.executable).parent / "helios", "warm", "org/m"]
    subprocess.run(command, env={**os.environ, **site.environ}, check=True, capture_output=True, timeout=120)


@pytest.mark.fuse
def test_a_mount_of_another_home_is_read_as_any_directory(site, tmp_path):
    """As in a container that sees the mount and nothing else."""
    with site.mount(tmp_path / "mnt") as mount:
        alone = {"HELIOS_HOME": str(tmp_path / "elsewhere")}
        check(mount.path / "org/m" / site.commit, site.directory, alone, "plain files")


@pytest.mark.fuse
def test_a_mount_needs_no_registry_for_what_it_has(site, tmp_path):
    with site.mount(tmp_path / "mnt") as mount:
        call_warm(site, mount)
        away = {**site.environ, "HELIOS_REGISTRY__URLS": "http://127.0.0.1:9"}
        check(mount.path / "org/m" / site.commit, site.directory, away, "the mount")


@pytest.mark.fuse
def test_what_a_mount_can_not_fetch_any_more_comes_by_the_client(site, tmp_path, caplog):
    """The mount's registry goes away after it was seen; the loader's is there."""
    at = urlsplit(site.registry.url)
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(SlowLink(at.hostname or "", at.port or 0, 1e9))
        few = {"HELIOS_REGISTRY__URLS": link.url, "HELIOS_MOUNT__REQUEST_DEADLINE_S": "1"}
        with mounted(site.node, tmp_path / "mnt", **few) as mount:
            files = mount.path / "org/m" / site.commit
            assert len(os.listdir(files / "draft")) == 1
            stack.close()
            check(files, site.directory, site.environ, "the mount")
    assert "the client fetches it" in caplog.text


def test_a_name_is_looked_up_in_the_registry(site):
    check("org/m", site.directory, site.environ, "the client")
    check("org/m", site.directory, site.environ, "the client", revision=site.commit)
    with using(site.environ), open_folder("org/m") as folder:
        folder.fetch()
        assert folder.open("model-00001-of-00002.safetensors").fileno() is not None


def test_a_name_nobody_knows_is_an_error(site):
    with using(site.environ), pytest.raises(RepoNotFound), open_folder("org/none"):
        pass


def test_a_name_without_a_registry_is_an_error(site):
    with (
        using({"HELIOS_HOME": str(site.node.root)}),
        pytest.raises(InvalidInput, match=r"org/m is no directory(.|\n)*HELIOS_REGISTRY__URLS"),
        open_folder("org/m"),
    ):
        pass
    assert not site.node.root.exists()  # none was started for it


def load_until_it_stops(site: Site, environ: dict[str, str]) -> None:
    """Load a name while the registry stops after the first tensor; what comes is compared."""
    expected = theirs(site.directory)
    with using(environ), open_folder("org/m") as folder:
        for name, tensor in load_tensors(folder, LoaderSettings(threads=1, ahead_mib=1)):
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
            os.kill(site.registry.pid, signal.SIGSTOP)


def test_a_registry_that_stops_meanwhile_is_an_error(site, monkeypatch):
    """Not one tensor with bytes that never came."""
    monkeypatch.setenv("HELIOS_MOUNT__REQUEST_DEADLINE_S", "1")
    at = urlsplit(site.registry.url)
    with SlowLink(at.hostname or "", at.port or 0, 10e6) as link:  # all of it takes four seconds
        try:
            with pytest.raises(HeliosError):
                load_until_it_stops(site, {**site.environ, "HELIOS_REGISTRY__URLS": link.url})
        finally:
            os.kill(site.registry.pid, signal.SIGCONT)


ENTRY = "[vllm.general_plugins]\nhelios = heliosfs.loader.plugin:register\n"

VLLM = """
import json, sys
from types import SimpleNamespace
import torch
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.plugins import load_general_plugins

load_general_plugins()
assert "heliosfs.loader.engine" not in sys.modules, "the plugin alone imports the loader"
from vllm.model_executor.model_loader import get_model_loader

class Model(torch.nn.Module):
    def load_weights(self, weights):
        self.sums = {name: int(t.view(torch.uint8).to(torch.int64).sum()) for name, t in weights}

def load(place, **options):
    loader, model = get_model_loader(LoadConfig(load_format="helios", **options)), Model()
    config = SimpleNamespace(
        model=place, revision=None, quantization=None, is_moe=False, multimodal_config=None, model_weights=None
    )
    with set_current_vllm_config(VllmConfig()):
        loader.load_weights(model, config)
    return type(loader).__module__, model.sums

def refused(place, **options):
    try:
        load(place, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([
    load(sys.argv[1]),
    refused(sys.argv[2]),
    refused(sys.argv[1], safetensors_load_strategy="eager"),
    refused(sys.argv[1], model_loader_extra_config={"num_threads": 4}),
    refused("/models/m-q4.gguf"),
]))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_finds_the_loader_by_its_entry_point(site, tmp_path):
    """vLLM's own plugin loading and its own loader around ours; no engine, which would only take longer."""
    entry = tmp_path / "entry" / "helios_loader_test-0.dist-info"
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: helios-loader-test\nVersion: 0\n")
    (entry / "entry_points.txt").write_text(ENTRY)
    damaged = shutil.copytree(site.directory, tmp_path / "damaged")
    shard = damaged / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    environ = {**os.environ, **site.environ, "PYTHONPATH": f"{tmp_path / 'entry'}:{ROOT}", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", VLLM, site.directory, damaged],
        env=environ, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (module, sums), truncated, strategy, extra, gguf = json.loads(done.stdout.splitlines()[-1])
    assert module == "heliosfs.loader.engine"
    expected = theirs(site.directory)
    assert sums == {name: int(t.view(torch.uint8).to(torch.int64).sum()) for name, t in expected.items()}
    assert "model-00002-of-00002.safetensors: its tensors end at byte" in truncated
    assert "--safetensors-load-strategy eager does not go with" in strategy
    assert "num_threads" in extra
    assert "GGUF" in gguf
