"""What both resources share: names of the group, conditions, and the types that a schema can say something about."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

GROUP: Final = "helios.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
FIELD_MANAGER: Final = "helios-operator"
FINALIZER: Final = f"{GROUP}/cleanup"

Name = Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
"""A DNS label: what the names of what is made begin with."""
Commit = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}$")]
Repo = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^([\w.-]+/)?[\w.-]+$")]
"""A repository at the registry, ``org/name``."""
Revision = Annotated[str, Meta(min_length=1, max_length=200)]
"""A ref or a commit."""
Quantity = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", max_length=32)]
"""Kubernetes' quantity, as text: ``4``, ``500m``, ``16Gi``."""
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Percent = Annotated[int, Meta(ge=0, le=100)]
MAX_SECONDS: Final = 7 * 86_400
Seconds = Annotated[int, Meta(ge=0, le=MAX_SECONDS)]
"""Whole ones: there are no fractions in Kubernetes' resources, as its API conventions say."""
FreeForm = dict[str, Any]
"""A part of Kubernetes' own API that is passed on as it is; the API server checks it where it is used."""


class Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """A part of a resource: the fields are snake_case here and camelCase in Kubernetes."""


class Condition(Part, frozen=True, kw_only=True):
    """What is the case, since when and why (Kubernetes' API conventions, "Typical status properties")."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    """One word in CamelCase, for programs."""
    message: str = ""
    """What is waited for, or what is wrong and what to do; for people."""
    last_transition_time: str = ""
    """RFC 3339, when ``status`` last changed."""
    observed_generation: int = 0
