"""What becomes of one object of a CustomResourceDefinition when it is written, at the fake API server."""

from __future__ import annotations

import copy
import re
from typing import Any

from helios.kube import kinds
from tests.fakes.kubernetes.cluster import Cluster
from tests.fakes.kubernetes.errors import Refusal

NAMESPACE = "ns"


class Refused(Exception):
    """Why an object is not stored. ``fields``: the paths of what is wrong."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.fields = [field for field, _ in refusal.causes] or re.findall(r'unknown field "(.*?)"', refusal.message)


class Admission:
    """Of one definition."""

    def __init__(self, definition: dict[str, Any]) -> None:
        """Raises Refused for what is no definition."""
        self._cluster = Cluster()
        crds = next(each for each in self._cluster.kinds.values() if each.kind == kinds.CUSTOM_RESOURCE)
        try:
            self._cluster.create(crds, "", copy.deepcopy(definition), manager="test", strict=True)
        except Refusal as refusal:
            raise Refused(refusal) from None
        names = {definition["spec"]["names"]["plural"]}
        (self._served,) = (each for each in self._cluster.kinds.values() if each.kind.plural in names)

    def admit(self, new: dict[str, Any], old: dict[str, Any] | None = None) -> dict[str, Any]:
        """The object as it is stored, but for its metadata; instead of ``old``, if there is one. Fields that are not
        known are refused, as kubectl asks for. Raises Refused."""
        name = new["metadata"].get("name", "")
        given = [copy.deepcopy(each) for each in (old, new) if each is not None]
        for each in given:
            each["metadata"] = {"name": name}
        try:
            stored = self._cluster.create(self._served, NAMESPACE, given[0], manager="test", strict=True)
            if len(given) > 1:
                stored = self._cluster.replace(self._served, NAMESPACE, name, given[1], manager="test", strict=True)
        except Refusal as refusal:
            raise Refused(refusal) from None
        finally:
            self._cluster.store.objects.pop((self._served.kind.resource, NAMESPACE, name), None)
        return {**copy.deepcopy(stored), "metadata": {"name": name}}
