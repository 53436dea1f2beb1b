"""The routes that generate nothing: models, tokens, audio, health, metrics, and those that no user may reach."""

from __future__ import annotations

import hashlib
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from tests.fakes.vllm import requests, tokens
from tests.fakes.vllm.endpoint import Answer, Call, Json, Raw
from tests.fakes.vllm.errors import VllmError


async def models(call: Call) -> Answer:
    permission = {
        "id": "modelperm-fake", "object": "model_permission", "created": call.created, "allow_create_engine": False,
        "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True,
        "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
    }  # fmt: skip
    card = {
        "id": call.fake.settings.model, "object": "model", "created": call.created, "owned_by": "vllm",
        "root": call.fake.settings.model, "parent": None, "max_model_len": call.fake.settings.max_model_len,
        "permission": [permission],
    }  # fmt: skip
    return Json({"object": "list", "data": [card]})


async def tokenize(call: Call) -> Answer:
    request = requests.read(call.body, requests.Tokenize)
    call.fake.check_model(request.model)
    ids = request.ids()
    longest = call.fake.settings.max_model_len
    return Json({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": None})


async def detokenize(call: Call) -> Answer:
    request = requests.read(call.body, requests.Detokenize)
    call.fake.check_model(request.model)
    return Json({"prompt": tokens.decode(request.tokens)})


async def audio(call: Call) -> Answer:
    """Transcription and translation: the "text" follows from the file's bytes."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": call.body, "more_body": False}

    async with Request(call.scope, receive).form() as form:
        model, file = form.get("model"), form.get("file")
        if not isinstance(file, UploadFile):
            raise VllmError("1 validation error:\n  file", type="Bad Request", param="body.file")
        call.fake.check_model(model if isinstance(model, str) else None)
        digest = hashlib.sha256(await file.read()).hexdigest()
        call.record.files["file"] = digest
    return Json({"text": f"heard {digest[:16]}", "usage": {"type": "duration", "seconds": 1}})


async def health(call: Call) -> Answer:
    return Raw(b"", status=200 if call.fake.healthy else 503)


async def version(call: Call) -> Answer:
    return Json({"version": "0.32.0"})


async def load(call: Call) -> Answer:
    fake = call.fake  # vLLM counts only with --enable-server-load-tracking
    return Json({"server_load": fake.journal.under_way() if fake.settings.load_tracking else 0})


async def metrics(call: Call) -> Answer:
    return Raw(call.fake.metrics.render(), "text/plain; version=0.0.4; charset=utf-8")


async def forbidden(call: Call) -> Answer:
    """An administrative route; reaching it is already a violation in the journal."""
    return Json({})


async def not_found(call: Call) -> Answer:
    return Json({"detail": "Not Found"}, 404)
