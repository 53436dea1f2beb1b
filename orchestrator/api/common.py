"""What both resources share: names of the group, conditions, and the types that a schema can say something about."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

GROUP: Final = "helios.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
FINALIZER: Final = f"{GROUP}/cleanup"

_PART: Final = r"[A-Za-z0-9_]+((-(\.-)*\.?|\.(-\.)*-?)[A-Za-z0-9_]+)*"
"""As helios.names has it: no ``--`` and no ``..``, nothing but letters, digits and ``_`` at either end."""
_LABEL: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_WORD: Final = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"

# Patterns are what Go (RE2) and Python read alike; ``\Z`` is Go's ``$``, and the schema has that (schema.py). Every
# text and list has a longest length, since Kubernetes reckons the cost of rules by it.
Name = Annotated[str, Meta(min_length=1, max_length=63, pattern=rf"^{_LABEL}\Z")]
"""A DNS label: what the names of what is made begin with."""
Subdomain = Annotated[str, Meta(min_length=1, max_length=253, pattern=rf"^{_LABEL}(\.{_LABEL})*\Z")]
"""The name of an object of Kubernetes' own: labels, with dots between."""
LabelKey = Annotated[str, Meta(min_length=1, max_length=317, pattern=rf"^({_LABEL}(\.{_LABEL})*/)?{_WORD}\Z")]
"""Of a node's label, or the name of a resource: ``nvidia.com/gpu.product``."""
LabelValue = Annotated[str, Meta(max_length=63, pattern=rf"^({_WORD})?\Z")]
Selector = Annotated[dict[str, LabelValue], Meta(max_length=32)]
"""Labels that a node has to have."""
Text = Annotated[str, Meta(max_length=4096)]
Arguments = Annotated[list[Text], Meta(max_length=256)]
Commit = Annotated[str, Meta(min_length=40, max_length=40, pattern=r"^[0-9a-f]{40}\Z")]
ShortCommit = Annotated[str, Meta(max_length=12)]
Repo = Annotated[str, Meta(min_length=1, max_length=193, pattern=rf"^({_PART}/)?{_PART}\Z")]
"""A repository at the registry, ``org/name``."""
Revision = Annotated[str, Meta(min_length=1, max_length=250, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/+-]*\Z")]
"""A ref or a commit."""
Quantity = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=32,
        pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?\Z",
        extra_json_schema={"x-kubernetes-int-or-string": True},
    ),
]
"""Kubernetes' quantity: ``4``, ``500m``, ``16Gi``. Text here, though a plain number may be written (parse.py)."""
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Percent = Annotated[int, Meta(ge=0, le=100)]
MAX_SECONDS: Final = 7 * 86_400
Seconds = Annotated[int, Meta(ge=0, le=MAX_SECONDS)]
"""Whole ones: there are no fractions in Kubernetes' resources, as its API conventions say."""
Whole = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Time = Annotated[str, Meta(max_length=64)]
"""RFC 3339, or nothing."""
FreeForm = dict[str, Any]
"""A part of Kubernetes' own API that is passed on as it is; the API server checks it where it is used."""


class Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """A part of a resource: the fields are snake_case here and camelCase in Kubernetes."""


def plain(part: Part) -> dict[str, Any]:
    """The part as Kubernetes has it, without what is as by default."""
    found: dict[str, Any] = msgspec.to_builtins(part)
    return found


class EnvironmentVariable(Part, frozen=True, kw_only=True):
    """A variable of a container's environment."""

    name: Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*\Z")]
    """What it is called."""
    value: Annotated[str, Meta(max_length=32_768)] | None = None
    """Its text."""
    value_from: FreeForm | None = None
    """A Secret's or a ConfigMap's key, or a field of the pod, as in a container."""


class Toleration(Part, frozen=True, kw_only=True):
    """Of a node's taint, as in a pod."""

    key: LabelKey | None = None
    """Of the taint; without one every taint is tolerated."""
    operator: Literal["Exists", "Equal", "Lt", "Gt"] | None = None
    """How the taint's value has to be to ``value``; default: ``Equal``."""
    value: Annotated[str, Meta(max_length=63)] | None = None
    """Of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Of the taint; default: all of them."""
    toleration_seconds: Annotated[int, Meta(ge=-1, le=MAX_SECONDS)] | None = None
    """How long a pod stays on a node that gets the taint ``NoExecute``; default: for ever."""


class Condition(Part, frozen=True):
    """What is the case, since when and why (Kubernetes' API conventions, "Typical status properties")."""

    type: Annotated[str, Meta(min_length=1, max_length=316)]
    """What it is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it is the case."""
    reason: Annotated[str, Meta(min_length=1, max_length=1024)]
    """One word in CamelCase, for programs."""
    message: Annotated[str, Meta(max_length=32_768)] = ""
    """What is waited for, or what is wrong and what to do; for people."""
    last_transition_time: Time = ""
    """RFC 3339, when ``status`` last changed."""
    observed_generation: Whole = 0
    """Of the specification that it is about."""


Conditions = Annotated[
    list[Condition],
    Meta(
        max_length=32,
        extra_json_schema={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]
