"""Who may read a restricted repository is asked of the upstream, and believed for a while, not for ever."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from helios.errors import Forbidden, UpstreamUnavailable
from helios.names import RepoId
from registry.admission.admission import Admission
from registry.mirror.asking import NO_S, YES_S, Asking, Caller
from registry.pull.upstream import Upstream as Client
from tests.support.upstream import Fault, Upstream

REPO = RepoId.parse("org/m")
ALICE, BOB = Caller("hf_alice"), Caller("hf_bob")


@pytest.fixture
def hub() -> Iterator[Upstream]:
    with Upstream() as found:
        yield found
        assert found.violations == []


def test_a_permission_that_ends_upstream_ends_here_and_a_refusal_too(hub: Upstream) -> None:
    now = 0.0
    commit = hub.commit("org/m", {"config.json": b"{}"})
    held = hub.repos["models/org/m"]
    held.gated = ALICE.token
    with contextlib.closing(Client(hub.url, stall_s=1)) as client:
        state: Any = None  # what is known of refs and listings has no part in it
        asking = Asking(client, state, [], Admission([]), lambda snapshot, token: None, lambda: now)

        def ask(caller: Caller) -> None:
            asking.check(REPO, commit, "config.json", caller)

        ask(ALICE)
        with pytest.raises(Forbidden):
            ask(BOB)
        assert (asking.allowed(REPO, ALICE), asking.allowed(REPO, BOB)) == (True, False)

        held.gated = BOB.token  # the upstream has changed its mind about both
        now = NO_S - 1
        with pytest.raises(Forbidden):
            ask(BOB)
        assert len(hub.seen) == 2, "a refusal is believed for half a minute"
        now = NO_S + 1
        ask(BOB)
        assert asking.allowed(REPO, BOB)

        now = YES_S - 1
        assert asking.allowed(REPO, ALICE), "a permission is believed for five minutes"
        now = YES_S + 1
        assert not asking.allowed(REPO, ALICE)
        with pytest.raises(Forbidden):
            ask(ALICE)
        assert not asking.allowed(REPO, ALICE)

        now = 2 * YES_S
        hub.faults = [Fault("/resolve/", status=503, times=-1)]
        with pytest.raises(UpstreamUnavailable):
            ask(BOB)
        assert not asking.allowed(REPO, BOB), "where the upstream can't be asked nobody is let in"
