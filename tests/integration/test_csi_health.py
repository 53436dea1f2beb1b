"""How the driver says whether it works: Probe, gRPC's health checks, pages over HTTP, metrics, and the node's taint."""

import json
import os
import time
import urllib.error
import urllib.request

import grpc
import pytest

from helios.names import RepoId
from helios.node_labels import PREFIX, cached_key
from helios.rpc.health import Request, Response
from tests.fakes.kubernetes_nodes import NodeServer
from tests.support.csi import refused, running_driver
from tests.support.mounts import mounted, push, write

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may bind-mount"),
]
FILES = {"config.json": b"{}"}
TAINT = "helios.dev/agent-not-ready"
SERVING, NOT_SERVING = 1, 2


def eventually(what, within_s=30.0):
    end = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
    return found


def page(driver, path):
    """Status and text of one of its pages."""
    lines = [json.loads(line) for line in driver.log.read_text().splitlines() if line.startswith("{")]
    (url,) = [line["http"] for line in lines if line["message"] == "serving"][-1:]
    try:
        with urllib.request.urlopen(url + path, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def check(driver, service=""):
    call = driver.client.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=Request.SerializeToString,
        response_deserializer=Response.FromString,
    )
    return call(Request(service=service), timeout=10).status


def metric(driver, line):
    _, text = page(driver, "/metrics")
    found = [each.split(" ")[-1] for each in text.splitlines() if each.startswith(f"{line} ")]
    return float(found[0]) if found else None


def test_the_driver_answers_at_once_and_is_ready_when_the_mount_is(helios_home, helios, tmp_path):
    helios("push", str(write(tmp_path / "m", FILES)), "org/name")
    with running_driver(helios_home, tmp_path, HELIOS_CSI__LISTEN="127.0.0.1:0", HELIOS_LOG__FORMAT="json") as driver:
        assert driver.client.NodeGetInfo().node_id == "node-1"
        assert not driver.client.Probe().ready.value
        assert (check(driver), check(driver, "readiness"), check(driver, "liveness")) == (2, NOT_SERVING, SERVING)
        with refused("NOT_FOUND", "known: '', 'readiness', 'liveness'"):
            check(driver, "another")
        assert page(driver, "/healthz") == (200, "ok\n")
        status, why = page(driver, "/readyz")
        assert status == 503
        assert "mount" in why
        watch = driver.client.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )(Request(), timeout=60)
        assert next(watch).status == NOT_SERVING
        with mounted(helios_home, tmp_path / "mnt"):
            assert next(watch).status == SERVING
            watch.cancel()
            assert driver.client.Probe().ready.value
            assert check(driver) == SERVING
            assert page(driver, "/readyz") == (200, "ok\n")
            target = driver.target("pod")
            driver.publish("v", target, model="org/name")
            with refused("NOT_FOUND"):
                driver.publish("w", driver.target("other"), model="org/nothing")
            assert metric(driver, 'helios_csi_calls_total{call="NodePublishVolume",status="OK"}') == 1
            assert metric(driver, 'helios_csi_calls_total{call="NodePublishVolume",status="NOT_FOUND"}') == 1
            assert metric(driver, 'helios_csi_call_seconds_count{call="NodePublishVolume"}') == 2
            assert metric(driver, "helios_csi_published_volumes") == 1
            assert metric(driver, "helios_csi_ready") == metric(driver, "helios_csi_live") == 1
            driver.unpublish("v", target)
            assert metric(driver, "helios_csi_published_volumes") == 0
        # A mount that goes away comes back by itself: nothing is to be restarted for it.
        assert page(driver, "/healthz") == (200, "ok\n")
        assert page(driver, "/readyz")[0] == 200


def at_cluster(cluster, **more):
    """Settings of a driver in a pod of this cluster."""
    account = {"HELIOS_CSI__SERVICE_ACCOUNT": str(cluster.account)}
    pages = {"HELIOS_CSI__LISTEN": "127.0.0.1:0", "HELIOS_LOG__FORMAT": "json"}
    return {**cluster.environ, **account, **pages, **more}


