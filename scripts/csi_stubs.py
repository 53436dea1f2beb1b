#!/usr/bin/env python3
"""Makes csi/csi_pb2.py, the messages of csi/csi.proto, with grpcio-tools: a build hook, and a script.

    python3 scripts/csi_stubs.py [DIRECTORY]     # default: this checkout; needs grpcio-tools and hatchling

The hook runs whenever a wheel is built, and when a checkout is installed for development (`pip install -e`, which `make
setup` does), in pip's own build environment, where pyproject.toml has it install grpcio-tools. The version is fixed,
because messages can only be read by a protobuf that is at least as new as the compiler. What is made is not committed.
"""

from __future__ import annotations

import importlib.resources
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "csi/csi.proto"
MADE = "csi/csi_pb2.py"


def make(root: Path) -> None:
    """Compile ``root``'s csi.proto beside it. A file that is as it should be is left alone, others are replaced in one
    step, because somebody may be importing it. Raises RuntimeError."""
    from grpc_tools import protoc

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory(dir=root / "csi", prefix=".csi_pb2-") as work:
        code = protoc.main(["protoc", f"-I{root}", f"-I{well_known}", f"--python_out={work}", str(root / SOURCE)])
        if code:
            raise RuntimeError(f"protoc ended with {code}: {root / SOURCE}")
        new, old = Path(work, MADE), root / MADE
        if not old.exists() or old.read_bytes() != new.read_bytes():
            os.replace(new, old)


class CsiStubs(BuildHookInterface[Any]):
    """Makes it before anything is packed, and has it packed although git ignores it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        make(Path(self.root))
        build_data["artifacts"].append(f"/{MADE}")


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
