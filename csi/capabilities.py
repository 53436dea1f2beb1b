"""How a volume may be used: what a VolumeCapability asks for, and what of it there is. No I/O."""

from __future__ import annotations

from typing import Any, Final

from csi.binding import FLAGS
from helios.errors import InvalidInput

HARMLESS: Final = frozenset({"noatime", "relatime", "nodiratime"})
"""Options that a volume which is never written to fulfils anyway."""


def check(capability: Any) -> frozenset[str]:
    """The mount options that a ``csi.v1.VolumeCapability`` asks for and that make a difference.

    Every access mode will do: what is mounted is read-only whatever was asked for. Raises InvalidInput.
    """
    kind = capability.WhichOneof("access_type")
    if kind == "block":
        raise InvalidInput("volume_capability asks for a block device; models are files: use volumeMode Filesystem")
    if kind is None:
        raise InvalidInput("volume_capability has no access_type: mount is the one there is")
    if not capability.access_mode.mode:
        raise InvalidInput("volume_capability has no access_mode; any will do, the volume is read-only in each")
    options = {option for flag in capability.mount.mount_flags for option in flag.split(",") if option}
    if "rw" in options:
        raise InvalidInput("mount_flags ask for rw, and volumes are read-only", hint="Leave it out of mountOptions.")
    if unknown := sorted(options - HARMLESS - FLAGS.keys()):
        known = ", ".join(sorted(HARMLESS | FLAGS.keys()))
        raise InvalidInput(f"mount_flags: {unknown[0][:80]!r} is unknown here; known: {known}")
    return frozenset(options & FLAGS.keys())


def check_all(capabilities: Any) -> None:
    """Check at least one. Raises InvalidInput."""
    if not capabilities:
        raise InvalidInput("volume_capabilities are missing")
    for capability in capabilities:
        check(capability)
