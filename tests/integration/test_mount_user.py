"""Mounting without root: fusermount3 does it, and only the user may look in unless /etc/fuse.conf allows more.

Run as root, the test takes a mount namespace of its own with an open /dev/fuse and a fuse.conf of its own, and drops to
``nobody`` for every helios command. Run by anybody else it is that user.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from heliosfs.fuse.mounting import may_allow_other

pytestmark = pytest.mark.fuse

NOBODY = 65534

DRIVER = r"""
import json, os, subprocess, sys
base, conf, helios = sys.argv[1:]
root = os.geteuid() == 0
# nobody may still read the interpreter, wherever it is installed
drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=+dac_read_search"] if root else []
env = {**os.environ, "HELIOS_HOME": f"{base}/home", "HOME": base}
mnt = f"{base}/mnt"
seen = {}

def run(*args, code=0):
    done = subprocess.run([*drop, helios, *args], env=env, capture_output=True, text=True, timeout=90, cwd="/")
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout

def bind(source, target):
    subprocess.run(["mount", "--bind", source, target], check=True)

if root:
    os.mknod(f"{base}/fuse", 0o020666, os.makedev(10, 229))
    os.chmod(f"{base}/fuse", 0o666)
    bind(f"{base}/fuse", "/dev/fuse")
    bind(conf, "/etc/fuse.conf")
run("push", f"{base}/model", "org/name")
state = json.loads(run("mount", mnt, "--json"))
user = [*drop, "sh", "-c"]
seen["user"] = subprocess.run([*user, f"cat {mnt}/org/name/@main/a.txt"], capture_output=True, text=True).stdout
seen["owner"] = subprocess.run([*user, f"stat -c %u {mnt}/org/name/@main/a.txt"], capture_output=True, text=True).stdout
seen["root"] = subprocess.run(["cat", f"{mnt}/org/name/@main/a.txt"], capture_output=True, text=True).stdout
seen["table"] = [line for line in open("/proc/self/mountinfo") if f" {mnt} " in line]
seen["log"] = open(state["log"]).read()
run("umount", mnt)
seen["left"] = [line for line in open("/proc/self/mountinfo") if f" {mnt} " in line]
state = json.loads(run("mount", mnt, "--json"))
os.kill(state["pid"], 9)
run("mount", mnt)
run("umount", mnt)
seen["left"] += [line for line in open("/proc/self/mountinfo") if f" {mnt} " in line]
seen["left"] += os.listdir(f"{base}/home/run/mounts")
if root:
    bare = f"{base}/bare"
    os.mkdir(bare)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", bare], check=True)
    os.mkdir(f"{bare}/upper")
    os.mkdir(f"{bare}/work")
    layers = f"lowerdir=/etc,upperdir={bare}/upper,workdir={bare}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, "/etc"], check=True)
    os.unlink("/etc/mtab")
    done = subprocess.run([*drop, helios, "mount", mnt], env=env, capture_output=True, text=True, timeout=90, cwd="/")
    left = [line for line in open("/proc/self/mountinfo") if f" {mnt} " in line]
    seen["without mtab"] = [done.returncode, done.stderr, left]
print(json.dumps(seen))
"""


@pytest.fixture
def base():
    """A directory that nobody can reach: pytest's own is closed to others."""
    path = Path(tempfile.mkdtemp(prefix="helios-user-", dir="/tmp"))
    path.chmod(0o755)
    (path / "model").mkdir()
    (path / "model/a.txt").write_text("hello")
    if os.geteuid() == 0:
        for each in (path, path / "model"):
            os.chown(each, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


def drive(base, conf):
    (base / "fuse.conf").write_text(conf)
    own = ["unshare", "--mount", "--propagation", "private"] if os.geteuid() == 0 else []
    helios = Path(sys.executable).parent / "helios"
    done = subprocess.run(
        [*own, sys.executable, "-c", DRIVER, base, base / "fuse.conf", helios],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not shutil.which("fusermount3"), reason="fusermount3 is missing (Debian: fuse3)")
@pytest.mark.parametrize("allowed", [False, True] if os.geteuid() == 0 else [may_allow_other()])
def test_a_user_mounts_and_others_see_it_only_where_allowed(base, allowed):
    seen = drive(base, "user_allow_other\n" if allowed else "# nothing\n")
    assert seen["user"] == "hello"
    assert seen["owner"].strip() == str(NOBODY if os.geteuid() == 0 else os.getuid())
    assert ("allow_other" in seen["table"][0]) is allowed
    assert seen["left"] == []
    assert ("lacks user_allow_other" in seen["log"]) is not allowed
    assert "read-ahead stays as it is" in seen["log"]
    if os.geteuid() == 0:
        assert (seen["root"] == "hello") is allowed
        code, said, left = seen["without mtab"]
        assert code == 1
        assert "ln -s /proc/self/mounts /etc/mtab" in said
        assert left == []
