"""Some of the defaults and normal forms that a real API server writes into built-in kinds.

Source: pkg/apis/*/v1/defaults.go of Kubernetes, as documented at kubernetes.io/docs/reference/kubernetes-api ("Defaults
to …"), and the canonical form of quantities (apimachinery, resource.Quantity). Those that operators meet: enough that
what was applied and what is stored are not equal, as in a real cluster.
"""

from __future__ import annotations

import re
import zlib
from decimal import Decimal
from typing import Any

Manifest = dict[str, Any]
BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
DECIMAL = {"m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}


def quantity(text: Any) -> str:
    """The canonical form: no fraction, the largest suffix of its kind."""
    found = re.fullmatch(r"([+-]?[0-9.]+)([KMGTPE]i|[mkMGTPE]?)", str(text))
    if found is None:
        return str(text)
    number, suffix = Decimal(found[1]), found[2]
    if suffix in BINARY:
        whole = int(number * 2 ** BINARY[suffix])
        for name, bits in reversed(BINARY.items()):
            if whole and whole % 2**bits == 0:
                return f"{whole >> bits}{name}"
        return str(whole)
    milli = int(number * Decimal(10) ** (DECIMAL[suffix] + 3))
    for name, tens in reversed(DECIMAL.items()):
        if milli and milli % 10 ** (tens + 3) == 0:
            return f"{milli // 10 ** (tens + 3)}{name}"
    return f"{milli}m" if milli else "0"


def _put(into: Manifest, **values: Any) -> None:
    for name, value in values.items():
        into.setdefault(name, value)


def _container(one: Manifest) -> None:
    latest = ":" not in one.get("image", "").rsplit("/", 1)[-1] or one.get("image", "").endswith(":latest")
    _put(one, imagePullPolicy="Always" if latest else "IfNotPresent", resources={},
         terminationMessagePath="/dev/termination-log", terminationMessagePolicy="File")  # fmt: skip
    for port in one.get("ports", ()):
        _put(port, protocol="TCP")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if name in one:
            _put(one[name], failureThreshold=3, periodSeconds=10, successThreshold=1, timeoutSeconds=1)
            if "httpGet" in one[name]:
                _put(one[name]["httpGet"], scheme="HTTP", path="/")
    for name in ("requests", "limits"):
        if name in one["resources"]:
            one["resources"][name] = {key: quantity(value) for key, value in one["resources"][name].items()}


def _pod_spec(spec: Manifest) -> None:
    _put(spec, dnsPolicy="ClusterFirst", restartPolicy="Always", schedulerName="default-scheduler", securityContext={},
         terminationGracePeriodSeconds=30)  # fmt: skip
    for one in (*spec.get("initContainers", ()), *spec.get("containers", ())):
        _container(one)
    for one in spec.get("volumes", ()):
        for name in ("configMap", "secret", "projected"):
            if name in one:
                _put(one[name], defaultMode=420)


def _deployment(one: Manifest) -> None:
    spec = one["spec"]
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}}
    _put(spec, replicas=1, progressDeadlineSeconds=600, revisionHistoryLimit=10, strategy=rolling)
    if spec["strategy"].get("type") == "RollingUpdate":
        spec["strategy"].setdefault("rollingUpdate", {})
        _put(spec["strategy"]["rollingUpdate"], maxSurge="25%", maxUnavailable="25%")
    _put(spec["template"].setdefault("metadata", {}), creationTimestamp=None)
    del spec["template"]["metadata"]["creationTimestamp"]
    _pod_spec(spec["template"]["spec"])


def _service(one: Manifest) -> None:
    spec = one["spec"]
    _put(spec, type="ClusterIP", sessionAffinity="None", internalTrafficPolicy="Cluster", ipFamilyPolicy="SingleStack",
         ipFamilies=["IPv4"])  # fmt: skip
    if spec.get("clusterIP") != "None":
        _put(spec, clusterIP=f"10.96.{zlib.crc32(one['metadata']['name'].encode()) % 250}.1")
    _put(spec, clusterIPs=[spec["clusterIP"]])
    for port in spec.get("ports", ()):
        _put(port, protocol="TCP", targetPort=port["port"])


def _autoscaler(one: Manifest) -> None:
    _put(one["spec"], minReplicas=1)


def _policy(one: Manifest) -> None:
    spec = one["spec"]
    _put(spec, policyTypes=["Ingress", *(["Egress"] if "egress" in spec else [])])
    for rule in (*spec.get("ingress", ()), *spec.get("egress", ())):
        for port in rule.get("ports", ()):
            _put(port, protocol="TCP")


DEFAULTS = {
    "Deployment": _deployment,
    "Service": _service,
    "HorizontalPodAutoscaler": _autoscaler,
    "NetworkPolicy": _policy,
    "Pod": lambda one: _pod_spec(one["spec"]),
}
