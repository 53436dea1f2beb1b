"""What vLLM and the router are told of a worker's place."""

from __future__ import annotations

import json

import pytest

from helios.config import DisaggregationSettings, KvEventsSettings
from helios.errors import UsageError
from helios.launch import roles
from helios.launch.plan import Placement
from helios.launch.roles import Ports, Told
from helios.launch.workers import check_connector
from router.kv.publishers import publishers_of
from router.membership import parse_worker, said_of

PORTS = Ports(8001, 8002, 8003, 8004, side_host="127.0.0.7")
PREFILL = Placement("prefill", "vllm-prefill-1", cores=(0, 1), kv=64 << 20)
DECODE = Placement("decode", "vllm-decode-1", cores=(2,), kv=64 << 20, positions=512)


def told(placement: Placement, device: str = "cpu", extra: tuple[str, ...] = (), lease_s: float = 30.0) -> Told:
    return roles.told(placement, device, PORTS, task="chat", lease_s=lease_s, extra=extra)  # type: ignore[arg-type]


def option(found: Told, name: str) -> str:
    return found.arguments[found.arguments.index(name) + 1]


def test_prefill_and_decode_on_a_cpu():
    prefill, decode = told(PREFILL), told(DECODE, lease_s=12.5)
    transfer = json.loads(option(prefill, "--kv-transfer-config"))
    assert transfer == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer",
        "kv_buffer_device": "cpu",
        "kv_connector_extra_config": {"kv_lease_duration": 30},
    }
    transfer = json.loads(option(decode, "--kv-transfer-config"))
    assert (transfer["kv_role"], transfer["kv_load_failure_policy"]) == ("kv_consumer", "recompute")
    assert transfer["kv_connector_extra_config"] == {"kv_lease_duration": 13}
    assert prefill.env == {
        "VLLM_CPU_OMP_THREADS_BIND": "0,1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.7",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "8002",
        "HELIOS_NIXL_DELAY_US": "1000",
        "UCX_TLS": "tcp,self",
    }
    assert option(decode, "--max-model-len") == "512"
    assert "--max-model-len" not in prefill.arguments


def test_kv_events_are_published_where_the_router_is_told_to_listen():
    events = json.loads(option(told(DECODE), "--kv-events-config"))
    assert "::" in events["endpoint"], "vLLM would connect otherwise"
    assert "*" not in events["endpoint"], "that would be every interface"
    worker = parse_worker(roles.router_option("org/name", "c" * 40, DECODE, PORTS))
    assert (worker.model, worker.url, worker.role, worker.revision) == (
        "org/name", "http://127.0.0.1:8001", "decode", "c" * 40,
    )  # fmt: skip
    (publisher,) = publishers_of(worker.url, said_of(worker), KvEventsSettings())
    assert (publisher.endpoint, publisher.replay) == ("tcp://127.0.0.1:8003", "tcp://127.0.0.1:8004")
    for place, port in (("endpoint", 8003), ("replay_endpoint", 8004)):
        assert events[place].endswith(f"127.0.0.1]:{port}")


def test_one_worker_for_both_is_told_nothing_of_others():
    both = Placement("both", "vllm", kv=64 << 20)
    found = roles.told(both, "cpu", Ports(8001), task="chat", lease_s=30.0, extra=())
    assert found.env == {}
    assert not [one for one in found.arguments if one.startswith("--kv-transfer") or one.startswith("--kv-events")]
    worker = parse_worker(roles.router_option("org/name", "c" * 40, Placement("both", "vllm"), Ports(8001)))
    assert (worker.role, worker.kv_events, worker.revision) == ("both", "", "c" * 40)


def test_gpus():
    placement = Placement("prefill", "vllm-prefill-1", gpus=(2, 3), share=0.85)
    found = told(placement, "cuda")
    assert found.env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "UCX_TLS" not in found.env
    assert option(found, "--tensor-parallel-size") == "2"
    assert option(found, "--gpu-memory-utilization") == "0.85"
    assert "kv_buffer_device" not in json.loads(option(found, "--kv-transfer-config"))
    assert "--tensor-parallel-size" not in told(placement, "cuda", ("--pipeline-parallel-size", "2")).arguments


@pytest.mark.parametrize(
    ("arguments", "gpus", "length", "ranks"),
    [
        ("", 0, 0, 0),
        ("--tensor-parallel-size 4", 4, 0, 0),
        ("-tp=2 --pipeline_parallel_size 3", 6, 0, 0),
        ("--max-model-len 4096 --max-model-len=2048", 0, 2048, 0),
        ("--max-model-len auto --dtype half", 0, 0, 0),
        ("-dp 2 --tensor-parallel-size", 0, 0, 2),
    ],
)
def test_what_users_tell_vllm_counts(arguments, gpus, length, ranks):
    words = arguments.split()
    assert (roles.gpus_each(words), roles.longest(words), roles.ranks(words)) == (gpus, length, ranks)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.7", "[::ffff:10.0.0.7]"),
        ("fd00::7", "[fd00::7]"),
        ("fd00:1:2:3:4:5:6:7", "*"),
        ("0.0.0.0", "[::ffff:0.0.0.0]"),
        ("::", "[::]"),
        ("pod-1.models.svc", "*"),
    ],
)
def test_events_are_bound_to_the_pods_address_where_vllm_can(host, address):
    assert roles.bound(host) == address
    assert "::" in address or address == "*", "vLLM would connect otherwise"


def test_a_worker_of_a_pod_is_told_its_address():
    ports = Ports(8000, 5600, 5557, 5657, "fd00::7")
    found = roles.told(Placement("decode", "vllm"), "cuda", ports, task="chat", lease_s=30.0, extra=())
    assert found.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "fd00::7"
    assert json.loads(option(found, "--kv-events-config"))["endpoint"] == "tcp://[fd00::7]:5557"
    worker = parse_worker(roles.router_option("org/name", "c" * 40, Placement("decode", "vllm"), ports))
    assert (worker.url, worker.kv_events) == ("http://[fd00::7]:8000", "tcp://[fd00::7]:5557")


def test_one_worker_for_both_publishes_events_where_it_has_a_port_for_them():
    found = roles.told(Placement("both", "vllm"), "cuda", Ports(8000, events=5557), task="chat", lease_s=30.0, extra=())
    events = json.loads(option(found, "--kv-events-config"))
    assert "replay_endpoint" not in events
    assert "--kv-transfer-config" not in found.arguments
    found = roles.told(
        Placement("both", "vllm"), "cuda", Ports(8000, events=5557), task="embedding", lease_s=30.0, extra=()
    )
    assert "--kv-events-config" not in found.arguments


def test_a_router_that_speaks_another_connector_than_the_workers_is_refused_before_anything_is_started() -> None:
    check_connector(DisaggregationSettings())
    with pytest.raises(UsageError, match="'mooncake'"):
        check_connector(DisaggregationSettings(connector="mooncake"))
