"""Names and labels of what is made. They follow from the resource alone, so that whoever comes next finds it again."""

from __future__ import annotations

import hashlib
import re
from typing import Final

import msgspec

from helios import worker_labels
from orchestrator.actions import MANAGER
from orchestrator.api.common import GROUP

ROLES: Final = {"both": "aggregated", "prefill": "prefill", "decode": "decode"}
"""What a worker computes, as ``helios worker --role`` has it -> the field of the resource that says how."""

LONGEST: Final = 63
WORKLOAD: Final = 47
"""Longest name of a Deployment: what ReplicaSets and pods add to it (16 characters) still is a label."""
SHORT: Final = 10
"""Digits of a commit in a name."""

SERVICE: Final = f"{GROUP}/service"
MODEL: Final = f"{GROUP}/model-name"
PREFETCH: Final = f"{GROUP}/prefetch"

_HASH: Final = 8


def short(commit: str) -> str:
    return commit[:SHORT]


def bounded(name: str, longest: int = LONGEST) -> str:
    """The name, or where it is too long its beginning and a hash of it all."""
    if len(name) <= longest:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH]
    return f"{name[: longest - _HASH - 1].rstrip('-.')}-{digest}"


def of_revision(service: str, role: str, commit: str) -> str:
    """The name of what there is for each role and commit: its Deployment, its Service, its autoscaler.

    No two are the same: the role is one of three words, and the commit has no hyphen."""
    return dns_1035(f"{service}-{role}-{short(commit)}", WORKLOAD)


def of_role(service: str, role: str) -> str:
    return bounded(f"{service}-{role}")


def of_service(service: str) -> str:
    """The name of the Service that clients may use without a router."""
    return dns_1035(service)


def dns_1035(name: str, longest: int = LONGEST) -> str:
    """A Service's name has to begin with a letter; where it doesn't, one comes before it, and a hash behind it."""
    if not name[:1].isdigit():
        return bounded(name, longest)
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH]
    return f"h{name[: longest - _HASH - 2].rstrip('-.')}-{digest}"


def of_claim(model: str, commit: str, content: object) -> str:
    """``content``: what can't be changed in it; another one is another claim."""
    return bounded(f"{model}-{short(commit)}-{digest_of(content)[:_HASH]}")


def of_volume(namespace: str, model: str, commit: str, content: object) -> str:
    """A PersistentVolume's name, and its handle. It is in no namespace, so the hash is of all of it."""
    return f"helios-{bounded(model, 32)}-{digest_of([namespace, model, commit, content])[:16]}"


def of_prefetch(model: str, content: object) -> str:
    """``content``: all of the pod's spec, which can't be changed."""
    return f"{bounded(model, 40)}-prefetch-{digest_of(content)[:12]}"


def digest_of(content: object) -> str:
    """Hexadecimal, the same for the same JSON."""
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def selector(service: str, role: str = "", commit: str = "") -> dict[str, str]:
    """The labels by which pods of a service are found, of one role and commit if these are said."""
    found = {SERVICE: service}
    if role:
        found[worker_labels.ROLE] = role
    if commit:
        found[worker_labels.REVISION] = commit
    return found


def labels(instance: str, component: str, name: str = "vllm") -> dict[str, str]:
    """The recommended labels (kubernetes.io/docs, "Recommended Labels")."""
    return {
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/instance": instance,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "helios",
        "app.kubernetes.io/managed-by": MANAGER,
    }


def legal_label(value: str) -> bool:
    """Whether it can be a label's value."""
    return len(value) <= LONGEST and re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?", value) is not None
