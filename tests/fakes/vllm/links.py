"""How a fake's prompts get to another fake, or from one: the protocols of the connectors, each told what is verified.

``nixl`` is in ``kv``. What engines do that is no help is done here, too: one that waits for blocks which never come
waits until its client leaves.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from helios.errors import HeliosError
from helios.http.client import HttpClient
from tests.fakes.vllm.errors import VllmError
from tests.fakes.vllm.kv import KvError, Ledger, Params, check_prefill_leg
from tests.fakes.vllm.rooms import PENDING, Rooms
from tests.fakes.vllm.settings import Settings

if TYPE_CHECKING:
    from tests.fakes.vllm.engine import Job

LOCAL: Final = "local_compute"
EXTERNAL: Final = "external_kv_transfer"
POLL_S: Final = 0.02
WANTED: Final = {"do_remote_decode": False, "do_remote_prefill": True}


class TooLittle(Exception):
    """Less of the prompt is cached than was wanted."""


class Link(Protocol):
    async def load(self, job: Job) -> str:
        """Where the prompt comes from, when it is there. Raises KvError, TooLittle, VllmError."""
        ...

    def done(self, job: Job, finish: str) -> Params | None:
        """The prompt is computed, and its one token made: what goes into the answer."""
        ...

    def left(self, job: Job) -> None:
        """The request is over, one way or the other."""
        ...


@dataclass(slots=True)
class Place:
    """What a link knows of its fake: where its control port is, and what is kept there."""

    settings: Settings
    host: str
    port: int
    ledger: Ledger
    rooms: Rooms

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


async def ask(method: str, url: str, path: str, body: Any = None) -> Any:
    """Another fake's control port. Raises KvError."""
    client = HttpClient(url, timeout_s=5)
    try:
        return await asyncio.to_thread(client.json, method, path, body=body)
    except HeliosError as error:
        raise KvError(f"the prefill worker can't be reached: {error}") from None
    finally:
        client.close()


async def meet(url: str, key: str, said: dict[str, Any], tokens: int) -> None:
    """Wait in a room of the prefill worker until the blocks are there; for one that died, for ever. Raises KvError."""
    client, body = HttpClient(url, timeout_s=30), {"key": key, "said": said, "tokens": tokens}
    try:
        while True:
            try:
                answer = await asyncio.to_thread(client.json, "POST", "/kv/meet", body=body)
            except HeliosError:
                answer = {"refused": None, "state": PENDING}
            if answer["refused"] is not None:
                raise KvError(answer["refused"])
            if answer["state"] != PENDING:
                return
            await asyncio.sleep(POLL_S)
    finally:
        client.close()


def params_of(job: Job) -> Params | None:
    return job.request.kv_transfer_params


