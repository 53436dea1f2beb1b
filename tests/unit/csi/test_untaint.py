"""The node's startup taint goes when the kubelet knows the driver, and nothing else of the node does."""

import asyncio
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.api_server import ApiServer
from csi.calls import Calls
from csi.untaint import removal, remove
from helios.errors import Forbidden, Unavailable, UsageError
from tests.fakes.kubernetes.patches import json_patch
from tests.fakes.kubernetes_nodes import NodeServer
from tests.support.certificates import Authority

KEY = "helios.dev/agent-not-ready"
OURS = {"key": KEY, "effect": "NoExecute"}
THEIRS = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule", "timeAdded": "2026-01-01T00:00:00Z"}
DRIVER = "csi.helios.dev"


def node(*taints):
    return {"metadata": {"name": "n", "resourceVersion": "1"}, "spec": {"podCIDR": "10.0.0.0/24", "taints": [*taints]}}


@pytest.fixture
def server(tmp_path):
    with NodeServer(node(THEIRS, OURS), tmp_path, [DRIVER]) as found:
        yield found
    assert found.complaints == []


@pytest.fixture
def nodes(server):
    with closing(ApiServer(server.account, server.environ, request_s=2)) as found:
        yield found


def run(server, **options):
    """Whether there was a taint, and how often it was slept."""
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)
        await asyncio.sleep(0)
        if (then := options.get("then")) is not None:
            then(len(pauses))

    async def main():
        with closing(ApiServer(server.account, server.environ)) as nodes:
            return await remove(nodes, Calls(), "n", DRIVER, KEY, sleep=sleep)

    return asyncio.run(main()), pauses


def test_the_taint_goes_and_others_stay(server):
    assert run(server) == (True, [])
    assert server.taints == [THEIRS]


def test_a_node_without_it_is_not_changed(server):
    server.node = node(THEIRS)
    assert run(server) == (False, [])
    server.node["spec"].pop("taints")
    assert run(server) == (False, [])
    assert not any(request.startswith("PATCH") for request in server.requests)


def test_it_stays_until_the_kubelet_knows_the_driver(server):
    server.drivers = None

    def then(pause):
        assert OURS in server.taints
        server.drivers = ["another.example.com"] if pause < 3 else ["another.example.com", DRIVER]

    found, pauses = run(server, then=then)
    assert found
    assert len(pauses) == 3
    assert server.taints == [THEIRS]


def test_taints_that_come_and_go_meanwhile_are_as_others_want_them(server):
    new = {"key": "new", "effect": "NoSchedule"}
    server.before_patch = [lambda: server.taints.insert(0, new), lambda: server.taints.remove(THEIRS)]
    found, pauses = run(server)
    assert found
    assert len(pauses) == 2
    assert server.taints == [new]


def test_an_api_server_that_fails_is_asked_again_with_growing_pauses(server):
    server.refuse = [503, 401, 403, 409, 500, 429, 422, 503]
    found, pauses = run(server)
    assert found
    assert len(pauses) == 8
    assert pauses[0] < 1 < pauses[4] <= 15 * 1.3
    assert server.taints == [THEIRS]


def test_a_try_whose_answer_is_lost_is_made_again(server):
    server.torn = 1
    assert run(server) == (False, [pytest.approx(0.5, rel=0.31)])
    assert server.taints == [THEIRS]


def test_what_was_wrong_is_said_when_the_deadline_has_come():
    class Refusing:
        def taints(self, node):
            raise Forbidden("reading the node n: 403, no", hint="The driver needs get and patch on nodes.")

    async def for_long(seconds):
        await asyncio.sleep(3600)

    async def main():
        await remove(Refusing(), Calls(), "n", DRIVER, KEY, sleep=for_long, deadline_s=0.5)

    with pytest.raises(Unavailable, match=r"removed within 0\.5 s: .*403, no .*needs get and patch on nodes"):
        asyncio.run(main())


def test_a_right_that_is_missing_is_said_with_what_to_give(server, nodes):
    server.refuse = [403]
    with pytest.raises(Forbidden, match="403, told to") as error:
        nodes.taints("n")
    assert "get and patch on nodes" in error.value.hint


def test_it_goes_with_whatever_effect_it_has(server):
    server.node = node(OURS, THEIRS, {**OURS, "effect": "NoSchedule", "value": "x"})
    assert run(server)[0]
    assert server.taints == [THEIRS]


def test_a_token_that_is_renewed_is_sent_and_an_authority_too(server, nodes, monkeypatch):
    """A node's certificates may be replaced under a driver that runs for months."""
    monkeypatch.setattr("helios.tokens.LOOK_AGAIN_S", 0.0)
    assert nodes.taints("n")
    server.token = "another"
    with pytest.raises(Forbidden, match="401"):
        nodes.taints("n")
    (server.account / "token").write_text("another")
    assert nodes.taints("n")
    authority = (server.account / "ca.crt").read_bytes()
    (server.account / "ca.crt").write_bytes(Path(Authority(server.directory / "other").path).read_bytes())
    nodes.close()
    with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
        nodes.taints("n")
    (server.account / "ca.crt").write_bytes(authority)
    assert nodes.taints("n")


@pytest.mark.parametrize("missing", ["token", "ca.crt"])
def test_a_service_account_that_is_not_there_yet_is_looked_for_again(server, nodes, missing):
    content = (server.account / missing).read_bytes()
    (server.account / missing).unlink()
    with pytest.raises(Unavailable, match=f"{missing} can't be read"):
        nodes.taints("n")
    (server.account / missing).write_bytes(content)
    assert nodes.taints("n")


def test_a_silent_api_server_is_given_up_in_time(server, nodes):
    server.silent = True
    with pytest.raises(Unavailable, match="did not answer"):
        nodes.taints("n")


def test_outside_of_a_cluster_there_is_nobody_to_ask():
    with pytest.raises(UsageError, match="KUBERNETES_SERVICE_HOST"):
        ApiServer(Path("/none"), {})


@given(st.lists(st.sampled_from(["a", "b", KEY]).flatmap(lambda key: st.just({"key": key, "effect": "NoSchedule"}))))
def test_the_patch_removes_these_and_nothing_else(taints):
    document = {"spec": {"taints": taints}}
    after = json_patch(document, removal(taints, KEY))
    assert after["spec"]["taints"] == [taint for taint in taints if taint["key"] != KEY]
