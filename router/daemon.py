"""The router as a command: listens, has its processes serve, and ends cleanly."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, closing

from helios.config import Config
from helios.home import Home
from helios.http.server import listen_tcp, url_of
from router import descriptors
from router.admin_access import Access
from router.admin_server import listening
from router.checked import check
from router.picker.port import Port
from router.processes import control, data
from router.processes.members import Role
from router.processes.supervisor import Supervisor, how_many
from router.relay import exchange

log = logging.getLogger("helios.router")

Announce = Callable[[str, list[str], str], None]


def run(config: Config, announce: Announce, reload: Callable[[], Config], home: Home | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. ``reload`` reads the configuration again, on SIGHUP.

    ``announce`` is called with the URL, the models, and where gateways may ask ("": nowhere), once requests are
    answered; ``home``: where the administration's socket is. Raises UsageError for settings that can't work and
    Unavailable when a port or a path is taken. On the first signal no more connections are accepted and answers in
    flight get ``drain_s`` seconds; on a second one they are cut at once.
    """
    settings = config.router
    descriptors.raise_limit()
    models = check(settings, config.registry)

    def checked() -> Config:
        new = reload()
        check(new.router, new.registry)
        return new

    access = Access(settings.admin_tokens, settings.discovery.registrars, settings.demand_tokens)
    with ExitStack() as opened:
        sock = opened.enter_context(closing(listen_tcp(settings.host, settings.port)))
        listen = settings.picker.listen
        picker = opened.enter_context(closing(Port(listen))).address if listen else ""
        url = url_of(sock, settings.host, "https" if settings.tls_cert else "http")
        with listening(settings, access, sock.getsockname()[1], home or Home.from_env(os.environ)) as admin:
            mains = {Role.CONTROL: control.main, Role.DATA: data.main}
            processes = how_many(settings.processes)
            log.info("the router starts", extra={"processes": processes, "hot_path": hot_path(), "picker": picker})
            supervisor = Supervisor(
                config, [sock], admin, mains, checked, lambda: announce(url, models, picker), processes, picker
            )
            return supervisor.run()


def hot_path() -> str:
    """``compiled``, where this is a wheel with modules of mypyc's, or ``interpreted``."""
    return "interpreted" if exchange.__file__.endswith(".py") else "compiled"
