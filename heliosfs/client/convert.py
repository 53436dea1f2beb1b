"""A tensor's bytes as an array of NumPy or PyTorch, without a copy. Neither is needed for anything else."""

from __future__ import annotations

import importlib
import math
from typing import Any, Final

from helios.errors import InvalidInput, Unavailable
from heliosfs.client.values import TensorInfo

NUMPY: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
ML_DTYPES: Final = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""Types that NumPy has from the package ml_dtypes."""

TORCH: Final = NUMPY | ML_DTYPES | {"F4": "float4_e2m1fn_x2"}
"""Two 4-bit floats make one element of PyTorch's, so the last dimension is half as long: as safetensors has it."""


def to_numpy(info: TensorInfo, data: bytearray) -> Any:
    """An array on the bytes. Raises Unavailable without NumPy (or ml_dtypes), InvalidInput for a type it lacks."""
    np = _module("numpy", info)
    name = NUMPY.get(info.dtype)
    kind = name if name is not None else getattr(_module("ml_dtypes", info), ML_DTYPES.get(info.dtype, ""), None)
    if kind is None:
        raise _unknown("NumPy", info)
    return np.frombuffer(data, dtype=np.dtype(kind)).reshape(info.shape)


def to_torch(info: TensorInfo, data: bytearray) -> Any:
    """A tensor on the bytes. Raises Unavailable without PyTorch, InvalidInput for a type that it lacks."""
    dtype, shape = torch_form(info)
    torch = _module("torch", info)
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def torch_form(info: TensorInfo) -> tuple[Any, tuple[int, ...]]:
    """PyTorch's type and shape of a tensor. Raises what ``to_torch`` raises."""
    dtype = getattr(_module("torch", info), TORCH.get(info.dtype, ""), None)
    if dtype is None:
        raise _unknown("PyTorch", info)
    if info.dtype != "F4":
        return dtype, info.shape
    if not info.shape or info.shape[-1] % 2:
        raise _unknown("PyTorch", info)
    return dtype, (*info.shape[:-1], info.shape[-1] // 2)


def _module(name: str, info: TensorInfo) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unavailable(
            f"the tensor {info.name!r} ({info.dtype}) needs the package {name}, which is not installed",
            hint=f"Install it (pip install {name}), or take the bytes with read() or read_into().",
        ) from None


def _unknown(library: str, info: TensorInfo) -> InvalidInput:
    return InvalidInput(
        f"{library} has no type for the tensor {info.name!r} ({info.dtype})",
        hint="Take the bytes with read() or read_into().",
    )
