"""What a ScaledObject's trigger asks for: its metadata, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from helios.errors import InvalidInput
from orchestrator import external
from orchestrator.signals.served import ROLES
from orchestrator.signals.values import Chosen

KEYS: Final = ("namespace", "service", "role", "revision", "metric", "target")
KEDAS: Final = ("scalerAddress", "tlsCertFile", "caCert", "tlsClientCert", "tlsClientKey", "unsafeSsl", "enableTLS")
"""Keys that are meant for KEDA itself, which sends them along."""
NAME: Final = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?\Z")
COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")
MOST_TARGET: Final = 1e12


class Asked(NamedTuple):
    """``target``: the value that one worker should have."""

    chosen: Chosen
    metric: str
    target: float


def asked(namespace: str, metadata: Mapping[str, str]) -> Asked:
    """``namespace``: the ScaledObject's. Raises InvalidInput that names the key."""
    for key in metadata:
        if key not in KEYS and key not in KEDAS:
            raise InvalidInput(f"metadata.{key[:80]} is unknown; known: {', '.join(KEYS)}")
    said = {key: metadata.get(key, "").strip() for key in KEYS}
    if said["namespace"] and said["namespace"] != namespace:
        raise InvalidInput(
            f"metadata.namespace is {said['namespace'][:80]!r}, and the ScaledObject is in {namespace[:80]!r}: "
            "a ScaledObject may ask for services of its own namespace"
        )
    if not NAME.match(namespace):
        raise InvalidInput(f"the ScaledObject's namespace {namespace[:80]!r} is no name of Kubernetes'")
    if not NAME.match(said["service"]):
        raise InvalidInput(f"metadata.service is {said['service'][:80]!r}: it has to name an InferenceService")
    if said["role"] and said["role"] not in ROLES:
        raise InvalidInput(f"metadata.role is {said['role'][:80]!r}; known: {', '.join(ROLES)}")
    if said["revision"] and not COMMIT.match(said["revision"]):
        raise InvalidInput(f"metadata.revision is {said['revision'][:80]!r}: it has to be a commit, 40 hex digits")
    known = [one.name for one in (*external.ALL, external.DESIRED)]
    metric = said["metric"] or external.DESIRED.name
    if metric not in known:
        raise InvalidInput(f"metadata.metric is {metric[:80]!r}; known: {', '.join(known)}")
    return Asked(
        Chosen(namespace, said["service"], said["role"], said["revision"]), metric, _target(said["target"], metric)
    )


def _target(text: str, metric: str) -> float:
    if not text and metric == external.DESIRED.name:
        return 1.0
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not 0 < target <= MOST_TARGET:
        raise InvalidInput(f"metadata.target is {text[:80]!r}: it has to be a number, more than 0")
    return target
