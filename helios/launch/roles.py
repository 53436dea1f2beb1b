"""What vLLM is told for its place in a group of workers, and the router of each. No I/O.

Prefill workers compute prompts and keep their KV blocks until a decode worker has read them over NIXL
(``router/disaggregation``); both publish KV events. On one machine all of it stays on loopback.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from helios.http.hosts import bracketed
from helios.launch.machine import Device
from helios.launch.model_info import Task
from helios.launch.plan import SEQUENCES, Placement

HOST: Final = "127.0.0.1"
LEASE_LEAST_S: Final = 6
"""vLLM renews a lease six times while it lasts, in whole seconds."""
DELAY_US: Final = 1000
"""Pause of NIXL's progress thread between two looks, in microseconds: it would keep a core busy, idle or not."""
KV_ROLES: Final = {"prefill": "kv_producer", "decode": "kv_consumer"}


@dataclass(frozen=True, slots=True)
class Ports:
    """A worker's ports: its API's; those of the others are 0 where it has none. ``host``: the address at which routers
    and other workers reach them, one of IPv6 without brackets; ``side_host``: that of its
    side channel, empty: the same."""

    api: int
    side_channel: int = 0
    events: int = 0
    replay: int = 0
    host: str = HOST
    side_host: str = ""

    def at(self, scheme: str, port: int) -> str:
        """The address of one of them."""
        return f"{scheme}://{bracketed(self.host)}:{port}"


@dataclass(frozen=True, slots=True)
class Told:
    """Arguments and environment of vLLM."""

    arguments: tuple[str, ...]
    env: dict[str, str]


def cpu_arguments(kv: int, positions: int) -> list[str]:
    """A CPU would compile for minutes and take whole GiB of KV cache, so both are said; ``positions`` 0: the model's.

    (The flag for the cache wins only while VLLM_CPU_KVCACHE_SPACE is unset.)"""
    out = ["--enforce-eager", "--max-num-seqs", str(SEQUENCES), "--kv-cache-memory-bytes", str(kv)]
    return [*out, "--max-model-len", str(positions)] if positions else out


def told(
    placement: Placement, device: Device, ports: Ports, *, task: Task, lease_s: float, extra: Sequence[str]
) -> Told:
    """What one vLLM is told of its placement. ``lease_s``: how long the router takes blocks to be kept, in seconds;
    ``extra``: the arguments that users give, which come behind these and win."""
    arguments: list[str] = []
    env: dict[str, str] = {}
    if device == "cpu":
        arguments += cpu_arguments(placement.kv, placement.positions)
    elif task != "embedding":
        arguments += ["--max-model-len", "auto"]
    if placement.cores:
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, placement.cores))
    if placement.gpus:
        if not gpus_each(extra):
            arguments += ["--tensor-parallel-size", str(len(placement.gpus))]
        arguments += ["--gpu-memory-utilization", f"{placement.share:.2f}"]
        # nvidia-smi counts as the bus does, CUDA by default the fastest first
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, placement.gpus))}
    if placement.side_channel:
        arguments += ["--kv-transfer-config", json.dumps(_transfer(placement, device, lease_s))]
        env |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": ports.side_host or ports.host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(ports.side_channel),
            "HELIOS_NIXL_DELAY_US": str(DELAY_US),
        }
        if device == "cpu":
            env["UCX_TLS"] = "tcp,self"  # without it UCX looks for devices that a container may not have
    if ports.events and task != "embedding":
        arguments += ["--kv-events-config", json.dumps(_events(placement, ports))]
    return Told(tuple(arguments), env)


def _transfer(placement: Placement, device: Device, lease_s: float) -> dict[str, Any]:
    out: dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_role": KV_ROLES[placement.role],
        "kv_connector_extra_config": {"kv_lease_duration": max(LEASE_LEAST_S, math.ceil(lease_s))},
    }
    if device == "cpu":
        out["kv_buffer_device"] = "cpu"
    if placement.role == "decode":
        # Blocks of a prefill worker that died are computed here; otherwise vLLM fails the request.
        out["kv_load_failure_policy"] = "recompute"
    return out


def _events(placement: Placement, ports: Ports) -> dict[str, Any]:
    address = bound(ports.host)
    out = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://{address}:{ports.events}",
        "topic": f"kv@{placement.name}",
    }
    return out | ({"replay_endpoint": f"tcp://{address}:{ports.replay}"} if ports.replay else {})


def bound(host: str) -> str:
    """The address as vLLM's publisher of KV events binds it and no other: it binds only what has "*" or "::" in it, and
    "*" is every interface. One of IPv4 is written as IPv6 does it; an IPv6 address that can't be, and a name, are "*".
    """
    try:
        address = ip_address(host)
    except ValueError:
        return "*"
    text = str(address) if address.version == 6 else f"::ffff:{address}"
    return f"[{text}]" if "::" in text else "*"


def router_option(model: str, commit: str, placement: Placement, ports: Ports) -> str:
    """The worker as ``helios router --worker`` takes it."""
    options = [f"{model}={ports.at('http', ports.api)}", f"revision={commit}"]
    if placement.side_channel:
        options += [f"role={placement.role}", f"kv_events={ports.at('tcp', ports.events)}"]
        options += [f"kv_replay={ports.at('tcp', ports.replay)}"]
    return ",".join(options)


def gpus_each(arguments: Sequence[str]) -> int:
    """GPUs of one process by the arguments for vLLM: tensor times pipeline parallel; 0 where they don't say."""
    tensor = _number(arguments, "--tensor-parallel-size", "-tp")
    pipeline = _number(arguments, "--pipeline-parallel-size", "-pp")
    return max(1, tensor) * max(1, pipeline) if tensor or pipeline else 0


def ranks(arguments: Sequence[str]) -> int:
    """Data-parallel ranks by the arguments for vLLM; 0 where they don't say."""
    return _number(arguments, "--data-parallel-size", "-dp")


def longest(arguments: Sequence[str]) -> int:
    """The longest sequence by the arguments for vLLM, in tokens; 0 where they don't say, or not in digits."""
    return _number(arguments, "--max-model-len")


def _number(arguments: Sequence[str], *names: str) -> int:
    """The last value of an option that is written as vLLM takes it: ``--a-b 1``, ``--a_b=1``."""
    found = 0
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in names:
            text = value if equals else next(iter(arguments[at + 1 : at + 2]), "")
            found = int(text) if text.isdecimal() else 0
    return found
