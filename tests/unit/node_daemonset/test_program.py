"""Each argument, setting, port and path that a manifest names is the program's."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from csi.server import GRACE_S, socket_of
from csi.server import check as check_csi
from helios.home import SOCKET_PATH_MAX, Home
from heliosfs.keeper.wire import NEXT
from orchestrator.operator import STOP_S
from orchestrator.operator import check as check_operator
from registry.api import health
from router.processes.supervisor import BEYOND_S
from router.routes import PROBES
from tests.support.chart import Chart, Refused
from tests.support.manifests import command_line, containers, environment, pods, settings
from tests.unit.node_daemonset.conftest import VALUES

OURS = "registry.example/helios/"
DRIVER = Path(__file__).parents[3] / "csi"
CHART = Path(__file__).parents[3] / "node-daemonset" / "chart"
Objects = list[dict[str, Any]]


def ours(objects: Objects):
    """Workload, pod and container of each of our images, but for the one that makes a directory."""
    for name, pod in pods(objects):
        for container in containers(pod):
            if container["image"].startswith(OURS) and container["name"] != "mount-point":
                yield name, pod, container


def toml_of(objects: Objects, pod: dict[str, Any]) -> str:
    names = {each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each}
    texts = [
        each["data"]["helios.toml"]
        for each in objects
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] in names
    ]
    return "".join(texts)


def named(objects: Objects, kind: str, end: str) -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(end)]
    return found


def test_commands_take_their_arguments(objects: Objects):
    seen = {
        container["image"].removeprefix(OURS).split(":")[0]: command_line(container)[0]
        for _, _, container in ours(objects)
    }
    known = {
        "keeper": "heliosfs.keeper",
        "worker": "heliosfs",
        "csi": "csi",
        "registry": "registry",
        "router": "router",
        "operator": "operator",
    }
    assert seen == {part: known[part] for part in seen}
    assert seen


def test_settings_are_known_and_what_the_values_say(objects: Objects):
    for _, pod, container in ours(objects):
        found = settings(container, toml_of(objects, pod))
        check_csi(found.csi)
        check_operator(found.operator)
        assert found.log.format == ("auto" if container["name"] == "keeper" else "json")


def test_more_settings_reach_the_program_beside_those_of_the_chart(everything: Objects):
    by_name = {c["name"]: settings(c, toml_of(everything, p)) for _, p, c in ours(everything)}
    mount = by_name["worker"].mount
    assert (mount.pool_mib, mount.shadow_percent, mount.cache_limit_gib) == (256, 1.5, 800.5)
    assert (mount.cache, mount.l2, mount.l2_min_free) == ("/nvme/models", "/ssd/models", 0.1)
    assert by_name["worker"].registry.offline is True
    assert by_name["worker"].registry.urls == ["http://helios-registry.helios.svc:8470"]
    registry = by_name["registry"].registry
    assert registry.tenants["acme"].namespaces == ["acme", "acme-*"]
    assert (registry.store, registry.quotas[0].stored_gib, registry.gc_every_s) == ("/store", 500, 3600)
    router = by_name["router"].router
    assert router.discovery.hold is True
    assert router.discovery.kubernetes.slices == "app=vllm,tier!=test"
    assert router.discovery.kubernetes.silence_s == 80
    assert router.discovery.registrars == "/etc/helios/registrars/tokens"
    assert router.admission.keys == "/etc/helios/keys/keys"
    assert router.admission.queue.per_worker == 64
    assert router.admission.hold is True, "the operator wakes what requests are held for"
    csi = by_name["driver"].csi
    assert csi.driver == "models.example.com"
    operator = by_name["operator"].operator
    assert (operator.workers, operator.resync_s, operator.namespace) == (16, 300, "models")
    assert (operator.lease_name, operator.lease_namespace) == ("helios-operator", "helios")
    assert operator.signals.router_services == ["helios/helios-router-headless", "models/helios-picker-headless"]
    assert (operator.site.picker_service, operator.site.picker_port) == ("helios-picker", 9002)
    picker = by_name["picker"].router
    assert (picker.picker.listen, picker.picker.endpoints, picker.policy) == ("0.0.0.0:9002", 2, "queue-depth")
    assert picker.picker.tls_cert == "/etc/helios/picker-tls/tls.crt"
    assert (picker.admission.keys, picker.admission.hold) == ("/etc/helios/keys/keys", True)
    assert picker.discovery.kubernetes.namespace == "models"
    assert (operator.signals.poll_s, operator.signals.token_file) == (2, "/etc/helios/demand-token/token")
    assert operator.signals.external_tls.cert == "/etc/helios/external-metrics/tls.crt"
    assert router.demand_tokens == "/etc/helios/demand-tokens/tokens"
    assert by_name["operator"].registry.urls == ["http://helios-registry.helios.svc:8470"]


def test_settings_that_the_chart_says_are_refused_in_what_is_said_besides(chart: Chart, everything: Objects):
    """Each variable that a template sets would win over the same setting in a ``config``, unseen."""
    mine = {
        "worker": ("mount", "registry"),
        "registry": ("registry",),
        "router": ("router",),
        "picker": ("router",),
        "operator": ("operator",),
    }
    for _, _, container in ours(everything):
        for name in environment(container) if container["name"] in mine else []:
            section, _, key = name.removeprefix("HELIOS_").lower().partition("__")
            if section not in mine[container["name"]] or key in (
                "discovery",
                "admission",
                "picker",
                "signals",
                "site",
            ):  # parts of which are
                continue
            config = (
                {section: {key: VALID.get(key, "7")}} if container["name"] == "worker" else {key: VALID.get(key, "7")}
            )
            values = {**VALUES["everything"][container["name"]], "config": config}
            with pytest.raises(Refused, match="is said by"):
                chart.files({**VALUES["everything"], container["name"]: values})


VALID = {
    "urls": ["http://a"],
    **dict.fromkeys(("admin_port",), 7),
    **dict.fromkeys(("cache_limit_gib", "cache_min_free", "l2_limit_gib", "l2_min_free"), 0.5),
}
"""A value of the right type, where that is no text."""


def test_files_that_are_named_are_mounted(objects: Objects):
    for name, pod, container in ours(objects):
        mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        places = [value for value in environment(container).values() if value.startswith("/")]
        places += [part for part in container["args"] if part.startswith("/") and "kubelet" not in part]
        for place in places:
            assert any(PurePosixPath(place).is_relative_to(mount) for mount in mounted), (name, place, mounted)
        volumes = {each["name"] for each in pod["spec"]["volumes"]}
        volumes |= {"home"} if name.endswith("registry") else set()  # a template of the StatefulSet
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_every_volume_is_used_and_every_mount_has_one(objects: Objects):
    for each in objects:
        if each["kind"] not in ("DaemonSet", "Deployment", "StatefulSet"):
            continue
        pod = each["spec"]["template"]
        volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
        volumes += [volume["metadata"]["name"] for volume in each["spec"].get("volumeClaimTemplates", [])]
        used = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        assert sorted(volumes) == sorted(used), each["metadata"]["name"]


def test_ports_are_those_that_are_listened_at(everything: Objects):
    listened = {
        "registry": lambda found, given: {"http": given["port"]},
        "router": lambda found, given: {"http": given["port"], "admin": found.router.admin_port},
        "picker": lambda found, given: {
            "http": given["port"],
            "admin": found.router.admin_port,
            "ext-proc": int(found.router.picker.listen.rpartition(":")[2]),
        },
        "worker": lambda found, given: {"metrics": int(found.mount.listen.rpartition(":")[2])},
        "driver": lambda found, given: {"health": int(found.csi.listen.rpartition(":")[2])},
        "operator": lambda found, given: {
            "health": int(found.operator.listen.rpartition(":")[2]),
            "scaler": int(found.operator.signals.scaler_listen.rpartition(":")[2]),
            "external": int(found.operator.signals.external_listen.rpartition(":")[2]),
        },
    }
    for _, pod, container in ours(everything):
        expected = listened.get(container["name"])
        if expected is not None:
            ports = {each["name"]: each["containerPort"] for each in container["ports"]}
            assert ports == expected(settings(container, toml_of(everything, pod)), command_line(container)[1])


def test_probes_ask_for_pages_that_there_are(objects: Objects):
    pages = {
        "registry": {route.path for route in health.routes()},
        "router": {page.decode() for page in PROBES},
        "picker": {page.decode() for page in PROBES},
        "worker": {"/healthz", "/readyz", "/metrics"},  # docs/control-api.md; the integration tests ask for them
        "operator": {"/healthz", "/readyz"},  # helios/http/front.py, as the driver
        "driver": {"/healthz", "/readyz"},  # docs/csi.md; the integration tests ask for them
    }
    for _, pod in pods(objects):
        names = {port["name"]: port["containerPort"] for c in containers(pod) for port in c.get("ports", [])}
        for container in containers(pod):
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                if kind in container:
                    page = container[kind]["httpGet"]
                    assert page["port"] in {port["name"] for port in container["ports"]}
                    assert page["port"] in names
                    assert page["path"] in pages.get(container["name"], {"/healthz", "/healthz/leader-election"})


def test_the_three_daemonsets_see_one_mount_at_one_path(everything: Objects):
    found = {c["name"]: command_line(c)[1] for _, _, c in ours(everything) if c["name"] in ("keeper", "worker")}
    driver = next(
        c for c in containers(named(everything, "DaemonSet", "csi-node")["spec"]["template"]) if c["name"] == "driver"
    )
    place = found["keeper"]["mountpoint"]
    assert (
        place
        == found["worker"]["mountpoint"]
        == str(command_line(driver)[1]["mount"])
        == "/mnt/nvme/helios/mounts/models"
    )
    worker = next(c for _, _, c in ours(everything) if c["name"] == "worker")
    assert environment(worker)["HELIOS_KEEPER"] == found["keeper"]["socket"]
    assert environment(worker)["HELIOS_HOME"] == environment(driver)["HELIOS_HOME"], "the control socket is found there"
    parent = place.rpartition("/")[0]
    propagation = {}
    for name in ("keeper", "worker", "csi-node"):
        pod = named(everything, "DaemonSet", name)["spec"]["template"]
        container = pod["spec"]["containers"][0]
        (volume,) = [v["name"] for v in pod["spec"]["volumes"] if v.get("hostPath", {}).get("path") == parent]
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == volume]
        assert mount["mountPath"] == parent, "a mount's path is the same in all of them"
        propagation[name] = mount["mountPropagation"]
    assert propagation == {"keeper": "Bidirectional", "worker": "HostToContainer", "csi-node": "HostToContainer"}


def test_sockets_fit_below_the_longest_root_that_the_chart_takes():
    """A longer path would be replaced by one in /tmp, which the driver's container does not share."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    root = "/" + "x" * (schema["properties"]["node"]["properties"]["root"]["maxLength"] - 1)
    control = Home(Path(root, "home")).run / f"mount-{0:016x}.sock"
    assert len(str(control)) <= SOCKET_PATH_MAX
    assert len(f"{root}/keeper/models.sock{NEXT}") <= 107


