"""The few fields of a JSON body that the router reads; the body itself goes on as it came.

Fields that only help to choose a worker are hints: where one has not the type that vLLM wants, the worker will say so,
and the hints are left out. Where a name comes twice the last one counts, as it does in vLLM's parser.
``kv_transfer_params`` and ``ec_transfer_params`` tell a worker where to fetch blocks from, so a client that could set
them could make workers read from anywhere: they are refused wherever vLLM would take them from, ``vllm_xargs`` and
``sampling_params.extra_args`` included (both become the sampling parameters' ``extra_args``). SGLang takes the same
from ``bootstrap_host`` and the like; ``cache_hit_threshold`` lets a worker answer nothing, which the router asks.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from router import errors
from router.relay.said import FIELDS, NEEDED, NOT_SENT, SAMPLINGS, TRANSFERS, Fields, Transfer

TRANSFER: Final = ("kv_transfer_params", "ec_transfer_params")
BOOTSTRAP: Final = (
    "bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "disagg_prefill_dp_rank",
    "cache_hit_threshold",
)  # fmt: skip
"""Fields of the body itself (SGLang's srt/entrypoints/openai/protocol.py and srt/managers/io_struct.py; vLLM's RFC
#24256)."""
_ABSENT: Final = (b"", b"null")


def read(body: bytes) -> Fields:
    """What a JSON body says. Raises ApiError: 400 for what is not JSON or must not be sent."""
    try:
        fields = _decode(body)
    except msgspec.ValidationError as error:
        if "$.model" in str(error):
            raise errors.invalid_body("The field 'model' must be a string.", "invalid_type", "model") from None
        raise errors.invalid_body("The request body must be a JSON object.", "invalid_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise errors.invalid_body(f"The request body is not valid JSON: {error}.") from None
    except RecursionError:
        raise errors.invalid_body("The request body is nested too deeply.") from None
    _refuse(fields, "")
    for name in BOOTSTRAP:
        if not _absent(getattr(fields, name)):
            raise errors.forbidden_field(name)
    if not _absent(fields.vllm_xargs):
        check_extra(bytes(fields.vllm_xargs), "vllm_xargs.")
    if not _absent(fields.sampling_params):
        _check_sampling(fields)
    return fields


def _decode(body: bytes) -> Fields:
    try:
        return FIELDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        needed = NEEDED.decode(body)  # a hint was not as vLLM wants it, or something that matters is wrong
        return Fields(**{name: getattr(needed, name) for name in needed.__struct_fields__})


def check_extra(document: bytes, prefix: str) -> None:
    """Refuse transfer parameters in an ``extra_args`` object; one that is no object is left to the worker."""
    try:
        extra = TRANSFERS.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    _refuse(extra, prefix)


def _check_sampling(fields: Fields) -> None:
    try:
        sampling = SAMPLINGS.decode(fields.sampling_params)
    except msgspec.DecodeError:
        return
    if fields.max_tokens is None and bytes(sampling.max_tokens).isdigit():
        fields.max_tokens = int(bytes(sampling.max_tokens)[:9])
    if not _absent(sampling.extra_args):
        check_extra(bytes(sampling.extra_args), "sampling_params.extra_args.")


def _refuse(fields: Transfer, prefix: str) -> None:
    if not _absent(fields.kv_transfer_params):
        raise errors.forbidden_field(prefix + TRANSFER[0])
    if not _absent(fields.ec_transfer_params):
        raise errors.forbidden_field(prefix + TRANSFER[1])


def _absent(value: Raw) -> bool:
    return value is NOT_SENT or bytes(value) in _ABSENT
