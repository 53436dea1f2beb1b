"""Addresses of objects: which bytes a client fetches from the object store itself, and under which signed address.

They are made for each answer and never kept: an address is a key to one object for whoever has it, until it expires. It
outlives the placement it stands in, so that a read begun at the lease's end still works.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from helios.config import RegistrySettings
from helios.errors import Unavailable
from heliosfs.store.content import BlobContent, CommitContent
from heliosfs.store.objects import ObjectStore
from heliosfs.store.placement import PlacedBlob, Placement
from registry.seals import Seals

log = logging.getLogger("helios.registry")

SPARE_S: Final = 900.0
"""How long an address outlives what it was given for, in seconds: clocks differ, downloads start late."""

DOWNLOAD_S: Final = 3600.0
"""How long the address of a redirected download holds, in seconds; each request for another range gets a new one."""

WEEK_S: Final = 7 * 86400.0
"""No service signs for longer."""

TELL_S: Final = 300.0
"""How often it is said that signing fails, in seconds."""

LARGE: Final = 8 << 20
"""A file from so many bytes on is worth a second request to another host."""


class Addresses:
    """Makes signed addresses as the setting ``registry.redirect`` says, and sealed ones of our own where they are
    needed (registry/seals.py). Blocking; threads may share it."""

    def __init__(self, store: ObjectStore, settings: RegistrySettings, seals: Seals | None = None) -> None:
        self._store, self._nodes, self._seals = store, settings.redirect != "never", seals
        least = {"always": 1, "large": LARGE, "absent": LARGE, "never": None}[settings.redirect]
        self._least = least if settings.store_read_back else None
        self._told_until = -math.inf

    def placement(self, placement: Placement) -> Placement:
        """The placement with addresses that may be used from anywhere, where the store has such."""
        return self._placements([placement])[0]

    def content(self, content: CommitContent) -> CommitContent:
        """The same for all of a commit's placements."""
        signed = self._placements([blob.placement for blob in content.blobs])
        blobs = [BlobContent(b.recipe, placement) for b, placement in zip(content.blobs, signed, strict=True)]
        return msgspec.structs.replace(content, blobs=blobs)

    def of_blob(self, placed: PlacedBlob) -> str | None:
        """Where a client of the Hub API gets the blob, and every range of it, without us; None: nowhere.

        That must be one object which is the blob, and which was read back whole when it was written: such a client
        does not check what it gets.
        """
        placement = placed.placement
        if self._least is None or placed.recipe.size < self._least or len(placement.runs) != 1:
            return None
        at = placement.objects[placement.runs[0].object]
        if not placed.plain or placement.runs[0].offset or at.size != placed.recipe.size:
            return None
        urls = self._sign([at.key], DOWNLOAD_S)
        return None if urls is None else urls[0]

    def _sign(self, keys: Sequence[str], expires_s: float) -> Sequence[str | None] | None:
        """None, too, where signing does not work, with credentials that can't sign for example: all go through us."""
        try:
            return self._store.signed_urls(keys, expires_s)
        except Unavailable as error:
            now = time.monotonic()
            if now >= self._told_until:
                self._told_until = now + TELL_S
                log.warning("addresses can't be signed; all bytes are sent from here", extra={"reason": str(error)})
            return None

    def _placements(self, placements: Sequence[Placement]) -> list[Placement]:
        keys = list(dict.fromkeys(_keys(placements)))
        lease_s = max((placement.lease_s for placement in placements), default=0.0)
        expires_s = min(lease_s + SPARE_S, WEEK_S)
        urls = self._sign(keys, expires_s) if self._nodes and keys else None
        if urls is None:
            return self._sealed(placements, expires_s)
        signed = dict(zip(keys, urls, strict=True))
        ours = self._sealed(placements, expires_s)  # what is sent from here after all
        return [
            msgspec.structs.replace(
                placement,
                lease_s=min(placement.lease_s, expires_s - SPARE_S),
                objects=[msgspec.structs.replace(at, url=signed[at.key] or at.url) for at in placement.objects],
            )
            for placement in ours
        ]

    def _sealed(self, placements: Sequence[Placement], expires_s: float) -> list[Placement]:
        """With addresses of our own."""
        if self._seals is None or not self._seals.needed():
            return list(placements)
        seal = self._seals.seal
        return [
            msgspec.structs.replace(
                placement,
                objects=[msgspec.structs.replace(at, url=seal(at.url, at.key, expires_s)) for at in placement.objects],
            )
            for placement in placements
        ]


def _keys(placements: Iterable[Placement]) -> Iterable[str]:
    return (at.key for placement in placements for at in placement.objects)
