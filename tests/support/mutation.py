"""Hostile versions of a record: bytes flipped, cut, inserted, repeated, swapped."""

from __future__ import annotations

from hypothesis import strategies as st


def mutate(data: st.DataObject, record: bytes, most: int = 3) -> bytes:
    """One to ``most`` changes drawn by hypothesis; the result may equal the record."""
    out = bytearray(record)
    for _ in range(data.draw(st.integers(1, most))):
        at = data.draw(st.integers(0, max(len(out) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "remove", "swap", "digit"])):
            case "flip" if out:
                out[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del out[at:]
            case "repeat":
                out[at:at] = out[at : at + data.draw(st.integers(1, 60))]
            case "remove":
                del out[at : at + data.draw(st.integers(1, 8))]
            case "swap" if out:
                other = data.draw(st.integers(0, len(out) - 1))
                out[at], out[other] = out[other], out[at]
            case "digit":
                out[at : at + 1] = data.draw(st.sampled_from([b"0", b"1", b"9", b'"', b"[", b"]", b",", b".", b"-"]))
            case _:
                out[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    return bytes(out)
