"""What an upload may name by its hash alone."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from helios.names import RepoId
from registry.access import OWN, Access
from registry.hub.upload.known import Known
from registry.metadata import mirror
from registry.metadata.database import Changes
from registry.sessions import Session
from tests.unit.registry.conftest import Registry

GATED, MINE = RepoId.parse("meta/gated"), RepoId.parse("org/mine")
WEIGHTS = b"secret" * 1000


@dataclass
class NothingYet:
    """A repository's uploads, before the first."""

    session: Session

    def uploaded(self, _sha256: str) -> bool:
        return False


def named(registry: Registry, repo: RepoId, who: Access) -> bool:
    digest = sha256(WEIGHTS).hexdigest()
    with registry.sessions.open(repo) as session:
        return Known(registry.catalog).entry(who, repo, digest, NothingYet(session)) is not None  # type: ignore[arg-type]


def test_what_an_upstream_does_not_show_everybody_has_to_be_uploaded(registry: Registry) -> None:
    registry.publish("meta/gated", {"w.bin": WEIGHTS})
    registry.publish("org/mine", {"README.md": b"hello"})
    assert named(registry, MINE, Access()), "anybody may read it"
    with registry.database.write(changes=Changes.NOTHING) as connection:
        mirror.set_restricted(connection, GATED, True)
    assert not named(registry, MINE, Access()), "who knows its hash must not get it that way"
    assert named(registry, GATED, Access()), "the repository itself has it"
    assert named(registry, MINE, OWN)
