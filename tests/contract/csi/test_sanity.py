"""kubernetes-csi's csi-sanity, every case by its name, against the real driver, a real registry and a real mount.

The suite itself is Go (github.com/kubernetes-csi/csi-test); docs/csi.md tells how it ran. Cases that it skips for want
of a capability are looked at in reverse: the capability is not reported, and what needs it is refused.
"""

import os

import pytest

import tests.contract.csi.controller_cases
import tests.contract.csi.identity_cases
import tests.contract.csi.node_cases  # noqa: F401 - they register their cases
from helios.home import Home
from tests.contract.csi.absent_cases import SPECS
from tests.contract.csi.world import CASES, World
from tests.support.command import Command
from tests.support.csi import running_driver
from tests.support.mounts import call, mounted, run, write
from tests.support.registry import running_registry

pytestmark = [pytest.mark.fuse, pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind-mount")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    base = tmp_path_factory.mktemp("sanity")
    home = Home(base / "home")
    with running_registry(Command(base / "core")) as registry:
        env = {"HELIOS_REGISTRY__URLS": registry.url}
        run(home, "push", write(base / "model", {"config.json": b"{}", "sub/a.bin": b"a" * 1000}), "org/name", **env)
        with mounted(home, base / "mnt", **env) as mount, running_driver(home, base, **env) as driver:
            driver.until_ready()  # csi-sanity takes a Probe that says no for an error
            yield driver, mount


@pytest.fixture
def world(parts):
    driver, mount = parts
    directory = driver.kubelet / "csi-mount"
    directory.mkdir()
    world = World(driver, directory, {"model": "org/name"})
    try:
        yield world
    finally:
        world.clean_up()
        directory.rmdir()
    assert world.listed() == set()
    assert driver.mounts() == []
    assert call(mount, "GET", "volumes") == {"volumes": []}


def test_every_case_of_the_suite_is_here_and_no_other():
    assert sorted(CASES) == sorted(SPECS)
    assert len(SPECS) == 96


@pytest.mark.parametrize("name", SPECS)
def test_csi_sanity(world, name):
    CASES[name](world)