def test_the_taint_goes_when_the_node_is_ready_and_not_before(helios_home, tmp_path):
    ours, theirs = ({"key": key, "effect": "NoExecute"} for key in (TAINT, "another"))
    node = {"metadata": {"name": "node-1"}, "spec": {"taints": [ours, theirs]}}
    with NodeServer(node, tmp_path, ["csi.helios.dev"]) as cluster:
        env = at_cluster(cluster, HELIOS_CSI__STARTUP_TAINT=TAINT)
        with running_driver(helios_home, tmp_path, **env) as driver:
            assert metric(driver, "helios_csi_startup_taint") == 1
            assert cluster.requests == []  # nobody looks before there is a mount
            with mounted(helios_home, tmp_path / "mnt"):
                eventually(lambda: cluster.taints == [theirs], 60)
                eventually(lambda: metric(driver, "helios_csi_startup_taint") == 0)
        assert cluster.complaints == []


def test_the_node_says_which_models_are_here(helios_home, helios, tmp_path):
    """Of two models one is read: it has a label, and what a driver of before left has none. After an eviction the next
    driver takes the label away; an API server that is silent keeps no pod waiting."""
    commits = {}
    for name in ("org/here", "org/elsewhere"):
        files = {"config.json": name.encode(), "model.bin": name.encode() * 9}
        commits[name] = push(helios_home, write(tmp_path / name, files), name)
    here, stale = cached_key(RepoId.parse("org/here"), commits["org/here"]), f"{PREFIX}{'0' * 16}"
    theirs = {"kubernetes.io/hostname": "node-1"}
    node = {"metadata": {"name": "node-1", "labels": {**theirs, stale: "whole"}}, "spec": {}}
    with NodeServer(node, tmp_path) as cluster, mounted(helios_home, tmp_path / "mnt") as mount:
        (mount.path / "org/elsewhere" / commits["org/elsewhere"] / "config.json").read_bytes()
        helios("warm", "org/here")
        env = at_cluster(cluster, HELIOS_CSI__NODE_LABELS="true")
        with running_driver(helios_home, tmp_path, **env) as driver:
            eventually(lambda: cluster.labels == {**theirs, here: "whole"})
            eventually(lambda: metric(driver, "helios_csi_node_labels") == 1)
            assert metric(driver, "helios_csi_startup_taint") == 0
            helios("evict", "org/here")
            driver.restart()
            eventually(lambda: cluster.labels == theirs)
            cluster.silent = True
            driver.restart()
            asked = len(cluster.requests)
            helios("warm", "org/here")
            eventually(lambda: len(cluster.requests) > asked)
            target = driver.target("pod")
            driver.publish("v", target, model="org/here")
            assert (target / "config.json").read_bytes() == b"org/here"
            driver.unpublish("v", target)
        assert cluster.complaints == []


def test_what_is_changed_at_the_cluster_needs_one(helios, tmp_path):
    command = ("csi", "--endpoint", f"unix://{tmp_path}/csi.sock", "--node-id", "n")
    env = {"HELIOS_CSI__NODE_LABELS": "true", "KUBERNETES_SERVICE_HOST": ""}
    assert "KUBERNETES_SERVICE_HOST is not set" in helios(*command, code=2, env=env).err


@pytest.mark.parametrize(
    ("setting", "value", "wrong"),
    [("LISTEN", "8080", "write host:port"), ("STARTUP_TAINT", "a/b:NoExecute", "no taint's key")],
)
def test_settings_that_can_not_be_are_refused(helios, tmp_path, setting, value, wrong):
    command = ("csi", "--endpoint", f"unix://{tmp_path}/csi.sock", "--node-id", "n")
    assert wrong in helios(*command, code=2, env={f"HELIOS_CSI__{setting}": value}).err


def test_a_watch_ends_with_the_driver(helios_home, tmp_path):
    with running_driver(helios_home, tmp_path) as driver:
        watch = driver.client.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )(Request(service="liveness"), timeout=60)
        assert next(watch).status == SERVING
        driver.process.terminate()
        begin = time.monotonic()
        with pytest.raises(grpc.RpcError):
            next(watch)
        assert time.monotonic() - begin < 40
