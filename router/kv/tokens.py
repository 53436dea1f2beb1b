"""Token ids of requests, which the index is asked with.

A request may bring them itself (a prompt as token ids). Of any other the router can't know them: the chat template and
the tokenizer are the model's. vLLM's own ``/tokenize`` takes the same fields as the request and applies both, so one of
the model's workers is asked, once for each text: what was answered is kept. Nobody waits longer than the budget for it;
without an answer by then a request simply has no score, and the answer that comes later is kept for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from blake3 import blake3
from msgspec import Raw

from helios.decoding import json_decoder
from helios.http.bodies import within
from router.kv import turned
from router.kv.wire import pack

if TYPE_CHECKING:
    import ssl

    import aiohttp

log = logging.getLogger("helios.router")

COMPLETION: Final = ("prompt", "add_special_tokens")
CHAT: Final = (
    "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template",
    "chat_template_kwargs", "tools", "mm_processor_kwargs",
)  # fmt: skip
"""What ``/tokenize`` takes of a request. ``model`` goes along."""
CHAT_PATH: Final = "/v1/chat/completions"
FIELDS: Final[Mapping[str, tuple[str, ...]]] = {"/v1/completions": COMPLETION, CHAT_PATH: CHAT}
DIRECT: Final[Mapping[str, str]] = {"/v1/completions": "prompt", "/inference/v1/generate": "token_ids"}
"""The fields that may hold token ids."""
TURNED: Final[Mapping[str, Callable[[bytes], turned.Chat | None]]] = {
    "/v1/responses": turned.responses, "/v1/messages": turned.messages,
}  # fmt: skip
"""What makes a conversation of the other APIs' bodies."""
PATHS: Final = FIELDS.keys() | DIRECT.keys() | TURNED.keys()
"""The routes whose prompts can be known."""
MEDIA: Final = re.compile(rb'"(?:image_(?:url|embeds|pil)|video_url|audio_(?:url|embeds)|input_audio)"')
"""Marks of messages with more than text: the worker would have to fetch it, only to say where the text ends."""
ANSWER_MAX: Final = 16 << 20
"""Longest answer that is read, in bytes."""

_object = json_decoder(dict[str, Raw])
_ids = json_decoder(list[int])
_batch = json_decoder(list[list[int]])
_text = json_decoder(str | None)
_options = json_decoder(dict[str, Raw] | None)
NULL: Final = Raw(b"null")


class _Tokens(msgspec.Struct):
    tokens: list[int]


_answer = json_decoder(_Tokens)


class Prompt(NamedTuple):
    """What a request says of its prompt: its token ids, packed, or what ``/tokenize`` is to be asked."""

    tokens: bytes = b""
    question: bytes = b""
    salt: str | None = None
    """The ``cache_salt``, without which its blocks can't be used."""


def prompt_of(path: str, body: bytes) -> Prompt | None:
    """The prompt of a request's JSON; None where there is none, more than one, or one with more than text.

    What is wrong with the request is for the worker to say.
    """
    if path not in PATHS:
        return None
    try:
        fields = _object.decode(body)
        salt = _text.decode(fields["cache_salt"]) if "cache_salt" in fields else None
        tokens = _own(path, fields)
        asked = _question(path, fields, body) if tokens is None else None
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError):
        return None
    if tokens is not None:
        return Prompt(tokens=tokens, salt=salt) if tokens else None
    return None if asked is None else Prompt(question=asked, salt=salt)


def _own(path: str, fields: dict[str, Raw]) -> bytes | None:
    """The token ids that a request brings along, packed; none of several prompts; None where it brings none."""
    value = fields.get(DIRECT.get(path, ""))
    if value is None or not bytes(memoryview(value)[:64]).lstrip().startswith(b"["):
        return None
    try:
        return pack(_ids.decode(value))
    except msgspec.ValidationError:
        pass
    prompts = _batch.decode(value)
    return pack(prompts[0]) if len(prompts) == 1 else b""