def test_the_mount_point_is_made_before_the_keeper_mounts(everything: Objects):
    pod = named(everything, "DaemonSet", "keeper")["spec"]["template"]
    (first,) = pod["spec"]["initContainers"]
    assert first["command"][-1] == command_line(pod["spec"]["containers"][0])[1]["mountpoint"]
    assert "-p" not in first["command"][2].split()[1:], "mkdir -p looks at a mount that may not answer"


def test_the_kubelet_finds_the_driver_at_its_socket(everything: Objects):
    pod = named(everything, "DaemonSet", "csi-node")["spec"]["template"]
    by_name = {container["name"]: container for container in pod["spec"]["containers"]}
    given = command_line(by_name["driver"])[1]
    socket = socket_of(given["endpoint"])
    host = {v["name"]: v["hostPath"]["path"] for v in pod["spec"]["volumes"] if "hostPath" in v}
    for container in by_name.values():
        (plugin,) = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == str(socket.parent)]
        arguments = dict(a.split("=", 1) for a in container["args"] if a.startswith("--") and "=" in a)
        assert arguments.get("--csi-address", str(socket)) == str(socket)
        if "--kubelet-registration-path" in arguments:
            assert arguments["--kubelet-registration-path"] == f"{host[plugin]}/{socket.name}"
    driver = named(everything, "CSIDriver", "")["metadata"]["name"]
    assert settings(by_name["driver"]).csi.driver == driver
    assert host["plugin"].endswith(f"/plugins/{driver}")
    kubelet = next(m for m in by_name["driver"]["volumeMounts"] if m["name"] == "kubelet")
    assert kubelet["mountPath"] == host["kubelet"] == str(given["kubelet_dir"])
    assert kubelet["mountPropagation"] == "Bidirectional"
    assert {each["provisioner"] for each in everything if each["kind"] == "StorageClass"} == {driver}


