"""Running a fake: its two listeners, in this thread's event loop or in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from helios.http.hosts import here
from helios.http.server import listen_tcp
from router.processes.accept import Acceptor
from router.relay.places import Places
from tests.fakes.vllm.app import Fake, control_app
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.endpoint import CYCLE
from tests.fakes.vllm.faults import Fault
from tests.fakes.vllm.settings import Settings


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, as in vLLM, which hands its cycle to the endpoint and reports what is not HTTP."""

    malformed: Callable[[str], None]

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        cycle.scope["extensions"] = {CYCLE: cycle}
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self.malformed(msg)
        super().send_400_response(msg)


class Listener:
    """One port; it can be closed, which refuses new connections and drops open ones, and opened again."""

    def __init__(self, app: Any, host: str, port: int, keep_alive_s: int, malformed: Callable[[str], None]) -> None:
        self._sock = listen_tcp(host, port)
        self.host, self.port = host, self._sock.getsockname()[1]
        self._state = ServerState()
        self._app, self._keep_alive_s = app, keep_alive_s
        self._protocol = type("FakeProtocol", (Protocol,), {"malformed": staticmethod(malformed)})
        self._acceptor: Acceptor | None = None

    def mount(self, app: Any) -> None:
        """Set the application, which may need the port to be known first."""
        self._app = app

    async def open(self) -> None:
        if self._acceptor is not None:
            return
        if self._sock.fileno() < 0:
            self._sock = listen_tcp(self.host, self.port)
        config = uvicorn.Config(
            self._app, http=self._protocol, ws="none", lifespan="off", log_config=None, access_log=False,
            timeout_keep_alive=self._keep_alive_s,
        )  # fmt: skip
        config.load()
        self._state.default_headers = [
            (b"date", formatdate(time.time(), usegmt=True).encode()), (b"server", b"uvicorn"),
        ]  # fmt: skip
        make = self._protocol
        self._sock.setblocking(False)
        self._acceptor = Acceptor(
            [self._sock], lambda _place: make(config=config, server_state=self._state, app_state={}), None,
            Places(most=1 << 30),
        )  # fmt: skip
        self._acceptor.start()

    async def close(self) -> None:
        """Connections on their way when the port is closed get to their protocol first: what asyncio's own server has
        accepted by then is closed by nobody."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is None:
            return
        await acceptor.stop()
        for connection in list(self._state.connections):
            connection.transport.abort()

    async def drain(self) -> None:
        """Wait until no request is being worked on and no connection is left."""
        while self._state.tasks or self._state.connections:
            await asyncio.sleep(0.01)


async def run(
    settings: Settings,
    started: Callable[[Control], None],
    stop: asyncio.Event,
    host: str = "127.0.0.1",
    port: int = 0,
    control_port: int = 0,
    faults: Sequence[Fault] = (),
) -> None:
    """Serve until ``stop`` is set; ``started`` gets the client of the control API. ``faults`` are in force from the
    beginning."""
    fake: Fake
    worker = Listener(None, host, port, settings.keep_alive_s, lambda text: fake.journal.malformed(text))
    control = Listener(None, host, control_port, 75, lambda text: fake.journal.malformed(f"control: {text}"))
    fake = Fake(settings, f"{here(host)}:{worker.port}", here(host), control.port)
    for fault in faults:
        fake.faults.add(fault)
    worker.mount(fake.app())
    control.mount(control_app(fake, worker))
    await control.open()
    await worker.open()
    events, replay = (0, 0) if fake.events is None else fake.events.ports
    url = f"http://{here(host)}:{worker.port}"
    started(Control(url, f"http://{here(host)}:{control.port}", settings.model, events, replay))
    try:
        await stop.wait()
    finally:
        await worker.close()
        await control.close()
        await worker.drain()
        await control.drain()
        if fake.events is not None:
            fake.events.close()


@contextmanager
def in_thread(settings: Settings) -> Iterator[Control]:
    """A fake in a thread of its own."""
    ready = threading.Event()
    holder: dict[str, Any] = {}

    async def main() -> None:
        holder["loop"], holder["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def started(control: Control) -> None:
            holder["control"] = control
            ready.set()

        await run(settings, started, holder["stop"])

    thread = threading.Thread(target=lambda: asyncio.run(main()), name=f"fake {settings.model}")
    thread.start()
    try:
        if not ready.wait(10):
            raise RuntimeError("the fake did not start within 10 s")
        yield holder["control"]
    finally:
        holder["loop"].call_soon_threadsafe(holder["stop"].set)
        thread.join(10)
        if thread.is_alive():
            raise RuntimeError("the fake did not stop within 10 s")
