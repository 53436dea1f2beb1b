"""vLLM's sleep mode: who may put the worker to sleep, and what it must not be asked meanwhile.

As in vllm/entrypoints/serve/dev/sleep/api_router.py of vLLM 0.32. A real engine that sleeps lets requests wait; here
one is a violation, as is sleep while something is under way, and a model whose weights were dropped (level 2) and not
read again.
"""

from __future__ import annotations

import json
from urllib.parse import parse_qs

from tests.fakes.vllm.endpoint import Answer, Call, Json, Raw
from tests.fakes.vllm.errors import VllmError
from tests.fakes.vllm.journal import Record

TAGS = frozenset({"weights", "kv_cache"})


class Sleep:
    """One fake's sleep."""

    def __init__(self) -> None:
        self.asleep: frozenset[str] = frozenset()
        """What is not in the device's memory."""
        self.emptied = False
        """Whether weights were dropped and not read again."""

    def usable(self, record: Record) -> None:
        """Raise for a request for the model that it can't compute."""
        if self.asleep or self.emptied:
            why = "sleeps" if self.asleep else "has no weights"
            record.violations.append(f"{record.target} for a model that {why}")
            raise VllmError("refused by the fake: the model sleeps", status=503, type="ServiceUnavailableError")


async def sleep(call: Call) -> Answer:
    query = _query(call)
    level = int(query.get("level", ["1"])[0])
    if query.get("mode", ["abort"])[0] not in ("abort", "wait", "keep") or level not in (1, 2):
        raise VllmError("1 validation error", type="Bad Request")
    if call.fake.engine.jobs:
        call.record.violations.append(f"{call.record.target} while {call.fake.engine.jobs} requests are under way")
        raise VllmError("refused by the fake: it is in use")
    state = call.fake.sleep
    state.asleep, state.emptied = TAGS, state.emptied or level == 2
    return Json({"status": "sleeping", "level": level})


async def wake_up(call: Call) -> Answer:
    tags = _query(call).get("tags")
    call.fake.sleep.asleep -= TAGS if tags is None else frozenset(tags)
    return Json({"status": "sleeping" if call.fake.sleep.asleep else "awake", "tags": tags})


async def is_sleeping(call: Call) -> Answer:
    return Json({"is_sleeping": bool(call.fake.sleep.asleep)})


async def collective_rpc(call: Call) -> Answer:
    if json.loads(call.body).get("method") != "reload_weights" or "weights" in call.fake.sleep.asleep:
        raise VllmError(f"refused by the fake: {call.body!r}")
    call.fake.sleep.emptied = False
    return Raw(b"")


def _query(call: Call) -> dict[str, list[str]]:
    return parse_qs(call.scope["query_string"].decode())


HANDLERS = {"/sleep": sleep, "/wake_up": wake_up, "/is_sleeping": is_sleeping, "/collective_rpc": collective_rpc}
