"""The pod of a worker, as docs/worker.md describes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from helios import worker_labels
from helios.config import ServedSettings
from helios.launch.grace import grace_s
from helios.names import RepoId
from helios.node_labels import PART, WHOLE, cached_key
from orchestrator.actions import Ref
from orchestrator.api.common import FreeForm, plain
from orchestrator.api.service import Placement, Role, ServiceSpec
from orchestrator.reconcile import names
from orchestrator.reconcile.connectors import KV, directory, wiring
from orchestrator.reconcile.observed import ModelSeen
from orchestrator.reconcile.site import Site

DEFAULTS: Final = ServedSettings()
USER: Final = 10001
"""Of the images (node-daemonset/images)."""
HOME: Final = "/var/lib/helios"
REGISTRAR: Final = "/etc/helios/registrar"
REGISTRY_TOKEN: Final = "/etc/helios/registry"  # noqa: S105 - a directory
COMPILE_KEY: Final = "/etc/helios/compile"
HOOK_S: Final = 25
"""What the preStop hook may take beyond the drain, in seconds: routers take the registration back."""
ZONE: Final = "topology.kubernetes.io/zone"
SIDECAR: Final = "traffic.sidecar.istio.io"
CAPTURED: Final = (DEFAULTS.vllm_port, DEFAULTS.port)
"""Ports that a mesh may take: KV blocks go over others, which NIXL chooses itself."""


class Workers(msgspec.Struct, frozen=True):
    """The workers of one service, role and commit: what builders are told."""

    owner: Ref
    spec: ServiceSpec
    model: ModelSeen
    commit: str
    role: str
    site: Site

    @property
    def service(self) -> str:
        return self.owner.name

    @property
    def namespace(self) -> str:
        return self.owner.namespace

    @property
    def name(self) -> str:
        return names.of_revision(self.service, self.role, self.commit)

    @property
    def settings(self) -> Role:
        role: Role | None = getattr(self.spec, names.ROLES[self.role])
        return role or Role()

    @property
    def placement(self) -> Placement:
        return self.settings.placement or self.spec.placement

    @property
    def repo(self) -> str:
        return self.model.spec.source.repo

    @property
    def served(self) -> str:
        return self.spec.served_name or self.repo

    @property
    def selector(self) -> dict[str, str]:
        return names.selector(self.service, self.role, self.commit)

    @property
    def labels(self) -> dict[str, str]:
        return {**names.labels(self.service, self.role), "app.kubernetes.io/version": self.commit, **self.selector}


def template(its: Workers) -> FreeForm:
    """The pod template of a Deployment."""
    return {
        "metadata": {"labels": {**its.labels, **worker_labels.SELECTED}, "annotations": _annotations(its)},
        "spec": _spec(its),
    }


def _annotations(its: Workers) -> dict[str, str]:
    found = {worker_labels.MODEL: its.served}
    if its.site.mesh != "off":
        found[f"{SIDECAR}/includeInboundPorts"] = ",".join(map(str, CAPTURED))
        if its.role != "both":
            # A port that NIXL takes at the other end can't be named: what is captured is, and only that.
            found[f"{SIDECAR}/includeOutboundIPRanges"] = ""
            found[f"{SIDECAR}/includeOutboundPorts"] = ",".join(map(str, _called(its.site)))
        found["proxy.istio.io/config"] = '{"holdApplicationUntilProxyStarts":true}'
    return found


def _called(site: Site) -> list[int]:
    """Ports at which workers call others than each other."""
    urls = [urlsplit(url) for url in (*site.routers, *site.registry_urls)]
    return sorted({url.port or (443 if url.scheme == "https" else 80) for url in urls})


def _spec(its: Workers) -> FreeForm:
    placement, accelerator = its.placement, its.settings.accelerator
    selector = dict(placement.node_selector)
    tolerations = list(map(plain, placement.tolerations))
    if accelerator.count:
        tolerations.append({"key": accelerator.resource, "operator": "Exists", "effect": "NoSchedule"})
        if accelerator.type is not None:
            selector[accelerator.label] = accelerator.type
    found: FreeForm = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": math.ceil(grace_s(its.spec.engine.drain_seconds, DEFAULTS.stop_s)) + HOOK_S,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(its)],
        "volumes": _volumes(its),
    }  # fmt: skip
    more: Mapping[str, Any] = {
        "imagePullSecrets": [{"name": name} for name in its.site.pull_secrets],
        "nodeSelector": selector,
        "tolerations": tolerations,
        "affinity": _affinity(its),
        "topologySpreadConstraints": _spread(its),
        "priorityClassName": placement.priority_class_name,
        "runtimeClassName": placement.runtime_class_name,
    }
    return found | {key: value for key, value in more.items() if value}


def _affinity(its: Workers) -> FreeForm:
    found: FreeForm = {}
    if its.placement.prefer_cached:
        key = cached_key(RepoId.parse(its.repo), its.commit)
        found["nodeAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": weight,
                    "preference": {"matchExpressions": [{"key": key, "operator": "In", "values": [how]}]},
                }
                for weight, how in ((100, WHOLE), (50, PART))
            ]
        }
    if its.placement.near and its.role == "prefill":
        decode = names.selector(its.service, "decode", its.commit)
        term = {"labelSelector": {"matchLabels": decode}, "topologyKey": ZONE}
        found["podAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 80, "podAffinityTerm": term}]
        }
    return found


def _spread(its: Workers) -> list[FreeForm]:
    if its.placement.zone_spread == "None":
        return []
    anyway = its.placement.zone_spread == "Preferred"
    return [
        {
            "maxSkew": 1, "topologyKey": ZONE, "whenUnsatisfiable": "ScheduleAnyway" if anyway else "DoNotSchedule",
            "labelSelector": {"matchLabels": its.selector},
        }
    ]  # fmt: skip


def _mountpoint(its: Workers) -> str:
    return "/hub" if its.model.spec.storage.format == "hub" else "/model"


def _container(its: Workers) -> FreeForm:
    engine, role = its.spec.engine, its.settings
    image = engine.image or its.site.worker_image
    shared = directory(its.service, its.commit, its.spec, image) if engine.kv_storage is not None else ""
    wired = wiring(engine.connector, its.role, shared)
    ports = [
        (worker_labels.HTTP, DEFAULTS.vllm_port), (worker_labels.FRONT, DEFAULTS.port),
        (worker_labels.EVENTS, DEFAULTS.kv_events_port), (worker_labels.REPLAY, DEFAULTS.kv_replay_port),
    ]  # fmt: skip
    if its.role != "both":
        ports.append((worker_labels.SIDE_CHANNEL, DEFAULTS.side_channel_port))
    limits = {"memory": role.memory}
    if role.accelerator.count:
        limits[role.accelerator.resource] = str(role.accelerator.count)
    return {
        "name": "worker",
        "image": image,
        "command": ["helios"],
        "args": _arguments(its, wired.arguments),
        "env": _env(its, wired.env),
        "ports": [{"name": name, "containerPort": port} for name, port in (*ports, *wired.ports)],
        "readinessProbe": {
            "httpGet": {"path": "/readyz", "port": worker_labels.FRONT}, "periodSeconds": 2, "failureThreshold": 1,
        },
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "port": worker_labels.FRONT},
            "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3,
        },
        "lifecycle": {"preStop": {"exec": {"command": ["helios", "worker", "drain"]}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": {"requests": {"cpu": role.cpu, "memory": role.memory}, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(its),
    }  # fmt: skip


def _arguments(its: Workers, wired: tuple[str, ...]) -> list[str]:
    engine, role = its.spec.engine, its.settings
    name = its.served.replace("$(", "$$(")  # the kubelet fills in variables
    found = ["worker", _mountpoint(its), "--name", name, "--revision", its.commit, "--role", its.role]
    found += ["--host", its.site.host]
    for url in its.site.routers:
        found += ["--router", url]
    found += ["--start-timeout", str(engine.start_timeout_seconds), "--drain-timeout", str(engine.drain_seconds), "--"]
    if role.accelerator.count:
        found += ["--tensor-parallel-size", str(role.accelerator.count)]
    return [*found, *wired, *engine.args, *role.args]


def _env(its: Workers, wired: tuple[tuple[str, str], ...]) -> list[FreeForm]:
    site = its.site
    found: list[FreeForm] = [
        {"name": "HELIOS_WORKER__ADVERTISE", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "HELIOS_WORKER__ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    told = {"HELIOS_HOME": HOME, "HOME": f"{HOME}/user", "HELIOS_LOG__FORMAT": "json"}
    if site.routers and site.registrar is not None:
        told["HELIOS_WORKER__ROUTER_TOKEN_FILE"] = f"{REGISTRAR}/{site.registrar.key}"
    if site.registry_urls:
        told["HELIOS_REGISTRY__URLS"] = ",".join(site.registry_urls)
        if site.registry_token is not None:
            told["HELIOS_REGISTRY__TOKEN_FILE"] = f"{REGISTRY_TOKEN}/{site.registry_token.key}"
    if site.compile_key is not None:
        told["HELIOS_COMPILE_CACHE__KEY_FILE"] = f"{COMPILE_KEY}/{site.compile_key.key}"
    found += [{"name": name, "value": value} for name, value in (*told.items(), *wired)]
    ours = {one["name"] for one in found}
    return found + [plain(one) for one in its.spec.engine.env if one.name not in ours]


def _secrets(site: Site) -> list[tuple[str, str, str]]:
    """Name of the volume, of the Secret, and where it is mounted."""
    known = (
        ("registrar", site.registrar if site.routers else None, REGISTRAR),
        ("registry", site.registry_token if site.registry_urls else None, REGISTRY_TOKEN),
        ("compile", site.compile_key, COMPILE_KEY),
    )
    return [(volume, secret.name, at) for volume, secret, at in known if secret is not None]


def _mounts(its: Workers) -> list[FreeForm]:
    return [
        {"name": "model", "mountPath": _mountpoint(its), "readOnly": True},
        {"name": "home", "mountPath": HOME},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the container's own
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
        *({"name": volume, "mountPath": at, "readOnly": True} for volume, _, at in _secrets(its.site)),
        *([{"name": "kv", "mountPath": KV}] if its.spec.engine.kv_storage is not None else []),
    ]


def _volumes(its: Workers) -> list[FreeForm]:
    shared = its.spec.engine.kv_storage
    return [
        {"name": "model", **_model(its)},
        {"name": "home", "emptyDir": {"sizeLimit": its.settings.cache}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": its.spec.engine.shared_memory}},
        *({"name": volume, "secret": {"secretName": secret}} for volume, secret, _ in _secrets(its.site)),
        *([] if shared is None else [{"name": "kv", "persistentVolumeClaim": {"claimName": shared.claim_name}}]),
    ]


def _model(its: Workers) -> FreeForm:
    if its.model.spec.storage.volume == "Claim":
        claim = claim_name(its.model, its.commit)
        return {"persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
    attributes = volume_attributes(its.model, its.commit)
    return {"csi": {"driver": its.site.csi_driver, "readOnly": True, "volumeAttributes": attributes}}


def volume_attributes(model: ModelSeen, commit: str) -> dict[str, str]:
    """What the CSI driver is told (docs/csi.md)."""
    found = {"model": model.spec.source.repo, "revision": commit, "prefetch": "true", "priority": model.spec.priority}
    return found | ({"format": "hub"} if model.spec.storage.format == "hub" else {})


def _content(model: ModelSeen, commit: str) -> list[object]:
    """What can't be changed in a volume once it is there."""
    return [volume_attributes(model, commit), model.spec.storage.storage_class_name]


def claim_name(model: ModelSeen, commit: str) -> str:
    return names.of_claim(model.name, commit, _content(model, commit))


def volume_name(namespace: str, model: ModelSeen, commit: str) -> str:
    return names.of_volume(namespace, model.name, commit, _content(model, commit))
