#!/usr/bin/env python3
"""Makes the messages of our .proto files (``PROTOS``), NAME_pb2.py beside each, with grpcio-tools: a build hook, and a
script.

    python3 scripts/proto_stubs.py [DIRECTORY]     # default: this checkout; needs grpcio-tools and hatchling

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

PROTOS = ("csi/csi.proto", "orchestrator/signals/externalscaler.proto", "router/picker/ext_proc.proto")


def made(proto: str) -> str:
    """What becomes of a file, as a path in the checkout too."""
    return f"{proto.removesuffix('.proto')}_pb2.py"


def make(root: Path) -> None:
    """Compile ``root``'s files, each beside itself. One that is as it should be is left alone, others are replaced in
    one step, because somebody may be importing them. Raises RuntimeError."""
    from grpc_tools import protoc

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    for proto in PROTOS:
        with tempfile.TemporaryDirectory(dir=(root / proto).parent, prefix=".pb2-") as work:
            code = protoc.main(["protoc", f"-I{root}", f"-I{well_known}", f"--python_out={work}", str(root / proto)])
            if code:
                raise RuntimeError(f"protoc ended with {code}: {root / proto}")
            new, old = Path(work, made(proto)), root / made(proto)
            if not old.exists() or old.read_bytes() != new.read_bytes():
                os.replace(new, old)


class ProtoStubs(BuildHookInterface[Any]):
    """Makes them before anything is packed, and has them packed although git ignores them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        make(Path(self.root))
        build_data["artifacts"].extend(f"/{made(proto)}" for proto in PROTOS)


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
