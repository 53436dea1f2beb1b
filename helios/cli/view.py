"""What ``helios status`` shows of a mount: one view, printed once or again every second."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from helios.cli.common import size_text

NARROW = 110
"""Columns below which what matters less is left out."""

MOST = 8
"""Rows of one table; how many more there are is said."""

Row = Sequence[RenderableType]


def mount_view(mount: dict[str, Any], width: int) -> RenderableType:
    """A mount as ``helios status --json`` describes it, for a terminal of this many columns."""
    now = mount["activity"]
    how = Text(f"  {mount['mode']}: {mount['reason']}", "dim")
    parts: list[RenderableType] = [Rule(_title(mount), align="left", style="dim"), how]
    if now is None:
        parts.append(Text("  it does not answer" if mount["alive"] else "  its process is gone", style="red"))
        return Group(*parts, Text())
    wide = width >= NARROW
    parts.append(_summary(now, mount["pool"], mount["shadow"]))
    parts.append(_tiers(now["tiers"], wide))
    sections: list[tuple[list[Any], Callable[[list[Any], bool], Table]]] = [
        (now["models"], _models),
        (mount["volumes"] or [], _volumes),
        (now["fills"], _fills),
        (now["jobs"], _jobs),
        (now["sources"], _sources),
    ]
    parts += [table(items, wide) for items, table in sections if items]
    return Group(*(part for each in parts for part in (each, Text())))


def _title(mount: dict[str, Any]) -> Text:
    now = mount["activity"]
    up = "up" if mount["alive"] else "dead"
    title = Text.assemble(
        (mount["mountpoint"], "bold"), (f"  {mount['mode']}  {up}", "green" if mount["alive"] else "red")
    )
    title.append(f"  pid {mount['pid']}", "dim")
    if now is not None:
        title.append(f"  {time_left(now['uptime_s'])}", "dim")
        if now["draining"]:
            title.append("  draining", "bold yellow")
        if not now["registry_answers"]:
            title.append("  the registry does not answer", "red")
    return title


def _summary(now: dict[str, Any], pool: dict[str, Any] | None, shadow: dict[str, Any] | None) -> Table:
    grid = Table.grid(padding=(0, 2))
    opens, native = now["opens"], now["passthrough_opens"]
    oldest = now["oldest_request_s"]
    grid.add_row(
        _label("files"),
        f"{now['open_files']} open",
        f"{_percent(opens['total'])} of opens found here (last minute {_percent(opens['minute'])})",
        Text(f"oldest request {oldest:.1f} s", "red" if oldest > 10 else ""),
    )
    grid.add_row(
        _label("reads"),
        _read(now["reads"]["total"]),
        f"last minute: {_read(now['reads']['minute'])}",
        f"not counted: {native:.0f} files opened natively" if native else "",
    )
    grid.add_row(
        _label("fetching"),
        f"{len(now['fills'])} files, {now['queued']} queued",
        f"{size_text(now['in_flight'])} in flight, {size_text(now['unflushed'])} to be flushed",
    )
    scrub = now["scrubber"]
    rate = f"{size_text(scrub['rate'])}/s" if scrub["rate"] else "off"
    passes = ", ".join(f"pass {t['passes'] + 1} at {t['progress']:.0%}" for t in scrub["tiers"].values())
    grid.add_row(
        _label("scrubber"),
        f"{'paused' if scrub['paused'] else rate}{', ' if passes else ''}{passes}",
        Text.assemble(f"{size_text(scrub['checked_bytes'])} looked at, ", _bad(scrub["bad"])),
    )
    held = "" if pool is None else f"pool {size_text(pool['used'])} of {size_text(pool['limit'])}"
    hits = "" if pool is None else f"{sum(pool['hits'].values())} hits"
    grid.add_row(_label("memory"), f"{size_text(now['rss_bytes'])}, {held}".rstrip(", "), hits)
    if shadow is not None:
        differ = Text(f"{shadow['mismatches']} differ", "bold red" if shadow["mismatches"] else "green")
        failed = shadow["mount_errors"] + shadow["download_errors"]
        counts = Text.assemble(differ, f", {failed} failed, {shadow['dropped']} dropped; {_shadow_times(shadow)}")
        grid.add_row(_label("shadow"), f"{shadow['compared']} reads compared ({shadow['percent']:g}%)", counts)
    return grid


def _shadow_times(shadow: dict[str, Any]) -> str:
    sides = ((shadow[f"{side}_seconds"], side) for side in ("mount", "download"))
    return ", ".join(f"{side} {seen['p50'] * 1e3:.1f}/{seen['p99'] * 1e3:.1f} ms" for seen, side in sides)


def _tiers(tiers: list[dict[str, Any]], wide: bool) -> Table:
    rows = []
    for tier in tiers:
        limit = tier["limit"]
        bound = limit or tier["used"] + max(0, tier["free"] - int(tier["min_free"] * tier["total"]))
        row = [
            tier["name"] if tier["state"] == "works" else Text.assemble(f"{tier['name']} ", (tier["state"], "red")),
            str(tier["blobs"]),
            size_text(tier["used"]),
            size_text(tier["reserved"]),
            size_text(limit) if limit else "-",
            size_text(tier["free"]),
            _bar(tier["used"] + tier["reserved"], bound),
            _bad(tier["quarantined"]) if wide else None,
            Text(tier["path"], overflow="ellipsis", no_wrap=True) if wide else None,
        ]
        rows.append(row)
    heads = ["TIER", "BLOBS>", "USED>", "RESERVED>", "LIMIT>", "DISK FREE>", "", "QUARANTINE", "WHERE*"]
    return _table(heads if wide else heads[:7], rows)


def _models(models: list[dict[str, Any]], wide: bool) -> Table:
    rows: list[list[RenderableType | None]] = []
    for model in models:
        name = _name(model)
        rows.append(
            [
                name,
                f"{model['local_files']}/{model['files']}",
                size_text(model["local"]),
                size_text(model["bytes"]),
                _bar(model["local"], model["bytes"]),
                Text(model["class"], "bold" if model["class"] == "pinned" else ""),
                model["commit"][:12] if wide else None,
            ]
        )
    heads = ["MODEL*", "FILES>", "LOCAL>", "OF>", "", "CLASS", "COMMIT"]
    return _table(heads if wide else heads[:6], rows)


def _volumes(volumes: list[dict[str, Any]], wide: bool) -> Table:
    rows = [[_cut(v["id"]), _cut(_short(v["repo"])), _cut(v["revision"]), v["commit"][:12]] for v in volumes]
    return _table(["VOLUME*", "MODEL*", "REVISION*", "COMMIT"], rows)


def _fills(fills: list[dict[str, Any]], wide: bool) -> Table:
    rows = []
    for fill in fills:
        eta = "-" if fill["eta_s"] is None else time_left(fill["eta_s"])
        row = [
            _cut(fill["path"]),
            _bar(fill["local"], fill["bytes"]),
            size_text(fill["local"]) if wide else None,
            size_text(fill["bytes"]),
            f"{size_text(fill['rate'])}/s",
            eta,
            _cut(_short(fill["repo"])) if wide else None,
        ]
        rows.append(row)
    heads = ["FILL*", "", "LOCAL>", "OF>", "RATE>", "LEFT>", "MODEL*"]
    return _table(heads if wide else [head for head in heads[:6] if head != "LOCAL>"], rows)


def _jobs(jobs: list[dict[str, Any]], wide: bool) -> Table:
    styles = {"running": "cyan", "waiting": "dim", "done": "green", "failed": "red", "cancelled": "yellow"}
    rows: list[list[RenderableType | None]] = []
    for job in jobs:
        what = _short(job["repo"]) if job["repo"] else "everything"
        row = [
            job["kind"],
            _cut(what),
            Text(job["state"], styles.get(job["state"], "")),
            _bar(job["bytes_done"], job["bytes"]),
            f"{size_text(job['bytes_done'])}",
            time_left(job["seconds"]),
            _cut(job["path"]) if wide else None,
        ]
        rows.append(row)
    heads = ["JOB", "OF*", "STATE", "", "DONE>", "FOR>", "AT*"]
    return _table(heads if wide else heads[:6], rows)


def _sources(sources: list[dict[str, Any]], wide: bool) -> Table:
    rows: list[list[RenderableType | None]] = []
    for source in sources:
        paused = source["state"] != "ok"
        row: list[RenderableType | None] = [
            _cut(source["name"]),
            Text(f"paused {source['paused_s']:.0f} s" if paused else "ok", "red" if paused else "green"),
            f"{source['latency_s'] * 1e3:.1f} ms",
            f"{size_text(source['rate'])}/s",
            f"{source['in_flight']}/{source['connections']}",
            size_text(source["fetched"]),
            str(source["failures"]),
        ]
        rows.append(row)
    return _table(["SOURCE*", "STATE", "LATENCY>", "RATE>", "JOBS>", "FETCHED>", "FAILED>"], rows)


# --- parts ---


def _table(heads: Sequence[str], rows: Iterable[Sequence[RenderableType | None]]) -> Table:
    """A table. A head that ends in ``>`` is one of numbers, ``*`` one of texts that are cut first where it is narrow.

    Cells that are None are left out.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:  # only columns that may wrap give way; their texts are cut instead
        justify: Literal["left", "right"] = "right" if head.endswith(">") else "left"
        table.add_column(head.rstrip(">*"), justify=justify, no_wrap=not head.endswith("*"), overflow="ellipsis")
    found = list(rows)
    for row in found[:MOST]:
        table.add_row(*(cell for cell in row if cell is not None))
    if len(found) > MOST:
        table.add_row(Text(f"and {len(found) - MOST} more", "dim"))
    return table


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=min(done, max(total, 1)) if total else 1, width=12)


def _label(text: str) -> Text:
    return Text(text, "dim")


def _bad(count: int) -> Text:
    return Text(f"{count} bad", "bold red" if count else "dim")


def _cut(text: str) -> Text:
    return Text(text, overflow="ellipsis", no_wrap=True)


def _name(model: dict[str, Any]) -> Text:
    text = Text(_short(model["repo"]), overflow="ellipsis", no_wrap=True)
    text.append(f"@{model['refs'][0] if model['refs'] else model['commit'][:8]}", "dim")
    return text


def _short(repo: str) -> str:
    return repo.removeprefix("models/")


def _read(counts: dict[str, int]) -> str:
    """Bytes that the mount's process handed over."""
    remote = counts.get("remote", 0)
    return f"{size_text(sum(counts.values()) - remote)} from here, {size_text(remote)} from sources"


def _percent(shares: dict[str, Any]) -> str:
    return "-" if shares["hit_ratio"] is None else f"{shares['hit_ratio']:.1%}"


def time_left(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours < 1:
        return f"{minutes} min {int(seconds % 60):02d} s"
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} days"
