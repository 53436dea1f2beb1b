"""The client of a fake's control API, for tests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from helios.http.client import HttpClient


@dataclass(frozen=True, slots=True)
class Control:
    """Orders faults and reads what a fake was told. ``url`` is the worker's, ``control`` the control API's."""

    url: str
    control: str
    model: str
    kv_events: int = 0
    """Port at which it publishes KV events, and..."""
    kv_replay: int = 0
    """...at which it is asked for them again; 0: it does not publish."""

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        client = HttpClient(self.control, timeout_s=10)
        try:
            return client.json(method, path, body=body)
        finally:
            client.close()

    def fault(self, kind: str, **fields: Any) -> None:
        """Order a fault (``faults.Fault``)."""
        self._call("POST", "/faults", {"kind": kind, **fields})

    def clear_faults(self) -> None:
        self._call("DELETE", "/faults")

    def journal(self, path: str | None = None) -> list[dict[str, Any]]:
        """All records, or those of one path, without health checks; oldest first."""
        records = self._call("GET", "/journal")
        if path is not None:
            return [r for r in records if r["target"].partition("?")[0] == path]
        return [r for r in records if r["target"] not in ("/health", "/v1/models", "/metrics")]

    def forget(self) -> None:
        """Empty the journal."""
        self._call("DELETE", "/journal")

    def violations(self) -> list[str]:
        return [v for record in self._call("GET", "/journal") for v in record["violations"]]

    def set_healthy(self, healthy: bool) -> None:
        self._call("POST", "/health", {"healthy": healthy})

    def refuse(self) -> None:
        """Close the worker's port: connections are refused, open ones broken."""
        self._call("POST", "/listen", {"open": False})

    def accept(self) -> None:
        self._call("POST", "/listen", {"open": True})

    def skip_time(self, seconds: float) -> None:
        """Advance the clock of KV leases."""
        self._call("POST", "/clock", {"skip_s": seconds})

    def kv(self) -> dict[str, int]:
        """Blocks held and stranded, and prompts claimed."""
        counts: dict[str, int] = self._call("GET", "/kv")
        return counts

    def events(self, **order: Any) -> None:
        """What becomes of its KV events (``events.Events.order``)."""
        self._call("POST", "/events", order)

    def metric(self, name: str, **labels: str) -> float:
        """One sample of the worker's /metrics."""
        client = HttpClient(self.url, timeout_s=10)
        try:
            text = client.bytes("GET", "/metrics").decode()
        finally:
            client.close()
        for line in text.splitlines():
            found = re.fullmatch(r"([\w:]+)\{(.*)\} (\S+)", line)
            if found and found[1] == name and all(f'{k}="{v}"' in found[2] for k, v in labels.items()):
                return float(found[3])
        raise KeyError(name)
