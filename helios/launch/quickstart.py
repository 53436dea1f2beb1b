"""``helios quickstart``: publish a model, mount it, serve it with real vLLM behind the router, and ask it something."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios.cli.common import print_table, size_text
from helios.config import Config
from helios.embedded import AttachedRegistry
from helios.errors import Conflict
from helios.home import Home
from helios.launch import vllm
from helios.launch.ask import ask
from helios.launch.model_info import Task
from helios.launch.progress import Progress
from helios.launch.serving import Serving, check_port, model_path
from helios.launch.source import Published, obtain
from helios.lockfile import LockFile
from helios.mounts import MountState
from helios.names import RepoId

SHOWN_FILES = 12


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line asked for."""

    model: str | None
    name: RepoId | None
    once: bool
    question: str
    max_tokens: int
    start_timeout_s: float
    vllm_arguments: Sequence[str]
    as_json: bool


def quickstart(home: Home, config: Config, wishes: Wishes) -> int:
    """Run it; returns 0 after the first answer with ``once``, else stays until a signal raises Stopped."""
    progress = Progress()
    vllm.require_vllm()
    with Serving(home, config, progress) as serving:
        serving.callback(take_lock(home).release)
        serving.repair()
        check_port(config.router.host, config.router.port)
        registry = serving.registry()
        published = obtain(wishes.model, wishes.name, home, registry.client(), progress)
        mount = serving.mount()
        path = model_path(Path(mount.mountpoint), published.repo, published.commit)
        show_files(path, progress)
        worker, info = serving.start_vllm(path, published.repo, wishes.vllm_arguments, wishes.start_timeout_s)
        router = serving.start_router(config.router.host, config.router.port, [f"{worker.model}={worker.url}"])
        if wishes.model is None:
            progress.note("The tiny model's weights are random, so its words mean nothing.")
        text = sys.stderr if wishes.as_json else sys.stdout
        print(f"\n{wishes.question}\n> ", end="", file=text, flush=True)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(printable(piece), end="", file=text, flush=True)

        with progress.stage("First answer", shown=False) as stage:
            answer = ask(router.url, published.repo.id, info.task, wishes.question, wishes.max_tokens, show)
            stage.done(answer.summary)
        print("\n", file=text, flush=True)
        report = Report(published, mount, path, router.url, registry, info.task, progress, "".join(pieces))
        if wishes.as_json:
            print(json.dumps(report.document(), indent=2), flush=True)
        else:
            report.print()
        if wishes.once:
            return 0
        progress.note("Everything stays up until Ctrl-C.")
        serving.watch()


def printable(text: str) -> str:
    """Text of a model for a terminal, which would obey control characters."""
    return "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)


def take_lock(home: Home) -> LockFile:
    """One quickstart a home."""
    home.ensure_run()
    lock = LockFile.acquire(home.run / "quickstart.lock")
    if lock is None:
        raise Conflict(
            f"a quickstart runs on {home.root} already",
            hint="End it with Ctrl-C, or give this one a HELIOS_HOME of its own.",
        )
    lock.write(f"{os.getpid()}\n".encode())
    return lock


def show_files(path: Path, progress: Progress) -> None:
    """List what the mount shows of the model."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    progress.note(f"  {path}")
    for file in files[:SHOWN_FILES]:
        progress.note(f"    {size_text(file.stat().st_size):>9}  {file.relative_to(path)}")
    if len(files) > SHOWN_FILES:
        progress.note(f"    … and {len(files) - SHOWN_FILES} more")


@dataclass(frozen=True, slots=True)
class Report:
    """What the end of a quickstart tells."""

    published: Published
    mount: MountState
    path: Path
    url: str
    registry: AttachedRegistry
    task: Task
    progress: Progress
    answer: str

    def curl(self) -> str:
        """A line to try next."""
        model = self.published.repo.id
        route, body = {
            "chat": ("chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hello"}]}),
            "completion": ("completions", {"model": model, "prompt": "Hello"}),
            "embedding": ("embeddings", {"model": model, "input": "Hello"}),
        }[self.task]
        header = "-H 'content-type: application/json'"
        return f"curl {self.url}/v1/{route} {header} -d {shlex.quote(json.dumps(body))}"

    def next_steps(self) -> list[tuple[str, str]]:
        registry = self.registry.urls[0]
        mountpoint = self.mount.mountpoint
        steps = [
            ("ask", self.curl()),
            ("metrics", f"{self.url}/metrics (router), {registry}/metrics (registry)"),
            ("files", f"ls {shlex.quote(str(self.path.parent))}/@main/"),
            ("Hub cache", f"HF_HUB_OFFLINE=1 HF_HUB_CACHE={shlex.quote(mountpoint)}/.hub"),
            ("Hub", f"HF_ENDPOINT={registry}"),
        ]
        if self.mount.url:
            steps.insert(2, ("mount metrics", f"{self.mount.url}/metrics"))
        return steps

    def document(self) -> dict[str, Any]:
        stages = [
            {
                "title": stage.title,
                "seconds": round(stage.seconds, 3),
                "result": stage.result,
                "parts": [{"what": what, "seconds": round(seconds, 3)} for what, seconds in stage.parts],
            }
            for stage in self.progress.stages
        ]
        return {
            "model": self.published.repo.id,
            "commit": self.published.commit,
            "stored": self.published.stored,
            "mount": {"path": str(self.path), "mode": self.mount.mode, "reason": self.mount.reason},
            "url": self.url,
            "registry": self.registry.urls[0],
            "answer": self.answer,
            "stages": stages,
        }

    def print(self) -> None:
        rows = []
        for stage in self.progress.stages:
            rows.append([stage.title, f"{stage.seconds:.1f} s", stage.result])
            if len(stage.parts) > 1:
                rows += [[f"  {what}", f"{seconds:.1f} s", ""] for what, seconds in merged(stage.parts)]
        rows.append(["Total", f"{sum(stage.seconds for stage in self.progress.stages):.1f} s", ""])
        usage = self.registry.client().usage()
        facts = [
            ("deduplicated", f"{self.published.stored}; the store keeps {size_text(usage.stored)} "
                             f"for {size_text(usage.logical)} of models"),
            ("mount mode", f"{self.mount.mode} ({self.mount.reason})" if self.mount.reason else self.mount.mode),
            *self.next_steps(),
        ]  # fmt: skip
        if sys.stdout.isatty():
            print_rich(rows, facts)
        else:
            print_table(["STAGE", "TIME", "RESULT"], rows, right=frozenset({1}))
            print()
            for name, text in facts:
                print(f"{name + ':':15} {text}")
        sys.stdout.flush()


def merged(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The parts in order, those that only differ behind a colon ("loading weights: shard 2 of 4") taken together."""
    sums: dict[str, float] = {}
    for what, seconds in parts:
        name = what.partition(":")[0]
        sums[name] = sums.get(name, 0.0) + seconds
    return list(sums.items())


def print_rich(rows: list[list[str]], facts: list[tuple[str, str]]) -> None:
    """The same as a table for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("Stage", box=None, header_style="bold", pad_edge=False)
    table.add_column("Time", justify="right")
    table.add_column("Result")
    for title, seconds, result in rows:
        table.add_row(title, seconds, result, style="dim" if title.startswith(" ") else None)
    console.print(table)
    console.print()
    for name, text in facts:
        console.print(f"[bold]{name:15}[/bold]", end="")
        console.print(text, markup=False, soft_wrap=True)
