"""The registry is told which commits this node's volumes use, often enough and not too often."""

from __future__ import annotations

import pytest

from helios.errors import RevisionNotFound, Unavailable
from helios.names import RepoId
from heliosfs.volumes.leases import LEASE_S, OPEN_AFTER_S, OPEN_S, RENEW_S, VolumeLeases
from heliosfs.volumes.record import VolumeRecord

pytestmark = pytest.mark.trio


def volume(name: str, commit: str) -> VolumeRecord:
    return VolumeRecord(name, "models/org/m", commit * 40, "main", "0" * 64, 1, {"main": commit * 40}, 1)


class Registry:
    def __init__(self) -> None:
        self.leases: list[str] = []
        self.seconds = LEASE_S
        self.error: Exception | None = None

    def lease(self, holder: str, repo: RepoId, commit: str, seconds: float, timeout_s: float) -> None:
        if self.error is not None:
            raise self.error
        assert (holder, str(repo), seconds) == ("node", "models/org/m", self.seconds)
        assert 0 < timeout_s < 60
        self.leases.append(commit[0])


async def test_each_commit_is_leased_once_and_renewed_in_time() -> None:
    registry, volumes = Registry(), {"a": volume("a", "1"), "b": volume("b", "1"), "c": volume("c", "2")}
    leases = VolumeLeases(registry, lambda: volumes, set, "node")
    await leases.renew(0.0)
    assert sorted(registry.leases) == ["1", "2"]
    await leases.renew(RENEW_S - 1)
    assert len(registry.leases) == 2
    volumes["d"] = volume("d", "3")
    del volumes["c"]
    await leases.renew(RENEW_S - 1)
    assert registry.leases[2:] == ["3"]
    await leases.renew(RENEW_S + 1)
    assert registry.leases[3:] == ["1"]


async def test_a_registry_that_is_away_is_asked_again_soon_and_one_that_lost_the_commit_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = Registry()
    leases = VolumeLeases(registry, lambda: {"a": volume("a", "1")}, set, "node")
    registry.error = Unavailable("away")
    await leases.renew(0.0)
    registry.error = RevisionNotFound("gone")
    await leases.renew(1.0)
    await leases.renew(RENEW_S + 2)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the registry does not keep a commit that is in use"
    ]
    registry.error = None
    await leases.renew(RENEW_S + 3)
    assert registry.leases == []
    await leases.renew(2 * RENEW_S + 4)
    assert registry.leases == ["1"]


async def test_what_is_open_for_long_is_leased_until_it_is_closed() -> None:
    registry, opened = Registry(), {("models/org/m", "1" * 40)}
    registry.seconds = OPEN_S
    leases = VolumeLeases(registry, dict, lambda: opened, "node")
    await leases.renew(0.0)
    await leases.renew(OPEN_AFTER_S - 1)
    assert registry.leases == [], "most files are whole here by then"
    await leases.renew(OPEN_AFTER_S)
    await leases.renew(OPEN_AFTER_S + 5)
    assert registry.leases == ["1"]
    await leases.renew(OPEN_AFTER_S + RENEW_S)
    assert registry.leases == ["1", "1"]
    opened.clear()
    await leases.renew(OPEN_AFTER_S + 2 * RENEW_S)
    opened.add(("models/org/m", "2" * 40))
    await leases.renew(OPEN_AFTER_S + 3 * RENEW_S)
    assert registry.leases == ["1", "1"]
