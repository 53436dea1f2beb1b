"""Whether an object is as it was applied: what costs a write and what does not. No I/O.

An object is applied with the digest of what was asked for in an annotation. A write is due when

- the annotation has another digest: something else is wanted now, a field may be wanted no more; or
- a field that is wanted is not so in the object: somebody changed it. Only wanted fields are looked at, in lists that
  have keys (containers by name, ports by number) element by element, so what others add and own is theirs.

The API server writes some values its own way (``1000m`` is ``1``, defaults inside of lists). What it made of the last
apply is remembered, as the digest of the wanted fields' values in its answer; as long as they are so nothing is due.

Which lists have keys is Kubernetes' ``x-kubernetes-list-map-keys``
(kubernetes.io/docs/reference/using-api/server-side-apply, "Merge strategy"); tests compare the table with its schemas.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from orchestrator.actions import Ref

APPLIED: Final = "helios.dev/applied"
"""Annotation with the digest of what was applied."""

_NAME = ("name",)
_CONTAINERS: Final = ("containers", "initContainers", "ephemeralContainers")
KEYS: Final[Mapping[tuple[str, str], Sequence[str]]] = {
    **{
        ("spec", name): _NAME
        for name in (*_CONTAINERS, "volumes", "imagePullSecrets", "resourceClaims", "schedulingGates")
    },
    ("spec", "hostAliases"): ("ip",),
    ("spec", "ports"): ("port", "protocol"),
    ("spec", "topologySpreadConstraints"): ("topologyKey", "whenUnsatisfiable"),
    ("metadata", "ownerReferences"): ("uid",),
    ("resources", "claims"): _NAME,
    **{(of, "env"): _NAME for of in _CONTAINERS},
    **{(of, "ports"): ("containerPort", "protocol") for of in _CONTAINERS},
    **{(of, "volumeDevices"): ("devicePath",) for of in _CONTAINERS},
    **{(of, "volumeMounts"): ("mountPath",) for of in _CONTAINERS},
}
"""Where a list is, by the names of what it is in and of itself -> the keys that tell its elements apart."""
DEFAULTS: Final = {"protocol": "TCP"}
"""What a key is that is left out."""
SETS: Final = frozenset({"finalizers"})
"""Lists of texts that others may add to."""

REPAIRS: Final = 5
"""So many repairs of one object are made at once..."""
REPAIR_S: Final = 30.0
"""...and then one each so many seconds: who else insists is another controller, or a person who should know."""
MOST: Final = 10_000

_MISSING: Final = "\0missing"


class Repairs:
    """How often objects were repaired, so that two who both insist don't keep the API server busy."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: OrderedDict[Ref, tuple[float, float]] = OrderedDict()

    def wait_s(self, ref: Ref) -> float:
        """0: it may be repaired now, and is counted; else in so many seconds."""
        now = self._clock()
        left, at = self._known.pop(ref, (float(REPAIRS), now))
        left = min(REPAIRS, left + (now - at) / REPAIR_S)
        may = left >= 1
        self._known[ref] = (left - may, now)
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        return 0.0 if may else (1 - left) * REPAIR_S


def digest(value: Any) -> str:
    """32 hexadecimal digits of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(msgspec.json.encode(value, order="sorted"), digest_size=16).hexdigest()


def shown(wanted: Any, found: Any, within: str = "", name: str = "") -> Any:
    """The values that ``found`` has where ``wanted`` says something; ``name``: of both, which are in ``within``."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return {key: shown(value, found.get(key, _MISSING), name, key) for key, value in wanted.items()}
    if not (isinstance(wanted, list) and isinstance(found, list)):
        return found
    if name in SETS:
        return [one if one in found else _MISSING for one in wanted]
    if keys := KEYS.get((within, name)):
        there = {_key(one, keys): one for one in found if isinstance(one, dict)}
        return [shown(one, there.get(_key(one, keys), _MISSING), within, name) for one in wanted]
    if len(wanted) != len(found):
        return found
    return [shown(one, other, within, name) for one, other in zip(wanted, found, strict=True)]


def same(wanted: Any, found: Any) -> bool:
    """Whether values that ``shown`` gave are the wanted ones. What is empty is often left out."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(same(value, found.get(key, _MISSING)) for key, value in wanted.items())
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(same, wanted, found))
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    return wanted == found or (found in (_MISSING, None) and wanted in ({}, [], None))


def _key(one: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(one.get(key, DEFAULTS.get(key)) for key in keys)
