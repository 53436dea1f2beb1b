"""Claims of a Model: for each commit in use a PersistentVolume that names it, and the claim that is bound to that.

Not through a provisioner: a StorageClass names a revision, and what that is when the claim is made need not be the
commit that was meant (docs/csi.md, Volumes from a StorageClass).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from helios.kube.kinds import PERSISTENT_VOLUME, PERSISTENT_VOLUME_CLAIM
from orchestrator.actions import OWNER_LABEL, Apply, Ref
from orchestrator.reconcile import names
from orchestrator.reconcile.deployment import metadata
from orchestrator.reconcile.observed import ModelSeen
from orchestrator.reconcile.pod import claim_name, volume_attributes, volume_name
from orchestrator.reconcile.site import Site

SIZE: Final = "1Gi"
"""Volumes take no room; a claim has to say something, and may not change it."""


def claims(owner: Ref, model: ModelSeen, commits: Iterable[str], site: Site) -> list[Apply]:
    found = []
    for commit in commits:
        found += [_volume(owner, model, commit, site), _claim(owner, model, commit)]
    return found


def _volume(owner: Ref, model: ModelSeen, commit: str, site: Site) -> Apply:
    name = volume_name(owner.namespace, model, commit)
    labels = {**names.labels(model.name, "volume", "model"), OWNER_LABEL: owner.uid}
    attributes = volume_attributes(model, commit)
    manifest = {
        "apiVersion": PERSISTENT_VOLUME.api_version,
        "kind": PERSISTENT_VOLUME.kind,
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "capacity": {"storage": SIZE},
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": model.spec.storage.storage_class_name or "",
            "claimRef": {"namespace": owner.namespace, "name": claim_name(model, commit)},
            "csi": {
                "driver": site.csi_driver, "volumeHandle": name, "readOnly": True, "volumeAttributes": attributes,
            },
        },
    }  # fmt: skip
    return Apply(PERSISTENT_VOLUME, manifest)


def _claim(owner: Ref, model: ModelSeen, commit: str) -> Apply:
    described = metadata(owner, claim_name(model, commit), names.labels(model.name, "volume", "model"))
    manifest = {
        "apiVersion": PERSISTENT_VOLUME_CLAIM.api_version,
        "kind": PERSISTENT_VOLUME_CLAIM.kind,
        "metadata": described,
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": model.spec.storage.storage_class_name or "",
            "volumeName": volume_name(owner.namespace, model, commit),
            "resources": {"requests": {"storage": SIZE}},
        },
    }
    return Apply(PERSISTENT_VOLUME_CLAIM, manifest)
