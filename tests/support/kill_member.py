"""A registry process that is killed and started again (kill_run.py)."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.cloud_servers import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
START_S: Final = 60.0


@dataclass
class Member:
    """One of the registry's processes, in all its lives; its address stays."""

    home: Path
    environ: dict[str, str]
    log: Path
    port: int = field(default_factory=free_port)
    lives: int = 0
    serving: bool = False
    """It has said that it answers, and was not killed since by us."""
    process: subprocess.Popen[str] | None = None
    step: int = 0
    """The step of its own at which it is killed, if it comes there; 0: none."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, step: int = 0) -> bool:
        """Start it, to be killed at its step ``step`` (0: not so); False when that came before it answered."""
        command = [
            sys.executable,
            "-m",
            "tests.support.dying",
            str(step),
            "registry",
            "--port",
            str(self.port),
            "--json",
        ]
        self.close()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self.environ, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.lives += 1
        self.step = step
        self.serving = False
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        if ready and self.process.stdout.readline():
            self.serving = True
            return True
        if not ready or self.process.wait(10) != -signal.SIGKILL or not step:
            raise AssertionError(f"the registry did not start:\n{self.log.read_text()[-3000:]}")
        return False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        assert self.process is not None
        self.serving = False
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """Let go of what is left of a process that has ended."""
        if self.process is not None:
            self.process.wait(10)
            if self.process.stdout is not None:
                self.process.stdout.close()

    def stop(self) -> None:
        """As an operator does; it must end in time and well, unless its step comes as it ends."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        assert code == 0 or (self.step and code == -signal.SIGKILL), f"exit {code}"

    def errors(self) -> list[str]:
        """What was logged as an error, in all its lives; a line that a kill cut off is none."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if told["level"] in ("error", "critical"):
                found.append(line)
        return found
