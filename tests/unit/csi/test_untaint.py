"""The node's startup taint goes when the kubelet knows the driver, and nothing else of the node does."""

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi import untaint
from csi.untaint import removal, remove
from helios.cluster import cluster_client
from helios.errors import Forbidden, Unavailable, UsageError
from tests.fakes.kubernetes.patches import json_patch
from tests.fakes.kubernetes_nodes import NodeServer

KEY = "helios.dev/agent-not-ready"
OURS = {"key": KEY, "effect": "NoExecute"}
THEIRS = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule", "timeAdded": "2026-01-01T00:00:00Z"}
DRIVER = "csi.helios.dev"


def node(*taints):
    return {"metadata": {"name": "n", "resourceVersion": "1"}, "spec": {"podCIDR": "10.0.0.0/24", "taints": [*taints]}}


@pytest.fixture
def server(tmp_path):
    with NodeServer(node(THEIRS, OURS), [DRIVER]) as found:
        yield found
    assert found.complaints == []


def run(server, tmp_path, **options):
    """Whether there was a taint, and how often it was slept."""
    file = str(server.kubeconfig(tmp_path / "kubeconfig"))

    @contextlib.asynccontextmanager
    async def cluster():
        async with cluster_client(kubeconfig=file) as (client, _):
            yield untaint.ApiNodes(client)

    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)
        await asyncio.sleep(0)
        if (then := options.get("then")) is not None:
            then(len(pauses))

    found = asyncio.run(remove(cluster, "n", DRIVER, KEY, sleep=sleep, deadline_s=300))
    return found, pauses


def test_the_taint_goes_and_others_stay(server, tmp_path):
    assert run(server, tmp_path) == (True, [])
    assert server.taints == [THEIRS]


def test_a_node_without_it_is_not_changed(server, tmp_path):
    server.node = node(THEIRS)
    assert run(server, tmp_path) == (False, [])
    server.node["spec"].pop("taints")
    assert run(server, tmp_path) == (False, [])
    assert not any(request.startswith("PATCH") for request in server.requests)


def test_it_stays_until_the_kubelet_knows_the_driver(server, tmp_path):
    server.drivers = None

    def then(pause):
        assert OURS in server.taints
        server.drivers = ["another.example.com"] if pause < 3 else ["another.example.com", DRIVER]

    found, pauses = run(server, tmp_path, then=then)
    assert found
    assert len(pauses) == 3
    assert server.taints == [THEIRS]


def test_taints_that_come_and_go_meanwhile_are_as_others_want_them(server, tmp_path):
    new = {"key": "new", "effect": "NoSchedule"}
    server.before_patch = [lambda: server.taints.insert(0, new), lambda: server.taints.remove(THEIRS)]
    found, pauses = run(server, tmp_path)
    assert found
    assert len(pauses) == 2
    assert server.taints == [new]


def test_an_api_server_that_fails_is_asked_again_with_growing_pauses(server, tmp_path):
    server.refuse = [503, 401, 403, 409, 500, 429, 422, 503]
    found, pauses = run(server, tmp_path)
    assert found
    assert len(pauses) == 8
    assert pauses[0] < 1 < pauses[4] <= 15 * 1.3
    assert server.taints == [THEIRS]


def test_what_was_wrong_is_said_when_the_deadline_has_come():
    class Refusing:
        async def taints(self, node):
            raise Forbidden("reading the node n: 403, no", hint="The driver needs get and patch on nodes.")

    @contextlib.asynccontextmanager
    async def cluster():
        yield Refusing()

    async def for_long(seconds):
        await asyncio.sleep(3600)

    with pytest.raises(Unavailable, match=r"removed within 0\.05 s: .*403, no .*needs get and patch on nodes"):
        asyncio.run(remove(cluster, "n", DRIVER, KEY, sleep=for_long, deadline_s=0.05))


def test_a_right_that_is_missing_is_said_with_what_to_give(server, tmp_path):
    file = str(server.kubeconfig(tmp_path / "kubeconfig"))

    async def ask():
        async with cluster_client(kubeconfig=file) as (client, _):
            await untaint.ApiNodes(client).taints("n")

    server.refuse = [403]
    with pytest.raises(Forbidden, match="403, told to") as error:
        asyncio.run(ask())
    assert "get and patch on nodes" in error.value.hint


def test_it_goes_with_whatever_effect_it_has(server, tmp_path):
    server.node = node(OURS, THEIRS, {**OURS, "effect": "NoSchedule", "value": "x"})
    assert run(server, tmp_path)[0]
    assert server.taints == [THEIRS]


def test_a_kubeconfig_that_is_none_says_so(tmp_path):
    async def connect():
        async with cluster_client(kubeconfig=str(tmp_path / "none")):
            pass

    with pytest.raises(UsageError, match="can't be read"):
        asyncio.run(connect())


@given(st.lists(st.sampled_from(["a", "b", KEY]).flatmap(lambda key: st.just({"key": key, "effect": "NoSchedule"}))))
def test_the_patch_removes_these_and_nothing_else(taints):
    document = {"spec": {"taints": taints}}
    after = json_patch(document, removal(taints, KEY))
    assert after["spec"]["taints"] == [taint for taint in taints if taint["key"] != KEY]
