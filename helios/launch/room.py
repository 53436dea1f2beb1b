"""Whose memory is taken for a model that needs it: the least recently used goes first. No I/O.

Main memory is freed by stopping only. That of GPUs is freed by putting models to sleep, where they can and where main
memory has room for that; those that sleep already are stopped only where it does not suffice that others join them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from helios.launch.needs import LEVELS
from helios.launch.pools import MAIN, NOTHING, Pools, lacks, minus, plus
from helios.launch.resident import Act, Model, State


class Step(NamedTuple):
    """What is done to a model; ``level``: of its sleep."""

    model: Model
    act: Act
    level: int = 0


class Room:
    """Room that is made for one model. ``free`` is free now, ``coming`` will be; both in bytes."""

    def __init__(self, need: Pools, free: Pools, coming: Pools, spare: Sequence[Model]) -> None:
        """``spare``: those that may be stopped or put to sleep, the least recently used first."""
        self._need, self._free, self._there, self._spare = need, free, plus(free, coming), spare
        self._steps: dict[Model, Step] = {}

    def made(self) -> list[Step] | None:
        """What has to be done; None: all of them together do not hold enough."""
        for model in self._spare:
            if MAIN in self._lacks():
                self._stop(model)
        for model in self._spare:
            if model.state is State.UP and self._helps(model):
                self._add(gentle(model, self._need, self._free, self._there))
        for model in self._spare:
            if model.state is State.ASLEEP and self._helps(model):
                self._stop(model)
        for model, step in list(self._steps.items()):
            if step.act is Act.LULL and self._lacks():
                self._drop(step)
                self._stop(model)
        return None if self._lacks() else list(self._steps.values())

    def _lacks(self) -> list[str]:
        return lacks(self._need, self._there)

    def _helps(self, model: Model) -> bool:
        return model not in self._steps and any(model.holds.get(pool, 0) > 0 for pool in self._lacks())

    def _stop(self, model: Model) -> None:
        if model not in self._steps:
            self._add(Step(model, Act.STOP))

    def _add(self, step: Step) -> None:
        self._steps[step.model] = step
        self._there = plus(self._there, step.model.frees(step.act, step.level))
        if step.act is Act.LULL:
            self._free = minus(self._free, step.model.takes(step.level))

    def _drop(self, step: Step) -> None:
        del self._steps[step.model]
        self._there = minus(self._there, step.model.frees(step.act, step.level))
        self._free = plus(self._free, step.model.takes(step.level))


def gentle(model: Model, need: Pools = NOTHING, free: Pools = NOTHING, there: Pools = NOTHING) -> Step:
    """How a model that is up is taken out of the way: asleep if there is room for that, else stopped.

    ``need``: what somebody else has to get of what will be ``there``."""
    assert model.need is not None
    for level in LEVELS[: len(model.need.asleep)]:
        left = plus(there, model.frees(Act.LULL, level))
        if not lacks(model.takes(level), free) and need.get(MAIN, 0) <= left.get(MAIN, 0):
            return Step(model, Act.LULL, level)
    return Step(model, Act.STOP)
