"""Caches beside the truth: whatever order writes, events and lists come in, what is known ends as what there is."""

from __future__ import annotations

import copy
import json

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.kube.kinds import CONFIG_MAP, POD
from orchestrator.actions import OWNER_LABEL
from orchestrator.runtime.cache import Cache, owners
from tests.fakes.kubernetes import line
from tests.fakes.kubernetes.store import Store
from tests.fakes.kubernetes.watching import seen_as


class Following(RuleBasedStateMachine):
    """A store, a cache that follows it late, and whoever hears of the changes."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.uids = Store(), 0
        self.heard: dict[tuple[str, str], dict] = {}
        self.cache = Cache([CONFIG_MAP], self._changed)
        self.known = self.cache.followed[CONFIG_MAP]
        self.told = 0
        """The version up to which the watch has told."""
        self.relist()

    def _changed(self, kind, before, after) -> None:
        assert kind == CONFIG_MAP
        one = after or before
        key = one["metadata"]["namespace"], one["metadata"]["name"]
        assert self.heard.get(key) == before, "what it was is what was told last"
        if after is None:
            del self.heard[key]
        else:
            self.heard[key] = after

    names = st.sampled_from(["a", "b"])

    @rule(name=names, owner=st.sampled_from(["x", "y", None]), labelled=st.booleans(), answer=st.booleans())
    def write(self, name: str, owner: str | None, labelled: bool, answer: bool) -> None:
        """Create or change; ``answer``: it is the operator's own write."""
        before = self.store.objects.get(("configmaps", "ns", name))
        if before is None:
            self.uids += 1
        uid = str(self.uids) if before is None else before["metadata"]["uid"]
        metadata = {"name": name, "namespace": "ns", "uid": uid, "managedFields": [{"manager": "m"}]}
        if owner is not None and labelled:
            metadata["labels"] = {OWNER_LABEL: owner}
        elif owner is not None:
            metadata["ownerReferences"] = [{"uid": owner, "controller": True}, {"uid": "other"}]
        stored = self.store.put("configmaps", {"metadata": metadata, "data": {"n": str(self.store.version)}})
        if answer:
            self.cache.wrote(CONFIG_MAP, copy.deepcopy(stored))

    @rule(name=names, answer=st.booleans())
    def delete(self, name: str, answer: bool) -> None:
        before = self.store.objects.get(("configmaps", "ns", name))
        if before is not None:
            self.store.remove(("configmaps", "ns", name))
            if answer:
                self.cache.deleted(CONFIG_MAP, "ns", name, before["metadata"]["uid"])

    @rule(count=st.integers(1, 3))
    def hear(self, count: int) -> None:
        for change in [one for one in self.store.log if one.version > self.told][:count]:
            self.told = change.version
            before = self.known.objects.get(("ns", (change.after or change.before)["metadata"]["name"]))
            self.known.event(seen_as(change, "configmaps", "", lambda one: True))
            after = None if before is None else self.known.objects.get(("ns", before.metadata.name))
            if before is not None and after is not None and before.metadata.uid == after.metadata.uid:
                assert int(after.metadata.resource_version) >= int(before.metadata.resource_version), "never back"

    @rule()
    def bookmark(self) -> None:
        self.known.event(line("BOOKMARK", {"metadata": {"resourceVersion": str(self.told)}}))

    @rule(behind=st.integers(0, 2))
    def relist(self, behind: int = 0) -> None:
        """A list may be of a moment ago, but not from before the last one."""
        version = max(self.told, self.store.version - behind)
        items = [one for place, one in sorted(self.store.at(version).items()) if place[0] == "configmaps"]
        self.known.begin()
        for at, one in enumerate(items):
            page = {"metadata": {"continue": str(at), "resourceVersion": str(version)}, "items": [one]}
            self.known.page(json.dumps(page).encode())
        self.known.page(json.dumps({"metadata": {"resourceVersion": str(version)}, "items": None}).encode())
        self.told = version

    @invariant()
    def indexes_are_true(self) -> None:
        objects = list(self.cache.all(CONFIG_MAP))
        for uid in ("x", "y"):
            wanted = sorted(one["metadata"]["name"] for one in objects if uid in owners(one))
            assert [one["metadata"]["name"] for one in self.cache.owned(CONFIG_MAP, uid)] == wanted
        for one in objects:
            where = CONFIG_MAP, "ns", one["metadata"]["name"]
            assert self.cache.by_uid(one["metadata"]["uid"]) == where
            assert self.cache.get(*where) is one
            assert "managedFields" not in one["metadata"]
        assert self.heard == {("ns", one["metadata"]["name"]): one for one in objects}

    def teardown(self) -> None:
        self.hear(10_000)
        there = {place[1:]: one["metadata"] for place, one in self.store.objects.items()}
        known = {key: one.metadata for key, one in self.known.objects.items()}
        assert {key: (one["uid"], one["resourceVersion"]) for key, one in there.items()} == {
            key: (one.uid, one.resource_version) for key, one in known.items()
        }


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_kind_that_is_not_there_is_known_to_be_not_there():
    cache = Cache([POD, CONFIG_MAP], lambda *_: None)
    assert cache.missing == [POD, CONFIG_MAP]
    cache.followed[POD].absent()
    assert (cache.missing, cache.served(POD)) == ([CONFIG_MAP], False)


def test_what_nobody_reads_is_not_kept():
    cache = Cache([POD], lambda *_: None, {POD: lambda one: one.pop("spec", None)})
    pod = {"metadata": {"name": "p", "namespace": "ns", "uid": "u", "resourceVersion": "1"}, "spec": {"a": 1}}
    cache.wrote(POD, pod)
    assert "spec" not in cache.get(POD, "ns", "p")
