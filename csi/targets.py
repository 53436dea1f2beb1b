"""Where volumes may be published, and what is published where: from the kernel's table of mounts, and nowhere else.

A bind mount's entry there says which directory of which filesystem it shows, so what a driver that was killed had done
is known without any record of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.errors import InvalidInput
from helios.mounts import FSTYPE, MountEntry, canonical

MAX_PATH: Final = 4096

_ROOT = re.compile(r"/\.volumes/([^/]+)/([^/]+?)(?://deleted)?\Z")


@dataclass(frozen=True, slots=True)
class Published:
    """A volume of a mount (its id there) that is bound at ``target``, as ``form``; ``device`` is the filesystem's."""

    volume: str
    form: str
    target: Path
    device: str


def check_target(text: str, kubelet: Path, *, name: str = "target_path") -> Path:
    """The place that a path means, its parents' links resolved. It blocks, but looks at nothing that is mounted there.

    Raises InvalidInput for a path that is not below the kubelet's directory, however it is written.
    """
    if not text:
        raise InvalidInput(f"{name} is missing")
    if len(os.fsencode(text)) >= MAX_PATH or not text.isprintable() or not text.startswith("/"):
        raise InvalidInput(f"{name} {text[:150]!r} is not an absolute path")
    path = Path(text)
    if ".." in path.parts:
        raise InvalidInput(f"{name} {text[:150]!r} has a .. in it")
    try:
        base, parent = canonical(kubelet), canonical(path.parent)
    except OSError as error:
        raise InvalidInput(f"{name} {text[:150]!r} can't be looked up: {error.strerror}") from None
    if not path.is_relative_to(kubelet) and not path.is_relative_to(base):
        raise _outside(text, kubelet, name)
    if path in (kubelet, base) or not parent.is_relative_to(base):
        raise _outside(text, kubelet, name)
    return parent / path.name


def published(entries: Iterable[MountEntry], kubelet: Path) -> list[Published]:
    """What of mounts' volumes is bound below ``kubelet``, which has no links in it, in the order it was mounted."""
    found = []
    for entry in entries:
        if (shown := _volume(entry)) and entry.mountpoint.is_relative_to(kubelet):
            found.append(Published(shown[1], shown[2], entry.mountpoint, entry.device))
    return found


def _volume(entry: MountEntry) -> re.Match[str] | None:
    return _ROOT.match(entry.root) if entry.fstype == FSTYPE else None


def _outside(text: str, kubelet: Path, name: str) -> InvalidInput:
    return InvalidInput(
        f"{name} {text[:150]!r} is not below {kubelet}",
        hint="If the kubelet's directory is another one, set csi.kubelet (or --kubelet-dir).",
    )
