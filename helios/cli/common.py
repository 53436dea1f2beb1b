"""What the commands share: common options, the registry to use, plain tables, progress on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from helios.errors import InvalidInput, UsageError
from helios.names import KINDS, RepoId, split_spec

if TYPE_CHECKING:
    from helios.embedded import AttachedRegistry

LABEL = 32
"""Most characters before a progress bar."""

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
kind_option = click.option(
    "--kind", type=click.Choice(KINDS), default="models", show_default=True, help="What the repository holds."
)
registry_option = click.option(
    "--registry", "urls", multiple=True, metavar="URL", help="Registry to use; more than one: the first that answers."
)


def attached(urls: Sequence[str]) -> AttachedRegistry:
    """The registry that a command works with: the given, the configured, or the embedded one."""
    from helios.config import load_from_process
    from helios.embedded import attach
    from helios.home import Home

    config = load_from_process({"registry": {"urls": list(urls) or None}})
    return attach(config, Home.from_env(os.environ))


def parse_spec(spec: str, kind: str, default: str = "main") -> tuple[RepoId, str]:
    """``org/name[@revision]`` from the command line; raises UsageError."""
    try:
        return split_spec(spec, default, kind)
    except InvalidInput as error:
        raise UsageError(error.message) from None


def print_json(document: Any) -> None:
    click.echo(json.dumps(document))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> None:
    """Columns padded with spaces, the same on a terminal and in a pipe; ``right`` are aligned to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        click.echo("  ".join(cells).rstrip())


def size_text(count: float) -> str:
    """Bytes for people, in decimal units as disks and the Hub use them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


SIZES: Final = {"": 1} | {f"{unit}b": 1000**n for n, unit in enumerate(["", *"kmgt"])} | {
    f"{unit}ib": 1024**n for n, unit in enumerate("kmgt", 1)
}  # fmt: skip


def parse_size(option: str, text: str | None) -> int:
    """Bytes that an option says: ``24GB``, ``24GiB`` or a plain number; 0 where it is not given. Raises UsageError."""
    if text is None:
        return 0
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([a-zA-Z]*)", text.strip(), re.ASCII)
    unit = None if found is None else SIZES.get(found[2].lower())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size <= 0:
        raise UsageError(f"{option} {text!r} is no size", hint=f"Write {option} 24GB, or 24GiB, or a number of bytes.")
    return size


def time_text(seconds: float) -> str:
    """A time for people, in the local zone."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar of bytes on standard error while the context lasts, where that is a terminal.

    Yields what sets it: called with the bytes done and, if it has become known, the total.
    """
    if not sys.stderr.isatty():
        yield lambda done, total=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    what = what if len(what) <= LABEL else f"{what[: LABEL - 1]}…"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)
