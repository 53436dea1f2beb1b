"""A pickled file, from a push to the moment somebody lets it go, as every kind of reader sees it."""

import contextlib
import errno
import json
import os
import pickle

import pytest

from helios.errors import Quarantined
from helios.home import Home
from helios.names import RepoId
from tests.support.mounts import MODES, mounted, push, run, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.fuse


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


FILES = {"config.json": b"{}", "pytorch_model.bin": pickle.dumps(Evil()) * 10}


def quarantine(home, *args, code=0):
    return run(home, "quarantine", *args, code=code).stdout


@pytest.mark.parametrize("mode", MODES)
def test_nobody_reads_it_until_it_is_released(tmp_path, mode):
    home = Home(tmp_path / "home")
    push(home, write(tmp_path / "model", FILES), "org/m")
    with mounted(home, tmp_path / "mnt", HELIOS_MOUNT__MODE=mode) as mount:
        held = mount.path / "org/m/@main/pytorch_model.bin"
        assert (held.parent / "config.json").read_bytes() == b"{}"
        assert held.stat().st_size == len(FILES["pytorch_model.bin"])
        with pytest.raises(PermissionError) as error:
            held.read_bytes()
        assert error.value.errno == errno.EACCES

        (kept,) = json.loads(quarantine(home, "ls", "--json"))["files"]
        assert (kept["path"], kept["findings"]) == ("pytorch_model.bin", "pickle: imports posix system")
        assert "kept back" in quarantine(home, "ls", "org/m")
        assert quarantine(home, "release", "org/m", "pytorch_model.bin") == f"released {kept['sha256']}\n"
        assert held.read_bytes() == FILES["pytorch_model.bin"]
        assert quarantine(home, "ls", "org/m").splitlines()[1:] == []
        assert "released" in quarantine(home, "ls", "--released")
        quarantine(home, "release", "org/m", "pytorch_model.bin", code=1)


@pytest.mark.both_databases
def test_the_hub_api_and_the_native_api_say_why(helios, tmp_path):
    model = write(tmp_path / "model", FILES)
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        environ = {"HELIOS_REGISTRY__URLS": registry.url}
        told = helios("push", model, "org/m", env=environ).err
        assert "kept back until somebody releases them: pytorch_model.bin" in told
        (kept,) = client.kept()
        for method in ("HEAD", "GET"):
            with client.http.request(method, "/org/m/resolve/main/pytorch_model.bin") as response:
                response.read()
                assert response.status == 403
                assert response.headers["x-error-code"] == "Quarantined"
                assert "imports posix system" in response.headers["x-error-message"]
        with pytest.raises(Quarantined, match="posix system"):
            client.recipe(RepoId.parse("org/m"), kept.sha256)
        with client.http.request("GET", "/org/m/resolve/main/config.json") as response:
            assert (response.status, response.read()) == (200, b"{}")
        client.release(RepoId.parse("org/m"), kept.sha256, "ada")
        with client.http.request("GET", "/org/m/resolve/main/pytorch_model.bin") as response:
            assert response.read() == FILES["pytorch_model.bin"]
