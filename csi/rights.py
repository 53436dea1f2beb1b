"""Whether a pod may have a model: the registry decides by the pod's namespace, which the kubelet tells.

What it says counts for a while, also when it is asked for one pod after another; what it allowed counts for longer
while it does not answer, so that a model that is here can be published then.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from csi.calls import Calls
from csi.errors import Precondition
from csi.registry import Registry
from csi.until import Until
from helios.errors import Forbidden, Unavailable
from helios.names import RepoId

log = logging.getLogger("csi.rights")

NAMESPACE: Final = "csi.storage.k8s.io/pod.namespace"
FRESH_S: Final = 60.0
"""How long an answer counts, in seconds."""
AWAY_S: Final = 86400.0
"""How long a permission counts while the registry does not answer, in seconds."""
MOST: Final = 10_000
"""Permissions that are remembered; the oldest go."""


class Remembered:
    """What was allowed, and when. No I/O."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = MOST) -> None:
        self._clock, self._most = clock, most
        self._allowed: OrderedDict[tuple[str, str], float] = OrderedDict()

    def note(self, repo: str, namespace: str, allowed: bool) -> None:
        """The registry's answer of now."""
        self._allowed.pop((repo, namespace), None)
        if allowed:
            self._allowed[repo, namespace] = self._clock()
            if len(self._allowed) > self._most:
                self._allowed.popitem(last=False)

    def allows(self, repo: str, namespace: str, within_s: float) -> bool:
        """Whether it was allowed so lately."""
        at = self._allowed.get((repo, namespace))
        return at is not None and self._clock() - at < within_s


class Rights:
    """Called on one event loop."""

    def __init__(self, registry: Registry, calls: Calls, *, asked: bool) -> None:
        """``asked``: whether anybody is asked at all (``csi.authorise``)."""
        self._registry, self._calls, self._asked = registry, calls, asked
        self._remembered = Remembered()

    async def check(self, repo: RepoId, attributes: Mapping[str, str], until: Until) -> None:
        """Raise Forbidden unless the pod that the attributes are of may read the repository.

        Precondition: Kubernetes does not say whose pod it is. Unavailable: the registry does not answer, and has not
        allowed it before.
        """
        if not self._asked:
            return
        namespace = attributes.get(NAMESPACE, "")
        if not namespace:
            raise Precondition(
                f"csi.authorise is set, and the request does not say which namespace the pod is in ({NAMESPACE})",
                hint="Set podInfoOnMount: true in the CSIDriver object.",
            )
        if self._remembered.allows(str(repo), namespace, FRESH_S):
            return
        try:
            ask = partial(self._registry.allowed, repo, namespace)
            answer = await self._calls.run("asking who may read", ask, 0.5 * until.left)
        except Unavailable as error:
            if self._remembered.allows(str(repo), namespace, AWAY_S):
                log.warning("what was allowed before counts: the registry is away", extra={"reason": error.message})
                return
            raise
        self._remembered.note(str(repo), namespace, answer.allowed)
        if not answer.allowed:
            raise Forbidden(
                f"pods in the namespace {namespace} may not read {repo.id}: {answer.reason}",
                hint="Whoever runs the registry decides: registry.tenants.<name>.namespaces and .sees.",
            )
