"""The port at which gateways ask, and whether the picker's settings can work: what is needed before a process that
serves gateways is started, without importing gRPC, which does not survive a fork."""

from __future__ import annotations

import socket
from importlib.util import find_spec

from helios.config import PickerSettings
from helios.errors import Unavailable, UsageError
from helios.http.hosts import bracketed, split_listen
from router.tls import Certificate

NAME = "router.picker.tls"


def check(settings: PickerSettings) -> None:
    """Raises UsageError for settings that can't work."""
    if settings.hold_s <= 0:
        raise UsageError(f"router.picker.hold_s must be more than 0, not {settings.hold_s:g}")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise UsageError(f"{NAME}_cert and {NAME}_key go together", hint="Give both, or none for gRPC without TLS.")
    if settings.tls_cert:
        Certificate(settings.tls_cert, settings.tls_key, NAME)
    if settings.listen:
        split_listen(settings.listen, "router.picker.listen")
        if find_spec("grpc") is None:
            raise UsageError("router.picker.listen needs gRPC", hint="pip install 'helios-llm[picker]'")


class Port:
    """Holds ``HOST:PORT`` until ``close``, for processes that listen there with SO_REUSEPORT; itself it does not.

    ``address`` has the port that was found for 0. Raises UsageError, and Unavailable when somebody else is there."""

    def __init__(self, listen: str) -> None:
        host, port = split_listen(listen, "router.picker.listen")
        try:
            family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as alone:  # whoever listens there already, and would share it, is found
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(place)
                place = (place[0], alone.getsockname()[1], *place[2:])
            self._socket = socket.socket(family, kind)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.bind(place)
        except OSError as error:
            raise Unavailable(
                f"router.picker.listen: nothing can listen at {listen}: {error.strerror}", hint="Is it in use?"
            ) from None
        self.address = f"{bracketed(host)}:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        self._socket.close()
