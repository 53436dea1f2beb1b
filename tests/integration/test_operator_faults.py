"""Whatever happens to an API server, its objects and operators: all is as it should be in the end.

That an operator may be killed at any write, and that two never both write: test_operator_whole_faults.py."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.fakes.kubernetes.errors import Refusal
from tests.support.faulty import TIMES, Faulty, tried
from tests.support.operators import Site
from tests.support.sample_operator import greeting


class Convergence(Faulty):
    """The machinery, with sample objects."""

    def make(self, root: Path) -> Site:
        self.drifts: Counter[tuple[str, str]] = Counter()
        return Site(root, **TIMES)

    names = st.sampled_from(["a", "b", "c"])

    @rule(name=names, text=st.sampled_from(["x", "y"]), deploy=st.booleans(), replicas=st.integers(0, 3))
    def want(self, name: str, text: str, deploy: bool, replicas: int) -> None:
        one = greeting(name, text, deploy=deploy, replicas=replicas if deploy else min(1, replicas))
        with contextlib.suppress(Refusal):  # it is being deleted
            found = [each for each in self.here.server.all("greetings") if each["metadata"]["name"] == name]
            if found:
                one = copy.deepcopy(found[0]) | {"spec": one["spec"]}
            self.here.admin("greetings", "update" if found else "create", one)

    @rule(name=names, plural=st.sampled_from(["greetings", "configmaps", "deployments"]))
    def delete(self, name: str, plural: str) -> None:
        with contextlib.suppress(Refusal):
            self.here.remove(plural, name)

    @rule(name=names)
    def delete_unseen(self, name: str) -> None:
        self.here.server.delete("deployments", name)
        self.here.server.compact()

    @rule(name=names, plural=st.sampled_from(["configmaps", "deployments"]))
    def drift(self, name: str, plural: str) -> None:
        self.drifts[name, plural] += 1
        if self.drifts[name, plural] > 4:
            return  # another one would be repaired after half a minute
        for one in self.here.server.all(plural):
            if one["metadata"]["name"] == name:
                changed = copy.deepcopy(one)
                if plural == "configmaps":
                    changed["data"] = {"text": "drifted"}
                else:
                    changed["spec"]["replicas"] = 9
                    changed["spec"]["template"]["spec"]["containers"][0]["image"] = "drifted:1"
                self.here.admin(plural, "update", changed)


TestConvergence = Convergence.TestCase
TestConvergence.settings = tried(3, 15)
