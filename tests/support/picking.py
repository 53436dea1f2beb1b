"""A picker whose gateways, workers and clock are the test's: everything between them is the real thing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from helios.config import AdmissionSettings, FallbackRule, PickerSettings, RouterSettings
from helios.metrics import RouterMetrics
from router.admission.admission import make
from router.catalog import Catalog
from router.health import State
from router.picker.ext_proc_pb2 import ProcessingRequest, ProcessingResponse
from router.picker.picker import Picker
from router.picker.stream import Stream
from router.relay.relay import Relay
from router.resilience.resilience import Resilience
from router.scheduling.configured import policy_of
from router.workers import Workers, parse_worker

WORKERS = ("m=http://10.0.0.1:80", "m=http://10.0.0.2:80", "n=http://[fd00::3]:80")
BODY = json.dumps({"model": "m", "messages": []}).encode()
HEAD = ((":method", "POST"), (":path", "/v1/chat/completions"), ("x-request-id", "one"))
ENDED = object()


class Site:
    """A relay, its workers, all up, and a picker. ``now`` is the clock, in seconds."""

    def __init__(
        self, workers: Sequence[str] = WORKERS, *, policy: str = "least-requests", max_body_mib: int = 64,
        admission: AdmissionSettings | None = None, aliases: dict[str, str] | None = None,
        fallbacks: Sequence[FallbackRule] = (), **picker: Any,
    ) -> None:  # fmt: skip
        self.now = 100.0
        self.metrics = RouterMetrics()
        self.settings = RouterSettings(
            idle_timeout_s=10, picker=PickerSettings("127.0.0.1:0", **picker), aliases=aliases or {},
            max_body_mib=max_body_mib, admission=admission or AdmissionSettings(), fallbacks=list(fallbacks),
        )  # fmt: skip
        resilience = Resilience(self.settings, self.metrics, lambda: self.now, lambda: 0.5)
        self.workers = Workers([parse_worker(text) for text in workers], lambda: self.now, guard=resilience.guard)
        for worker in self.workers.all:
            worker.health.judged(State.UP, "")
        self.admission = make(self.settings, self.workers, self.metrics)
        self.relay = Relay(
            self.settings, self.workers, policy_of(policy), self.metrics, resilience, self.admission
        )  # fmt: skip
        self.relay.now = lambda: self.now
        self.picker = Picker(self.relay, Catalog(self.workers, self.settings.aliases))

    @property
    def in_flight(self) -> list[int]:
        return [worker.in_flight for worker in self.workers.all]

    def later(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.relay.look(self.now)
        if self.admission is not None:
            self.admission.tick()
        self.workers.tick(self.now)
        self.picker.ledger.tick(self.now)

    def settled(self) -> None:
        """Nothing is held by anybody."""
        assert self.in_flight == [0] * len(self.in_flight)
        assert (self.relay.active, self.relay.budget.used) == (set(), 0)
        assert [worker.load.tokens for worker in self.workers.all] == [0] * len(self.in_flight)


class Talk:
    """One gateway's stream, as gRPC gives it."""

    def __init__(self, site: Site) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self.answers: list[Any] = []
        self.task = asyncio.create_task(Stream(site.picker, self, ENDED).run())

    async def read(self) -> Any:
        return await self._messages.get()

    async def write(self, message: bytes) -> None:
        await asyncio.sleep(0)
        self.answers.append(ProcessingResponse.FromString(message))

    def says(self, *messages: Any) -> None:
        """The gateway sends these; they are parsed as gRPC would."""
        for one in messages:
            self._messages.put_nowait(one if one is ENDED else ProcessingRequest.FromString(one.SerializeToString()))

    async def settle(self) -> list[Any]:
        """What the gateway has been answered once nothing happens any more."""
        for _ in range(50):
            await asyncio.sleep(0)
        return self.answers

    async def ends(self) -> list[Any]:
        """What it has been answered when the picker ends the stream."""
        await asyncio.wait_for(self.task, 10)
        return self.answers


def head(
    *headers: tuple[str, str], ended: bool = False, mode: int | None = 4, subset: Any = None, response_mode: int = 0
) -> Any:
    """``request_headers``; ``headers`` come on top of the usual ones and replace them."""
    message = ProcessingRequest()
    for name, value in {**dict(HEAD), **dict(headers)}.items():
        one = message.request_headers.headers.headers.add()
        one.key, one.raw_value = name, value.encode()
    message.request_headers.end_of_stream = ended
    if mode is not None:
        message.protocol_config.request_body_mode = mode
        message.protocol_config.response_body_mode = response_mode
    if subset is not None:
        message.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(
            {"x-gateway-destination-endpoint-subset": subset}
        )
    return message


def body(content: bytes = BODY, ended: bool = True) -> Any:
    message = ProcessingRequest()
    message.request_body.body, message.request_body.end_of_stream = content, ended
    return message


def trailers() -> Any:
    message = ProcessingRequest()
    message.request_trailers.SetInParent()
    return message


def answer(status: int, served: str = "") -> Any:
    """``response_headers``."""
    message = ProcessingRequest()
    one = message.response_headers.headers.headers.add()
    one.key, one.raw_value = ":status", b"%d" % status
    if served:
        message.metadata_context.filter_metadata["envoy.lb"].update({"x-gateway-destination-endpoint-served": served})
    return message


def piece(content: bytes, ended: bool = False) -> Any:
    message = ProcessingRequest()
    message.response_body.body, message.response_body.end_of_stream = content, ended
    return message


def destination(answers: Sequence[Any]) -> str:
    """Where the first answer says that the request goes: the header and the metadata say the same."""
    response = answers[0].request_headers.response
    assert response.clear_route_cache
    headers = {one.header.key: one for one in response.header_mutation.set_headers}
    chosen = headers["x-gateway-destination-endpoint"]
    assert chosen.append_action == 2  # it replaces what a client said
    told: str = answers[0].dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"]
    assert told == chosen.header.raw_value.decode()
    return told


def passed_on(answers: Sequence[Any]) -> bytes:
    """The body that follows it, which ends with the last piece, and at no other."""
    pieces = [one.request_body.response.body_mutation.streamed_response for one in answers[1:]]
    assert [one.end_of_stream for one in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(one.body) <= 62_000 for one in pieces)
    return b"".join(one.body for one in pieces)


def refused(answers: Sequence[Any]) -> tuple[int, Any, dict[str, str]]:
    """The error that is the only answer: status, what its body says, headers."""
    (one,) = answers
    said = one.immediate_response
    headers = {h.header.key: h.header.raw_value.decode() for h in said.headers.set_headers}
    return said.status.code, json.loads(said.body)["error"]["code"], headers
