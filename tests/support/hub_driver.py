"""Runs in a client's own environment: every case of a module, in one process, against one endpoint.

``python hub_driver.py CASES.py CONTEXT.json`` prints a line ``REPORT {name: null or what went wrong}``. A cases module
has functions marked with ``@case``, and with ``@majors`` where not every client can do it; each is called with a
``Client``, and what it asserts is what a user would see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CASES: dict[str, Callable[[Any], None]] = {}
MAJORS: dict[str, tuple[int, ...]] = {}


def case(call: Callable[[Any], None]) -> Callable[[Any], None]:
    CASES[call.__name__.replace("_", " ")] = call
    return call


def majors(*which: int) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Below ``@case``: a case of these majors alone, because others lack what it calls. There is no test for others."""

    def mark(call: Callable[[Any], None]) -> Callable[[Any], None]:
        MAJORS[call.__name__.replace("_", " ")] = which
        return call

    return mark


class Client:
    """One case's view: a fresh directory, the library, the facts of the site."""

    def __init__(self, context: dict[str, Any], directory: Path) -> None:
        import huggingface_hub

        self.hub = huggingface_hub
        self.version = huggingface_hub.__version__
        self.major = int(self.version.split(".")[0])
        self.endpoint: str = context["endpoint"]
        self.api = huggingface_hub.HfApi()
        self.site = SimpleNamespace(**context)
        self.directory = directory
        self.cache = str(directory / "cache")
        self.errors = __import__("huggingface_hub.errors", fromlist=["errors"])

    def fs(self) -> Any:
        """A filesystem that remembers nothing of the other cases."""
        return self.hub.HfFileSystem(skip_instance_cache=True)

    def raises(self, kind: str | type[BaseException], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The exception, whose class must be exactly this one of huggingface_hub's or of Python's."""
        wanted = getattr(self.errors, kind, None) if isinstance(kind, str) else kind
        assert wanted is not None, f"this version has no {kind}"
        try:
            found = call(*args, **kwargs)
        except Exception as error:
            if type(error) is wanted:
                return error
            raise AssertionError(f"{type(error).__name__} instead of {wanted.__name__}: {error}") from error
        raise AssertionError(f"{wanted.__name__} was not raised, but {found!r} returned")

    def hf(self, *args: str, code: int = 0, env: dict[str, str] | None = None) -> str:
        """What the ``hf`` command of this environment prints."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / "hf"), *args], capture_output=True, text=True, timeout=120, check=False,
            cwd=self.directory, env={**os.environ, **(env or {})},
        )  # fmt: skip
        assert done.returncode == code, f"hf {' '.join(args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if code else "")


def main(module: str, context: dict[str, Any]) -> None:
    sys.modules["hub_driver"] = sys.modules["__main__"]
    sys.path.insert(0, str(Path(module).parent))
    __import__(Path(module).stem)
    report: dict[str, str | None] = {}
    major = int(__import__("huggingface_hub").__version__.split(".")[0])
    wanted = {name: call for name, call in CASES.items() if major in MAJORS.get(name, (major,))}
    with tempfile.TemporaryDirectory() as root:
        for number, (name, call) in enumerate(wanted.items()):
            directory = Path(root) / str(number)
            directory.mkdir()
            started = time.monotonic()
            try:
                call(Client(context, directory))
                report[name] = None
            except Exception:
                report[name] = traceback.format_exc(limit=-6)
            print(f"{time.monotonic() - started:6.2f} s  {name}", file=sys.stderr)
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