def exactly(params: Params, wanted: dict[str, Any], free: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """These fields with these values, and those with any. Raises KvError."""
    for name, value in wanted.items():
        if params.get(name) != value:
            raise KvError(f"{name} is {params.get(name)!r}, not {value!r}")
    names = {*wanted, *free}
    if missing := sorted(names - params.keys()):
        raise KvError(f"there is no {', '.join(missing)}")
    if more := sorted(params.keys() - names - {*optional}):
        raise KvError(f"nobody knows {', '.join(more)}")


class Pull:
    """NIXL: blocks are described in the answer, and fetched."""

    def __init__(self, place: Place) -> None:
        self._place = place

    async def load(self, job: Job) -> str:
        params = params_of(job)
        if params is None:
            return LOCAL
        if self._place.settings.role == "both":
            raise KvError("kv_transfer_params on a worker that takes no part in disaggregation")
        if self._place.settings.role == "prefill":
            check_leg(job, params)
            return LOCAL
        if params.get("do_remote_prefill") is not True:
            raise KvError("a decode leg says do_remote_prefill true")
        url = f"http://{params.get('remote_host')}:{params.get('remote_port')}"
        answer = await ask("POST", url, "/kv/claim", {"params": params, "prompt_tokens": job.prompt_tokens})
        if answer["refused"] is not None:
            raise KvError(answer["refused"])
        return EXTERNAL

    def done(self, job: Job, finish: str) -> Params | None:
        if self._place.settings.role != "prefill" or not params_of(job):
            return None
        return self._place.ledger.mint(job.id, job.prompt_tokens)

    def left(self, job: Job) -> None:
        pass


def check_leg(job: Job, params: Params) -> None:
    check_prefill_leg(params, stream=bool(job.request.stream), limit=job.limit, min_tokens=job.request.min_tokens)


class Push:
    """NIXL push: who answers registers its blocks under the request's id, and they are written."""

    def __init__(self, place: Place) -> None:
        self._place = place

    async def load(self, job: Job) -> str:
        params, place = params_of(job), self._place
        if params is None:
            return LOCAL
        if place.settings.role == "prefill":
            said = {"transfer_id": params.get("transfer_id")}
            check_leg(job, {name: value for name, value in params.items() if name != "transfer_id"})
            if not isinstance(said["transfer_id"], str):
                raise KvError("a prefill leg has a transfer_id")
            place.rooms.enter(job.id, said, job.prompt_tokens)
            return LOCAL
        free = ("remote_engine_id", "remote_host", "remote_port", "tp_size", "remote_request_id", "transfer_id")
        exactly(params, WANTED, free, ("pp_size", "dcp_size"))
        if params["remote_request_id"] not in job.id:
            raise KvError(f"the other one is called {params['remote_request_id']}, this one {job.id}")
        said = {"transfer_id": params["transfer_id"]}
        url = f"http://{params['remote_host']}:{params['remote_port']}"
        if (await ask("GET", url, "/kv/engine"))["engine"] != params["remote_engine_id"]:
            await asyncio.Event().wait()  # nobody writes for an engine that is no more
        await meet(url, job.id, said, job.prompt_tokens)
        return EXTERNAL

    def done(self, job: Job, finish: str) -> Params | None:
        if self._place.settings.role != "prefill" or not params_of(job):
            return None
        self._place.rooms.computed(job.id)
        minted = self._place.ledger.described(job.id, job.prompt_tokens)
        return minted | {"transfer_mode": "push"}

    def left(self, job: Job) -> None:
        self._place.rooms.leave(job.id)


class Mooncake:
    """Both have a transfer's id, and who answers has the other one's bootstrap server and engine."""

    def __init__(self, place: Place) -> None:
        self._place = place

    async def load(self, job: Job) -> str:
        params, place = params_of(job), self._place
        if params is None:
            return LOCAL
        if place.settings.role == "prefill":
            exactly(params, {"do_remote_decode": True, "do_remote_prefill": False}, ("transfer_id",))
            check_leg(job, {name: value for name, value in params.items() if name != "transfer_id"})
            if job.rank != ["0"]:
                raise KvError(f"the rank that computes is {job.rank}, and there is one, 0")
            place.rooms.enter(params["transfer_id"], {}, job.prompt_tokens)
            return LOCAL
        exactly(params, WANTED, ("transfer_id", "remote_bootstrap_addr", "remote_engine_id"))
        engines = await ask("GET", params["remote_bootstrap_addr"], "/query")
        found = [one for one in engines.values() if one["engine_id"] == params["remote_engine_id"]]
        if not found:
            raise KvError(f"remote engine_id {params['remote_engine_id']} not found from bootstrap server")
        await meet(found[0]["worker_addr"]["0"]["0"], params["transfer_id"], {}, job.prompt_tokens)
        return EXTERNAL

    def done(self, job: Job, finish: str) -> Params | None:
        params = params_of(job)
        if self._place.settings.role == "prefill" and params:
            if finish == "length":
                self._place.rooms.computed(params["transfer_id"])
            else:
                self._place.rooms.leave(params["transfer_id"])
        return None

    def left(self, job: Job) -> None:
        params = params_of(job)
        if params and isinstance(params.get("transfer_id"), str):
            self._place.rooms.leave(params["transfer_id"])


class Storage:
    """A directory that all share; with a threshold an answer is made where enough is there."""

    def __init__(self, place: Place, *, thresholds: bool) -> None:
        self._place, self._thresholds = place, thresholds

    def _file(self, job: Job) -> Path:
        name = hashlib.sha256(json.dumps([place for prompt in job.prompts for place in prompt]).encode()).hexdigest()
        return Path(self._place.settings.storage) / name

    async def load(self, job: Job) -> str:
        threshold, role = job.request.cache_hit_threshold, self._place.settings.role
        if params_of(job) is not None:
            raise KvError("a storage wants no kv_transfer_params")
        if threshold is not None and not self._thresholds:
            raise KvError("nobody knows cache_hit_threshold")
        there = self._file(job).exists()
        if role == "prefill":
            if job.request.stream or job.limit != 1 or job.request.min_tokens > 1 or (threshold or 0) != 0:
                raise KvError("a prefill leg asks for one token, no stream, and has no threshold")
            return LOCAL
        if threshold and not there:
            raise TooLittle
        return EXTERNAL if there else LOCAL

    def done(self, job: Job, finish: str) -> Params | None:
        if self._place.settings.role == "prefill":
            self._file(job).touch()
        return None

    def left(self, job: Job) -> None:
        pass


class SGLang:
    """Both have a room at the prefill worker's bootstrap server; neither does anything without."""

    def __init__(self, place: Place) -> None:
        self._place = place

    async def load(self, job: Job) -> str:
        request, place = job.request, self._place
        if params_of(job) is not None:
            raise KvError("SGLang knows no kv_transfer_params")
        if request.bootstrap_room is None:
            raise VllmError("Invalid request: Disaggregated request received without bootstrap room id.")
        key = str(request.bootstrap_room)
        said = {"host": request.bootstrap_host, "port": request.bootstrap_port, "limit": job.limit}
        if place.settings.role == "prefill":
            if (said["host"], said["port"]) != (place.host, place.port):
                raise KvError(f"its bootstrap server is {place.url}, not {said['host']}:{said['port']}")
            if request.stream:
                raise KvError("nobody reads a prefill leg's stream")
            room = place.rooms.enter(key, said, job.prompt_tokens)
            while not room.joined:
                await asyncio.sleep(POLL_S)
            return LOCAL
        await meet(f"http://{said['host']}:{said['port']}", key, said, job.prompt_tokens)
        return EXTERNAL

    def done(self, job: Job, finish: str) -> Params | None:
        if self._place.settings.role == "prefill":
            self._place.rooms.computed(str(job.request.bootstrap_room))
        return None

    def left(self, job: Job) -> None:
        self._place.rooms.leave(str(job.request.bootstrap_room))


def link_of(place: Place) -> Link:
    """The one that the settings name."""
    match place.settings.connector:
        case "nixl":
            return Pull(place)
        case "nixl-push":
            return Push(place)
        case "mooncake":
            return Mooncake(place)
        case "sglang":
            return SGLang(place)
        case name:
            return Storage(place, thresholds=name == "cache-threshold")
