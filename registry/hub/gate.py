"""What comes before a call of the Hub API is handled: whether the caller is let in, and whether what is asked for is
known.

Every call that names a repository in its path comes through here. A new one is treated as a read: the upstream is
asked for what is not known, and who may not read the repository there is refused.
"""

from __future__ import annotations

from typing import Final

from helios.names import RepoId
from registry.hub.api import TICKETED
from registry.hub.asked import Asked
from registry.mirror.mirror import Mirror

CHANGES: Final = frozenset({"preupload", "commit", "branch", "tag", "xet-write-token", "lfs"})
"""Calls that change what is here. The upstream is asked whether the caller may read the repository, if it is followed,
but not for what isn't here: names of one's own are nobody else's business."""

UNGATED: Final = TICKETED
"""Calls that name a repository and are let through: their address is a grant that somebody got who was let in."""


class Gate:
    """Asks the mirror for all calls of the Hub API."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    async def before(self, asked: Asked) -> str | None:
        """Make what is asked for known, as far as the upstream has it; returns a warning for the client.

        Raises what the upstream says to a caller who may not read the repository.
        """
        verb, trusted = asked.call.verb, asked.access.trusted
        if not asked.call.id or verb in UNGATED:
            return None  # one that names its repository in the body asks ``check_own``
        if verb in CHANGES:
            if not trusted:
                await self._mirror.admit(asked.repo, for_upstream(asked))
            return None
        warning = await self._mirror.prepare(asked.readings, for_upstream(asked), trusted=trusted)
        return None if warning is None else f"mirror; {warning}"

    async def check_own(self, asked: Asked, repo: RepoId, ref: str) -> None:
        """Raise Conflict for a ref that follows the upstream, or will when somebody asks for it: it is not for pushes.

        Raises as ``before``, too.
        """
        await self._mirror.check_own(repo, ref, for_upstream(asked), trusted=asked.access.trusted)


def for_upstream(asked: Asked) -> str | None:
    """The caller's credentials, where they are for the upstream: a tenant's own tokens are nobody else's business."""
    return None if asked.access.label is not None else asked.request.headers.get("authorization")