def _question(path: str, fields: dict[str, Raw], body: bytes) -> bytes | None:
    if (turn := TURNED.get(path)) is not None:
        chat = turn(body)
        return None if chat is None else msgspec.json.encode({"model": fields.get("model"), **chat})
    names = FIELDS.get(path)
    if names is None or names[0] not in fields:
        return None
    if MEDIA.search(memoryview(fields[names[0]])):
        return None
    asked: dict[str, Any] = {name: fields[name] for name in ("model", *names) if name in fields}
    if path != CHAT_PATH:
        return msgspec.json.encode(asked)
    if bytes(fields.get("documents", NULL)) != b"null":
        return None
    if (effort := _text.decode(fields.get("reasoning_effort", NULL))) is not None:
        asked |= turned.options(_options.decode(fields.get("chat_template_kwargs", NULL)), effort)
    return msgspec.json.encode(asked)


class WorkerTokenizer:
    """Asks workers' ``/tokenize``. ``where``: the base URL of a worker to ask about a model, None if there is none.

    ``budget_s``: longest time that a request waits; ``deadline_s``: longest time for an answer. ``most_bytes``: of
    token ids that are kept, 4 a token. ``most_asked``: questions at once; beyond, nothing is asked.
    """

    def __init__(
        self,
        where: Callable[[str], str | None],
        *,
        budget_s: float = 0.005,
        deadline_s: float = 2.0,
        most_bytes: int = 64 << 20,
        most_asked: int = 32,
        tls: ssl.SSLContext | None = None,
        headers: Callable[[str], Mapping[str, str]] = lambda url: {},
    ) -> None:
        """``tls``: how workers with https are met; ``headers``: what the worker at a URL wants besides, its key
        (``router.worker_keys``)."""
        self._tls, self._headers = tls, headers
        self._where, self._budget_s, self._deadline_s = where, budget_s, deadline_s
        self._most_bytes, self._most_asked = most_bytes, most_asked
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._asked: dict[bytes, asyncio.Task[None]] = {}
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Owns the questions; outside of it nothing is asked."""
        from router.worker_session import worker_session

        self._session = worker_session(self._tls, self._deadline_s, self._most_asked, keeps=True)
        try:
            async with self._session:
                yield
                tasks = list(self._asked.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._session = None

    def known(self, model: str, question: bytes) -> bytes | None:
        """The token ids, if they are here."""
        return self._look_up(_key(model, question))

    async def encode(self, model: str, question: bytes) -> bytes | None:
        """The token ids of a ``Prompt.question``, packed for the index; None where they can't be had in time."""
        key = _key(model, question)
        if (kept := self._look_up(key)) is not None:
            return kept
        task = self._asked.get(key) or self._begin(key, model, question)
        if task is not None:
            await asyncio.wait((task,), timeout=self._budget_s)
        return self._look_up(key)

    def _look_up(self, key: bytes) -> bytes | None:
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    def _begin(self, key: bytes, model: str, asked: bytes) -> asyncio.Task[None] | None:
        if self._session is None or len(self._asked) >= self._most_asked or (url := self._where(model)) is None:
            return None
        task = self._asked[key] = asyncio.get_running_loop().create_task(self._ask(self._session, url, key, asked))
        task.add_done_callback(lambda _: self._asked.pop(key, None))
        return task

    async def _ask(self, session: aiohttp.ClientSession, url: str, key: bytes, asked: bytes) -> None:
        import aiohttp

        headers = {"content-type": "application/json", **self._headers(url)}
        try:
            async with session.post(f"{url}/tokenize", data=asked, headers=headers, allow_redirects=False) as response:
                content = await within(response.content, ANSWER_MAX)
                status = response.status
            if status == 200 and content is not None:
                self._keep(key, pack(_answer.decode(content).tokens))
        except (TimeoutError, aiohttp.ClientError, msgspec.DecodeError, UnicodeDecodeError, OverflowError) as error:
            log.debug("a worker does not tokenize", extra={"worker": url, "reason": repr(error)[:200]})

    def _keep(self, key: bytes, tokens: bytes) -> None:
        if len(tokens) > self._most_bytes:
            return
        self._kept_bytes += len(tokens) - len(self._kept.pop(key, b""))
        self._kept[key] = tokens
        while self._kept_bytes > self._most_bytes:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])


def _key(model: str, question: bytes) -> bytes:
    return blake3(model.encode(errors="replace") + b"\0" + question).digest()
