"""Which compiled kernels fit a start of an engine: a name that follows from all that decides what is compiled.

The name is a coarse one: the engine, torch and Triton hash what they compile themselves and use nothing that does not
fit, so a key that is too coarse costs a compilation and never a wrong kernel. What differs from start to start without
changing code (ports, names, keys of the API) must not be a part of it, or nothing would ever be found.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from helios.errors import Unavailable

FORMAT: Final = 1
REFS: Final = "refs/helios/compile/"
"""Below this are the refs of a model's repository that name its artifacts, one for each key. The Hub's API lists only
branches and tags, so its clients don't see them."""

_OPTION: Final = re.compile(r"--|-[A-Za-z]")

PACKAGES: Final = ("torch", "triton", "triton-cpu", "flashinfer-python", "flashinfer-jit-cache")
"""Distributions beside the engine's that compile, or that compiled code links to."""

SAME_CODE: Final = frozenset({
    "--host", "--port", "--uds", "--served-model-name", "--api-key", "--root-path", "--allowed-origins",
    "--allowed-methods", "--allowed-headers", "--allow-credentials", "--middleware", "--ssl-keyfile", "--ssl-certfile",
    "--ssl-ca-certs", "--chat-template", "--response-role", "--log-config-file", "--uvicorn-log-level",
    "--disable-log-stats", "--disable-log-requests", "--enable-log-requests", "--max-log-len", "--hf-token",
    "--otlp-traces-endpoint", "--kv-cache-memory-bytes", "--gpu-memory-utilization", "--kv-transfer-config",
    "--kv-events-config", "--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser", "--load-format",
    "--safetensors-load-strategy", "--download-dir", "--seed", "--api-server-count", "--data-parallel-rpc-port",
    "--disable-uvicorn-access-log", "--enable-server-load-tracking", "--shutdown-timeout",
})  # fmt: skip
"""vLLM's arguments that change no compiled code: where it listens, who may ask, how weights get into memory."""

ENVIRONMENT: Final = ("VLLM_", "TORCH", "TRITON_", "FLASHINFER_", "CXX", "CUDA_HOME")
"""Beginnings of the names of variables that may change what is compiled..."""

SAME_CODE_VARIABLES: Final = frozenset({
    "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_API_KEY", "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "VLLM_PORT",
    "VLLM_HOST_IP", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_LOGGING_LEVEL",
    "VLLM_LOGGING_PREFIX", "VLLM_LOGGING_STREAM", "VLLM_LOGGING_CONFIG_PATH", "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_SERVER_DEV_MODE", "VLLM_RPC_BASE_PATH", "VLLM_CPU_OMP_THREADS_BIND", "TORCHINDUCTOR_CACHE_DIR",
    "TORCHINDUCTOR_COMPILE_THREADS", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE",
})  # fmt: skip
"""...but for these, and for whatever has a TOKEN, KEY or SECRET in its name: a key's facts are published."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What compiles: ``packages`` are names and versions, ``prefix`` is where it is installed.

    Compiled artifacts hold the absolute paths of the sources that were traced, so an engine that is installed
    elsewhere finds nothing in them.
    """

    name: str
    version: str
    packages: tuple[tuple[str, str], ...]
    python: str
    prefix: str


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What it is compiled for. ``capability``: a GPU's name, compute capability and driver; a CPU's machine and
    flags."""

    kind: str
    capability: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """``name`` is 32 hexadecimal digits of the sha256 of ``facts``, canonical JSON for whoever asks what it means."""

    name: str
    facts: str

    @property
    def ref(self) -> str:
        """The ref that names the key's artifact in the model's repository."""
        return REFS + self.name


def cache_key(
    manifest: str, engine: Engine, device: DeviceFacts, arguments: Sequence[str], environ: Mapping[str, str], seal: str
) -> Key:
    """The key of a start; ``manifest`` is the digest of the model's manifest, ``arguments`` are vLLM's, with what
    Helios adds and without the model; ``seal`` says which secret vouches for the artifact."""
    facts = {
        "format": FORMAT,
        "manifest": manifest,
        "engine": [engine.name, engine.version, engine.python, engine.prefix],
        "packages": sorted(map(list, engine.packages)),
        "device": [device.kind, *device.capability],
        "arguments": compiled_arguments(arguments),
        "seal": seal,
        "environment": {name: value for name, value in sorted(environ.items()) if _counts(name)},
    }
    text = msgspec.json.encode(facts, order="sorted")
    return Key(hashlib.sha256(text).hexdigest()[:32], text.decode())


def compiled_arguments(arguments: Sequence[str]) -> list[list[str]]:
    """The arguments that may change compiled code, each with its values, by name; of one given twice the last, as the
    engine's own parser does it."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for argument in arguments:
        if _OPTION.match(argument):  # a short one, too: -O3 is no value of the option before it
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            current = found[name] = [value] if equals else []
        else:
            current.append(argument)
    return [[name, *values] for name, values in sorted(found.items()) if name not in SAME_CODE]


def compiles(device: str, arguments: Sequence[str]) -> bool:
    """Whether an engine compiles anything that is worth keeping: on a GPU kernels at least, on a CPU nothing where
    ``--enforce-eager`` says so."""
    eager = [argument for argument in arguments if argument in ("--enforce-eager", "--no-enforce-eager")]
    return device != "cpu" or eager[-1:] != ["--enforce-eager"]


def _counts(name: str) -> bool:
    secret = any(word in name for word in ("TOKEN", "KEY", "SECRET", "PASSWORD"))
    return name.startswith(ENVIRONMENT) and name not in SAME_CODE_VARIABLES and not secret


def this_engine(name: str = "vllm") -> Engine:
    """The engine that is installed beside Helios; raises Unavailable where there is none."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"{name} is not installed beside Helios") from None
    packages = []
    for each in PACKAGES:
        try:
            packages.append((each, importlib.metadata.version(each)))
        except importlib.metadata.PackageNotFoundError:
            continue  # it compiles nothing then
    return Engine(name, version, tuple(packages), platform.python_version(), sys.prefix)


def this_device(kind: str) -> DeviceFacts:
    """The device of this machine; raises Unavailable when it can't be asked."""
    if kind == "cpu":
        return DeviceFacts(kind, (platform.machine(), *cpu_flags(Path("/proc/cpuinfo").read_text())))
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"nvidia-smi does not say which GPU this is: {error}") from None
    return DeviceFacts(kind, tuple(sorted({line.strip() for line in done.stdout.splitlines() if line.strip()})))


def cpu_flags(cpuinfo: str) -> tuple[str, ...]:
    """The instruction sets of the first processor in /proc/cpuinfo, sorted; compilers use all that are there."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()
