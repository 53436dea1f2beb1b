"""The queue of several processes, while words are late or lost and processes stop and die, in any order."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.line_site import MODELS, Member, Site


class LineModel(RuleBasedStateMachine):
    """Anything may happen in any order: each request ends once, bounds hold, no queue stands beside a free place."""

    @initialize(
        members=st.integers(1, 3),
        per_worker=st.integers(1, 2),
        most=st.integers(1, 6),
        limits=st.dictionaries(st.sampled_from(MODELS), st.integers(0, 3)),
    )
    def begin(self, members: int, per_worker: int, most: int, limits: dict[str, int]) -> None:
        self.site = Site(members, per_worker, most, limits=limits)
        self.gone: list[Member] = []
        self.quiet = True
        """Whether no owner was ever away: then the bounds hold to the last request."""

    def _members(self, stopped: bool | None = False) -> list[Member]:
        return [member for member in self.site.members if stopped is None or member.stopped is stopped]

    @rule(data=st.data(), model=st.sampled_from(MODELS), tenant=st.sampled_from("ab"), rank=st.integers(0, 1))
    def comes(self, data: st.DataObject, model: str, tenant: str, rank: int) -> None:
        if members := self._members():
            data.draw(st.sampled_from(members)).comes(model, tenant, rank, cost=data.draw(st.sampled_from([1, 10])))

    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        if waiting := [one for member in self._members() for one in member.waiting]:
            request = data.draw(st.sampled_from(waiting))
            request.member.leaves(request)

    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        if busy := [one for member in self._members() for one in member.at_worker]:
            request = data.draw(st.sampled_from(busy))
            request.member.ends(request)

    @rule(data=st.data(), times=st.integers(1, 5))
    def delivers(self, data: st.DataObject, times: int) -> None:
        site = self.site
        for _ in range(times):
            moves = [(site.deliver_up, member) for member in self._members() if member.up]
            moves += [(site.deliver_down, member) for member in self._members() if member.down]
            moves += [(site.deliver_in, control) for control in site.controls if control.inbox]  # type: ignore[misc]
            moves += [(site.deliver_out, control) for control in site.controls if control.out]  # type: ignore[misc]
            if moves:
                move, where = data.draw(st.sampled_from(moves))
                move(where)

    @rule(data=st.data())
    def loses(self, data: st.DataObject) -> None:
        if speaking := [member for member in self._members() if member.up]:
            data.draw(st.sampled_from(speaking)).up.pop()
            self.quiet = False

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.5, 3.0]))
    def time(self, seconds: float) -> None:
        self.site.now += seconds
        self.site.tick()
        self.quiet = self.quiet and seconds < 1

    @rule(data=st.data())
    def process_dies(self, data: st.DataObject) -> None:
        if self.site.members:
            member = data.draw(st.sampled_from(self.site.members))
            self.site.dies(member)
            self.gone.append(member)
            self.site.joins()

    @rule(data=st.data())
    def process_stops(self, data: st.DataObject) -> None:
        if members := self._members(None):
            member = data.draw(st.sampled_from(members))
            member.stopped = not member.stopped

    @precondition(lambda self: self.site.controls)
    @rule()
    def owner_dies(self) -> None:
        self.site.control_dies()
        self.quiet = False

    @rule()
    def another_owner(self) -> None:
        self.site.takes_over()
        self.quiet = False

    @rule()
    def nothing_stands(self) -> None:
        """In some seconds everybody who can be called is, while there is a place."""
        self.site.later(12)
        for member in self._members():
            for request in member.waiting:
                assert self.site.in_flight[request.model] == self.site.per_worker, "it stands beside a free place"

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "site"):
            return
        for model in MODELS:
            assert self.site.in_flight[model] <= self.site.per_worker
            assert self.site.in_flight[model] == sum(
                request.model == model for member in self.site.members for request in member.at_worker
            )
        for member in self.site.members:
            assert member.line.room.requests == len(member.waiting)
        if self.quiet and self.site.owner is not None:
            line = self.site.owner.line
            assert line.room.requests <= self.site.most
            assert all(line.queue(model).held <= limit for model, limit in self.site.limits.items())

    def teardown(self) -> None:
        if not hasattr(self, "site"):
            return
        for member in self._members(True):
            member.stopped = False
        if self.site.owner is None:
            self.site.takes_over()
        for _ in range(200):
            self.site.later(1)
            for member in self.site.members:
                for request in list(member.at_worker):
                    member.ends(request)
            if not any(member.waiting for member in self.site.members):
                break
        self.site.later(8)
        for member in [*self.site.members, *self.gone]:
            assert all(request.outcome for request in member.requests)
        assert set(self.site.in_flight.values()) == {0}
        assert all(control.line.room.requests == 0 for control in self.site.controls)
        assert all(control.line.room.bytes == 0 for control in self.site.controls)


TestLine = LineModel.TestCase
TestLine.settings = hypothesis_settings(max_examples=60, stateful_step_count=40)
