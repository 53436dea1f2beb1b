"""Kinds that only the operator deals with: its own, and those of other projects that a cluster may have."""

from __future__ import annotations

from typing import Final

from helios.kube.kinds import Kind
from orchestrator.api.common import GROUP, VERSION

MODEL: Final = Kind(GROUP, VERSION, "Model", "models")
INFERENCE_SERVICE: Final = Kind(GROUP, VERSION, "InferenceService", "inferenceservices")

PEER_AUTHENTICATION: Final = Kind("security.istio.io", "v1", "PeerAuthentication", "peerauthentications")
DESTINATION_RULE: Final = Kind("networking.istio.io", "v1", "DestinationRule", "destinationrules")
VIRTUAL_SERVICE: Final = Kind("networking.istio.io", "v1", "VirtualService", "virtualservices")
ISTIO: Final = (PEER_AUTHENTICATION, DESTINATION_RULE, VIRTUAL_SERVICE)

INFERENCE_POOL: Final = Kind("inference.networking.k8s.io", "v1", "InferencePool", "inferencepools")
SCALED_OBJECT: Final = Kind("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects")
