"""The operator's parts put together: reconcilers, what they are told by registry and routers, and who decides."""

from __future__ import annotations

import os
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, Final

from helios.config import Config, OperatorSettings, SignalsSettings
from helios.errors import UsageError
from helios.http.client import HttpClient
from helios.kube.kinds import NODE, POD, Kind
from helios.metrics import OperatorMetrics
from helios.registry_client import RegistryClient
from helios.tokens import token_of
from orchestrator.actions import MANAGER, Key, Manifest
from orchestrator.deciding.deciding import Deciding
from orchestrator.operator import Operator, Watched, Work
from orchestrator.reconcile import names
from orchestrator.reconcile.kinds import MODEL
from orchestrator.reconcile.reconcilers import Models, Services
from orchestrator.reconcile.site import site_of
from orchestrator.registry import Answers
from orchestrator.shown import roles
from orchestrator.signals.serving import Signals

REGISTRY_S: Final = 10.0
"""Longest time for a call of the registry, in seconds."""


@contextmanager
def whole(config: Config, metrics: OperatorMetrics) -> Iterator[Work]:
    """Everything of Models and InferenceServices. Raises UsageError for settings that can't work."""
    settings = config.operator
    site = site_of(settings)
    if not config.registry.urls:
        raise UsageError("the operator needs a registry", hint="Set registry.urls (HELIOS_REGISTRY__URLS).")
    signals = _signals(settings, metrics)
    deciding = Deciding(site, signals, look_s=settings.look_s, ceilings=settings.ceilings)
    running: list[Operator] = []

    def told(repo: str) -> None:
        """Something new is known of a repository."""
        for operator in running:
            for one in operator.controller.cache.all(MODEL):
                metadata = one["metadata"]
                if one["spec"].get("source", {}).get("repo") == repo:
                    operator.controller.add(MODEL, Key(metadata["namespace"], metadata["name"]))

    token = token_of(config.registry.token_file, os.environ)
    with ExitStack() as stack:
        clients = [
            RegistryClient(HttpClient(url, timeout_s=REGISTRY_S / len(config.registry.urls), token=token))
            for url in config.registry.urls
        ]
        for client in clients:
            stack.callback(client.close)
        answers = Answers(clients, told)

        def beside(operator: Operator) -> list[Coroutine[Any, Any, None]]:
            running.append(operator)
            metrics.services.states = lambda: roles(operator.controller.cache)
            deciding.attach(
                operator.controller.cache, lambda: operator.leadership.remaining_s() > 0, operator.controller.add
            )
            found = [answers.run(), deciding.run()]
            return found if signals is None else [*found, signals.run()]

        yield Work([Models(site, answers, deciding), Services(site, deciding)], WATCHED, beside, deciding.begin)


def _trim_pod(pod: Manifest) -> None:
    """Of workers nobody reads the spec; a pod that keeps a model on a node is compared with what it should be."""
    if names.PREFETCH not in (pod["metadata"].get("labels") or {}):
        pod.pop("spec", None)


def _trim_node(node: Manifest) -> None:
    """Of a node's many images, volumes and addresses nobody reads anything."""
    node["metadata"].pop("annotations", None)
    node["status"] = {"conditions": (node.get("status") or {}).get("conditions") or []}


WATCHED: Final[Mapping[Kind, Watched]] = {
    POD: Watched(f"app.kubernetes.io/managed-by={MANAGER}", _trim_pod),
    NODE: Watched(trim=_trim_node),
}
"""Most pods of a cluster are other people's."""


def _signals(settings: OperatorSettings, metrics: OperatorMetrics) -> Signals | None:
    """What is heard of routers, and told to whoever scales, if the settings name routers. Raises UsageError."""
    if settings.signals == SignalsSettings():
        return None
    if settings.signals.scaler_listen and find_spec("grpc") is None:
        raise UsageError(
            "operator.signals.scaler_listen needs gRPC", hint="Install it: pip install 'helios-llm[operator]'."
        )
    from orchestrator.signals.serving import of_cluster

    return of_cluster(settings, metrics)
