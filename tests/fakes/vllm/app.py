"""The fake put together: state, routes, and the control API."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.fakes.vllm import generation, messages, pooling, responses, service
from tests.fakes.vllm.endpoint import Endpoint, Handler
from tests.fakes.vllm.engine import Engine
from tests.fakes.vllm.errors import no_such_model
from tests.fakes.vllm.events import Events
from tests.fakes.vllm.faults import Fault, FaultPlan
from tests.fakes.vllm.journal import Journal, Record
from tests.fakes.vllm.kv import KvError, Ledger
from tests.fakes.vllm.links import Place, link_of
from tests.fakes.vllm.metrics import Metrics
from tests.fakes.vllm.rooms import Rooms
from tests.fakes.vllm.settings import Settings
from tests.fakes.vllm.sleep import HANDLERS, Sleep
from tests.fakes.vllm.verify import ADMINISTRATION

GENERATE: dict[str, Handler] = {
    "/v1/chat/completions": generation.chat,
    "/v1/completions": generation.completion,
    "/v1/responses": responses.responses,
    "/v1/messages": messages.messages,
    "/v1/messages/count_tokens": messages.count_tokens,
    "/inference/v1/generate": generation.generate,
}
POOL: dict[str, Handler] = {
    "/v1/embeddings": pooling.embeddings,
    "/pooling": pooling.pooling,
    "/classify": pooling.classify,
    "/score": pooling.score,
    "/v1/score": pooling.score,
    "/rerank": pooling.rerank,
    "/v1/rerank": pooling.rerank,
    "/v2/rerank": pooling.rerank,
}
ALWAYS: dict[str, Handler] = {"/tokenize": service.tokenize, "/detokenize": service.detokenize}
AUDIO: dict[str, Handler] = {"/v1/audio/transcriptions": service.audio, "/v1/audio/translations": service.audio}
GET: dict[str, Handler] = {
    "/v1/models": service.models,
    "/health": service.health,
    "/ping": service.health,
    "/version": service.version,
    "/load": service.load,
    "/metrics": service.metrics,
}


class Fake:
    """One fake worker's state."""

    def __init__(self, settings: Settings, own_host: str, control_host: str, control_port: int) -> None:
        self.settings, self.own_host = settings, own_host
        self.healthy = True
        self._skipped_s = 0.0
        self.faults = FaultPlan()
        self.journal = Journal()
        self.metrics = Metrics(settings.model)
        self.ledger = Ledger(settings, self.clock, control_host, control_port)
        self.sleep = Sleep()
        self.rooms = Rooms(settings.lease_s, settings.block_tokens, self.clock)
        self.engine = Engine(
            settings, self.metrics, link_of(Place(settings, control_host, control_port, self.ledger, self.rooms))
        )
        self.control = f"http://{control_host}:{control_port}"
        self.engine.rejected = self._rejected
        self.events = Events(settings.block_tokens) if settings.kv_events else None
        if self.events is not None:
            self.engine.computed = self.events.computed

    def clock(self) -> float:
        """Seconds of a clock that the control API can advance."""
        return time.monotonic() + self._skipped_s

    def skip(self, seconds: float) -> None:
        self._skipped_s += seconds

    def created(self) -> int:
        return int(time.time()) if self.settings.created is None else self.settings.created

    def check_model(self, name: str | None) -> None:
        """Raise vLLM's 404 for a model that is not served; no name means the one that is."""
        if name is not None and name != self.settings.model:
            raise no_such_model(name, self.settings.model)

    def _rejected(self, reason: str) -> None:
        self.journal.records.append(Record("?", "?", [], 0, "", outcome="rejected", violations=[reason]))

    def app(self) -> Starlette:
        """vLLM's routes."""
        routes = []
        posts = {**ALWAYS, **AUDIO}
        posts |= GENERATE if self.settings.runner in ("generate", "all") else {}
        posts |= POOL if self.settings.runner in ("pooling", "all") else {}
        for path, handler in posts.items():
            form = path in AUDIO
            endpoint = Endpoint(self, handler, anthropic=path.startswith("/v1/messages"), json_only=not form)
            routes.append(Route(path, endpoint, methods=["POST"]))
        for path, handler in GET.items():
            routes.append(Route(path, Endpoint(self, handler), methods=["GET"]))
        owned = HANDLERS if self.settings.sleep_mode else {}
        for path in ADMINISTRATION:
            routes.append(Route(path, Endpoint(self, owned.get(path, service.forbidden), owned=path in owned)))
        app = Starlette(routes=routes)
        app.router.redirect_slashes = False
        app.router.default = Endpoint(self, service.not_found)
        return app


def control_app(fake: Fake, listener: Any) -> Starlette:
    """The control API; ``listener`` opens and closes the worker's port."""

    async def journal(request: Request) -> Response:
        if request.method == "DELETE":
            fake.journal.records.clear()
        return JSONResponse(fake.journal.as_json())

    async def faults(request: Request) -> Response:
        if request.method == "DELETE":
            fake.faults.clear()
        else:
            fake.faults.add(msgspec.json.decode(await request.body(), type=Fault))
        return JSONResponse({})

    async def health(request: Request) -> Response:
        fake.healthy = bool((await request.json())["healthy"])
        return JSONResponse({})

    async def listen(request: Request) -> Response:
        if (await request.json())["open"]:
            await listener.open()
        else:
            await listener.close()
        return JSONResponse({})

    async def clock(request: Request) -> Response:
        fake.skip(float((await request.json())["skip_s"]))
        return JSONResponse({})

    async def kv(request: Request) -> Response:
        both = fake.ledger, fake.rooms
        counts = {name: sum(getattr(one, name) for one in both) for name in ("held", "stranded", "claimed")}
        return JSONResponse(counts)

    async def events(request: Request) -> Response:
        assert fake.events is not None, "it publishes nothing"
        fake.events.order(**await request.json())
        return JSONResponse({})

    async def claim(request: Request) -> Response:
        body = await request.json()
        try:
            fake.ledger.claim(body["params"], body["prompt_tokens"])
        except KvError as error:
            return JSONResponse({"refused": str(error)})
        return JSONResponse({"refused": None})

    async def meet(request: Request) -> Response:
        body = await request.json()
        try:
            state = fake.rooms.meet(body["key"], body["said"], body["tokens"])
        except KvError as error:
            return JSONResponse({"refused": str(error), "state": ""})
        return JSONResponse({"refused": None, "state": state})

    async def engine(request: Request) -> Response:
        return JSONResponse({"engine": fake.ledger.engine})

    async def query(request: Request) -> Response:
        """Mooncake's bootstrap server."""
        return JSONResponse({"0": {"engine_id": fake.ledger.engine, "worker_addr": {"0": {"0": fake.control}}}})

    return Starlette(
        routes=[
            Route("/query", query, methods=["GET"]),
            Route("/kv/engine", engine, methods=["GET"]),
            Route("/kv/meet", meet, methods=["POST"]),
            Route("/journal", journal, methods=["GET", "DELETE"]),
            Route("/faults", faults, methods=["POST", "DELETE"]),
            Route("/health", health, methods=["POST"]),
            Route("/listen", listen, methods=["POST"]),
            Route("/clock", clock, methods=["POST"]),
            Route("/events", events, methods=["POST"]),
            Route("/kv", kv, methods=["GET"]),
            Route("/kv/claim", claim, methods=["POST"]),
        ]
    )
