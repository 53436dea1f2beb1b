"""Whether a pod may have a model: the registry decides, by the namespace that the kubelet tells, or by the pod's token.

What it says counts for a while, also when it is asked for one pod after another; what it allowed counts for longer
while it does not answer, so that a model that is here can be published then.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal

from csi.calls import Calls
from csi.errors import Precondition
from csi.pod_tokens import PodToken, token_for
from csi.registry import Registry
from csi.until import Until
from helios.errors import Forbidden, Unavailable
from helios.metrics import CsiMetrics
from helios.names import RepoId

log = logging.getLogger("csi.rights")

NAMESPACE: Final = "csi.storage.k8s.io/pod.namespace"
POD_UID: Final = "csi.storage.k8s.io/pod.uid"
FRESH_S: Final = 60.0
"""How long an answer counts, in seconds."""
AWAY_S: Final = 86400.0
"""How long a permission counts while the registry does not answer, in seconds."""
MOST: Final = 10_000
"""Permissions that are remembered; the oldest go."""
HINT: Final = "Whoever runs the registry decides: registry.tenants.<name>.namespaces and .sees."

Mode = Literal["off", "namespace", "token"]


class Remembered:
    """What was allowed to whom, a namespace or whoever shows a token, and when. No I/O."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = MOST) -> None:
        self._clock, self._most = clock, most
        self._allowed: OrderedDict[tuple[str, str], float] = OrderedDict()

    def note(self, repo: str, who: str, allowed: bool) -> None:
        """The registry's answer of now."""
        self._allowed.pop((repo, who), None)
        if allowed:
            self._allowed[repo, who] = self._clock()
            if len(self._allowed) > self._most:
                self._allowed.popitem(last=False)

    def allows(self, repo: str, who: str, within_s: float) -> bool:
        """Whether it was allowed so lately."""
        at = self._allowed.get((repo, who))
        return at is not None and self._clock() - at < within_s


class Rights:
    """Called on one event loop."""

    def __init__(self, registry: Registry, calls: Calls, metrics: CsiMetrics, mode: Mode, audience: str) -> None:
        """``mode`` is ``csi.authorise``, ``audience`` whom the pods' tokens are for."""
        self._registry, self._calls, self._metrics = registry, calls, metrics
        self._mode, self._audience = mode, audience
        self._remembered = Remembered()

    async def check(self, repo: RepoId, context: Mapping[str, str], secrets: Mapping[str, str], until: Until) -> None:
        """Raise Forbidden unless the pod that context and secrets are of may read the repository.

        Precondition: Kubernetes does not say whose pod it is. Unauthorized: its token is not accepted. Unavailable: the
        registry does not answer, and has not allowed it before.
        """
        if self._mode == "off":
            return
        namespace = context.get(NAMESPACE, "")
        if self._mode == "namespace":
            if not namespace:
                raise Precondition(
                    f"csi.authorise is set, and the request does not say which namespace the pod is in ({NAMESPACE})",
                    hint="Set podInfoOnMount: true in the CSIDriver object.",
                )
            token, who = None, namespace
        else:
            token = token_for(self._audience, context, secrets)
            who = _shown(token, context)
        if self._remembered.allows(str(repo), who, FRESH_S):
            self._count("remembered")
            return
        try:
            if token is None:
                await self._by_namespace(repo, namespace, until)
            else:
                await self._by_token(repo, token, context, until)
        except Unavailable as error:
            # A token that came since then nobody can check: the namespace is believed that the kubelet tells.
            if self._remembered.allows(str(repo), namespace, AWAY_S):
                log.warning("what was allowed before counts: the registry is away", extra={"reason": error.message})
                self._count("away")
                return
            self._count("failed")
            raise

    async def _by_namespace(self, repo: RepoId, namespace: str, until: Until) -> None:
        ask = partial(self._registry.allowed, repo, namespace)
        answer = await self._calls.run("asking who may read", ask, 0.5 * until.left)
        self._remembered.note(str(repo), namespace, answer.allowed)
        self._decide(repo, namespace, answer.allowed, answer.reason)

    async def _by_token(self, repo: RepoId, token: PodToken, context: Mapping[str, str], until: Until) -> None:
        ask = partial(self._registry.pod_allowed, repo, token)
        answer = await self._calls.run("asking who may read", ask, 0.5 * until.left)
        told, uid = context.get(NAMESPACE, ""), context.get(POD_UID, "")
        if (told and told != answer.namespace) or (uid and answer.pod_uid and uid != answer.pod_uid):
            self._count("refused")
            raise Forbidden(
                f"the token that came with the request is another pod's, of the namespace {answer.namespace}",
                hint="Only the kubelet is to write the pod's tokens: look at the volume's attributes.",
            )
        self._remembered.note(str(repo), _shown(token, context), answer.allowed)
        self._remembered.note(str(repo), answer.namespace, answer.allowed)
        self._decide(repo, answer.namespace, answer.allowed, answer.reason)

    def _decide(self, repo: RepoId, namespace: str, allowed: bool, reason: str | None) -> None:
        self._count("allowed" if allowed else "refused")
        if not allowed:
            raise Forbidden(f"pods in the namespace {namespace} may not read {repo.id}: {reason}", hint=HINT)

    def _count(self, answer: str) -> None:
        self._metrics.rights.labels(answer).inc()


def _shown(token: PodToken, context: Mapping[str, str]) -> str:
    """Who shows the token: what was allowed to one pod does not count when another comes with its token."""
    return f"{token.digest} {context.get(NAMESPACE, '')} {context.get(POD_UID, '')}"
