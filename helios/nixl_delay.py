"""A pause for NIXL's progress thread, which otherwise polls without one: a core for each idle vLLM of a pair.

NIXL's Python API sets ``pthrDelay = 0`` (microseconds) in the configuration of every agent that it makes, and takes
no other value from anywhere. It makes agents through its module ``_bindings``; the API module is given a stand-in
for that which sets our delay first. No file of NIXL's is changed, nor the bindings that others may use.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from helios.after_import import after_import
from helios.errors import UsageError

log = logging.getLogger("vllm.helios")
"""Below ``vllm``, since vLLM shows the records of no other logger."""

VARIABLE: Final = "HELIOS_NIXL_DELAY_US"
APIS: Final = ("nixl_cu12._api", "nixl_cu13._api", "nixl_rocm._api")
"""The API's module in each of NIXL's packages; ``nixl._api`` is one of these under another name."""
MOST_US: Final = 1_000_000


def delay_from(environ: Mapping[str, str]) -> int | None:
    """The pause in microseconds, None where none is asked for. Raises UsageError."""
    text = environ.get(VARIABLE, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text) <= MOST_US):
        raise UsageError(f"{VARIABLE} is {text!r}", hint=f"Give whole microseconds from 0 to {MOST_US}, or unset it.")
    return int(text)


def delay_when_imported(delay_us: int) -> None:
    """Have every agent of NIXL's pause, whichever package it comes from, once that is imported."""
    for name in APIS:
        after_import(name, lambda module: _delay(module, delay_us))


def _delay(api: ModuleType, delay_us: int) -> None:
    bindings = getattr(api, "nixlBind", None)
    if not hasattr(getattr(bindings, "nixlAgentConfig", None), "pthrDelay") or not hasattr(bindings, "nixlAgent"):
        log.warning(
            "%s is ignored: %s is not made as it was; its progress thread polls all the time", VARIABLE, api.__name__
        )
        return
    api.nixlBind = _Bindings(bindings, delay_us)  # type: ignore[attr-defined]
    log.info("NIXL's progress thread pauses for %d microseconds", delay_us)


class _Bindings:
    """NIXL's bindings, whose agents pause."""

    def __init__(self, bindings: Any, delay_us: int) -> None:
        self._bindings, self._delay_us = bindings, delay_us

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def nixlAgent(self, name: str, config: Any) -> Any:  # noqa: N802 - as NIXL calls it
        config.pthrDelay = self._delay_us
        return self._bindings.nixlAgent(name, config)
