"""Volumes that Kubernetes had made from a StorageClass: each is a lease on its commit at the registry, no more.

The lease is what a made volume is for: the commit stays while it exists, whatever happens to its refs. Its holder says
which volume it is, and the registry's list of leases is the list of volumes, so the controller keeps nothing itself and
any replica of it knows the same. What a pod needs (model, revision, commit) Kubernetes keeps in the PersistentVolume.

    holder = csi/1/<cluster>/<volume id>/<capacity in bytes>/<digest of what was asked for>

A volume's id is made of its name, so the same name is the same volume, and the digest tells whether the same was asked
for. Leases end after 30 days (the registry's bound) and are renewed far more often (``renew``).
"""

from __future__ import annotations

import hashlib
import re
from base64 import b32encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from csi.attributes import Wanted
from helios.registry_answers import Lease

LEASE_S: Final = 30 * 86400.0
"""How long a volume's commit stays when no controller renews it, in seconds."""
RENEW_S: Final = 86400.0
"""A lease is renewed when this much of it is gone, in seconds."""

CLUSTER: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
"""A cluster's name, a DNS label: controllers of clusters that share a registry leave each other's volumes alone."""
_HOLDER = re.compile(
    r"(?:t/[a-z0-9-]+/)?csi/1/(?P<cluster>[a-z0-9-]+)/(?P<id>helios-[a-z2-7]{32})/"
    r"(?P<capacity>\d{1,19})/(?P<asked>[0-9a-f]{32})\Z"
)
"""A tenant's leases have its name in front."""


@dataclass(frozen=True, slots=True)
class Made:
    """A volume that there is. ``capacity`` in bytes; ``asked`` is the digest of what it was asked for with; ``expires``
    in unix seconds."""

    cluster: str
    id: str
    capacity: int
    asked: str
    repo: str
    commit: str
    expires: float

    @property
    def holder(self) -> str:
        return f"csi/1/{self.cluster}/{self.id}/{self.capacity}/{self.asked}"


def volume_id(name: str) -> str:
    """The id of the volume with this name, which may be anything."""
    return f"helios-{b32encode(hashlib.sha256(name.encode()).digest()[:20]).decode().lower()}"


def digest(wanted: Wanted) -> str:
    """What tells apart what volumes were asked for with."""
    parts = [str(wanted.repo), wanted.revision, wanted.commit or "", wanted.form, repr(wanted.prefetch)]
    parts += [] if wanted.priority is None else [wanted.priority]  # volumes of before have no such part
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def read(leases: Iterable[Lease], cluster: str) -> list[Made]:
    """The cluster's volumes among the leases, by id. Two have the same id only where controllers raced each other."""
    found = []
    for lease in leases:
        match = _HOLDER.match(lease.holder)
        if match and match["cluster"] == cluster:
            capacity = int(match["capacity"])
            found.append(Made(cluster, match["id"], capacity, match["asked"], lease.repo, lease.commit, lease.expires))
    return sorted(found, key=lambda made: (made.id, made.holder, made.commit))


def due(volumes: Iterable[Made], now: float) -> list[Made]:
    """Those whose lease is to be renewed."""
    return [made for made in volumes if made.expires - now < LEASE_S - RENEW_S]