def test_grace_periods_cover_what_the_program_takes_to_end(everything: Objects):
    router = named(everything, "Deployment", "router")["spec"]["template"]
    before = int(router["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = settings(router["spec"]["containers"][0], toml_of(everything, router)).router.drain_s
    assert drain == 90
    assert router["spec"]["terminationGracePeriodSeconds"] >= before + drain + BEYOND_S
    for kind, name in (("DaemonSet", "csi-node"), ("Deployment", "csi-controller")):
        assert named(everything, kind, name)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 2 * GRACE_S
    operator = named(everything, "Deployment", "operator")["spec"]["template"]["spec"]
    assert operator["terminationGracePeriodSeconds"] >= 2 * STOP_S


def test_the_keeper_is_not_replaced_by_an_upgrade_and_the_worker_takes_over(everything: Objects):
    assert named(everything, "DaemonSet", "keeper")["spec"]["updateStrategy"] == {"type": "OnDelete"}
    rolling = named(everything, "DaemonSet", "worker")["spec"]["updateStrategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
    worker = next(c for _, _, c in ours(everything) if c["name"] == "worker")
    (name,) = [each for each in worker["env"] if each["name"] == "HELIOS_WORKER"]
    assert name["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.uid"
    assert next(c for _, _, c in ours(everything) if c["name"] == "keeper")["image"].endswith("/keeper:5")
    assert worker["image"].endswith("/worker:7")


def test_pods_tokens_are_requested_where_the_driver_asks_for_them(chart: Chart, everything: Objects):
    spec = named(everything, "CSIDriver", "")["spec"]
    pod = named(everything, "DaemonSet", "csi-node")["spec"]["template"]["spec"]
    (driver,) = (each for each in pod["containers"] if each["name"] == "driver")
    csi = settings(driver).csi
    assert (csi.authorise, csi.audience) == ("token", "models")
    assert [request["audience"] for request in spec["tokenRequests"]] == [csi.audience]
    plain = chart.objects({**VALUES["everything"], "csi": {"authorise": "namespace"}})
    assert "tokenRequests" not in named(plain, "CSIDriver", "")["spec"]
    assert (spec["podInfoOnMount"], spec["requiresRepublish"], spec["attachRequired"]) == (True, True, False)
    assert spec["volumeLifecycleModes"] == ["Persistent", "Ephemeral"]
    assert spec["fsGroupPolicy"] == "None"
