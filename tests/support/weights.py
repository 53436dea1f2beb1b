"""Weights as models have them: normally distributed numbers in the types of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

SPREAD = 0.02
"""Their standard deviation, as in a layer of a large model."""


def numbers(dtype: str, count: int, seed: int) -> bytes:
    """``count`` weights of a type: BF16, F16, F32, F8_E4M3; I8 and U8 are evenly distributed: quantised ones."""
    rng = np.random.default_rng(seed)
    if dtype in ("I8", "U8"):
        return rng.integers(0, 256, count, np.uint8).tobytes()
    values = rng.standard_normal(count, np.float32) * np.float32(SPREAD)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    if dtype == "F16":
        return values.astype(np.float16).tobytes()
    if dtype == "F8_E4M3":
        return float8(values * 64).tobytes()
    assert dtype == "F32"
    return values.tobytes()


def float8(values: np.ndarray) -> np.ndarray:
    """Rounded towards zero to E4M3: 4 bits of exponent, biased by 7, 3 of mantissa; what is too small becomes 0."""
    bits = values.astype(np.float32).view(np.uint32)
    exponent = ((bits >> 23) & 0xFF).astype(np.int32) - 127 + 7
    found = ((bits >> 24) & 0x80) | (np.clip(exponent, 0, 15).astype(np.uint32) << 3) | ((bits >> 20) & 7)
    return np.where(exponent <= 0, (bits >> 24) & 0x80, found).astype(np.uint8)


BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1}


def model(tensors: Mapping[str, tuple[str, bytes]]) -> bytes:
    """A safetensors file of tensors given as type and bytes."""
    header, offset = {}, 0
    for name, (dtype, data) in tensors.items():
        shape = [len(data) // BYTES[dtype]]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(data for _, data in tensors.values())
