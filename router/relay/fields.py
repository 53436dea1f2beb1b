"""The few fields of a JSON body that the router reads; the body itself goes on as it came.

msgspec reads the whole document but keeps only these, at about 1 GB/s. Where a name comes twice the last one counts,
as it does in vLLM's parser. ``kv_transfer_params`` and ``ec_transfer_params`` tell a worker where to fetch blocks
from, so a client that could set them could make workers read from anywhere: they are refused wherever vLLM would
take them from, ``vllm_xargs`` and ``sampling_params.extra_args`` included (both become the sampling parameters'
``extra_args``).
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from router import errors

TRANSFER: Final = ("kv_transfer_params", "ec_transfer_params")
_ABSENT: Final = (b"", b"null")


class _Transfer(msgspec.Struct):
    kv_transfer_params: Raw = Raw()
    ec_transfer_params: Raw = Raw()


class _Sampling(msgspec.Struct):
    extra_args: Raw = Raw()


class _Body(_Transfer):
    model: str | None = None
    vllm_xargs: Raw = Raw()
    sampling_params: Raw = Raw()


_body = msgspec.json.Decoder(_Body)
_transfer = msgspec.json.Decoder(_Transfer)
_sampling = msgspec.json.Decoder(_Sampling)


def model_of(body: bytes) -> str | None:
    """The model that a JSON body names, or None. Raises ApiError: 400 for what is not JSON or must not be sent."""
    try:
        fields = _body.decode(body)
    except msgspec.ValidationError as error:
        if "$.model" in str(error):
            raise errors.invalid_body("The field 'model' must be a string.", "invalid_type", "model") from None
        raise errors.invalid_body("The request body must be a JSON object.", "invalid_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise errors.invalid_body(f"The request body is not valid JSON: {error}.") from None
    except RecursionError:
        raise errors.invalid_body("The request body is nested too deeply.") from None
    _refuse(fields, "")
    if not _absent(fields.vllm_xargs):
        check_extra(bytes(fields.vllm_xargs), "vllm_xargs.")
    if not _absent(fields.sampling_params):
        _check_sampling(bytes(fields.sampling_params))
    return fields.model


def check_extra(document: bytes, prefix: str) -> None:
    """Refuse transfer parameters in an ``extra_args`` object; one that is no object is left to the worker."""
    try:
        extra = _transfer.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    _refuse(extra, prefix)


def _check_sampling(document: bytes) -> None:
    try:
        sampling = _sampling.decode(document)
    except msgspec.DecodeError:
        return
    if not _absent(sampling.extra_args):
        check_extra(bytes(sampling.extra_args), "sampling_params.extra_args.")


def _refuse(fields: _Transfer, prefix: str) -> None:
    for name, value in zip(TRANSFER, (fields.kv_transfer_params, fields.ec_transfer_params), strict=True):
        if not _absent(value):
            raise errors.forbidden_field(prefix + name)


def _absent(value: Raw) -> bool:
    return bytes(value) in _ABSENT
