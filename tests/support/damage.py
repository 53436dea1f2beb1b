"""Damage on the disk, as a failing one does it."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, offset: int) -> None:
    """Flip one bit of the byte at ``offset``, also in a read-only file, whose mode stays."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    path.chmod(mode)
