"""What says of a Kubernetes object that it is a worker, and which: keys that routers read, and that whoever makes such
objects writes (router/discovery/endpoints.py has their values). Ports that go by a name are here, too."""

from __future__ import annotations

from typing import Final

PREFIX: Final = "helios.dev/"
MODELS: Final = PREFIX + "models"
MODEL: Final = PREFIX + "model"
ROLE: Final = PREFIX + "role"
REVISION: Final = PREFIX + "revision"
WEIGHT: Final = PREFIX + "weight"
ADAPTERS: Final = PREFIX + "adapters"
PORT: Final = PREFIX + "port"
SCHEME: Final = PREFIX + "scheme"
RANKS: Final = PREFIX + "kv-ranks"
MAX_IN_FLIGHT: Final = PREFIX + "max-in-flight"
MAX_QUEUED: Final = PREFIX + "max-queued"

HTTP: Final = "http"
"""Port of vLLM's API."""
FRONT: Final = "front"
"""Port of ``helios worker``: probes, metrics, draining."""
SIDE_CHANNEL: Final = "side-channel"
EVENTS: Final = "kv-events"
REPLAY: Final = "kv-replay"
BOOTSTRAP: Final = "bootstrap"
"""The last three are keys below ``PREFIX``, too."""

SELECTED: Final = {"app": "vllm"}
"""The label by which routers select slices and pods, as the chart has it by default (``router.workers``)."""
