"""What ``helios router top`` shows: the router's models and workers, and the models that are waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from helios.cli.common import size_text
from helios.cli.view import time_left

NARROW = 110
"""Columns below which what matters less is left out."""
TALL = 36
"""Rows below which publishers that are not followed are a number alone."""
LEAST = 3
"""Rows of each table, however low the terminal is."""

HEALTH = {"up": "green", "down": "red", "unknown": "yellow"}


def router_view(state: dict[str, Any], where: str, width: int, height: int) -> RenderableType:
    """A router's ``GET /state``, for a terminal of this size."""
    workers, models, awaited, index = state["workers"], state["models"], state["awaited"], state["index"]
    wide = width >= NARROW
    # Whatever is busiest comes first, and each table gets its part of the height.
    above = [] if index is None else _index(index, height >= TALL)
    room = max(3 * LEAST, height - 10 - (LEAST + 5 if len(above) > 2 else len(above)))
    few = max(LEAST, min(len(awaited), room // 4))
    some = max(LEAST, min(len(models), (room - few) // 3))
    rest = max(LEAST, room - few - some)
    parts: list[RenderableType] = [_title(state, where), Text(), *above]
    if awaited:
        parts += [_awaited(awaited[:few], wide), *_more(len(awaited) - few), Text()]
    busiest = sorted(models, key=lambda model: (-model["in_flight"], model["model"]))
    parts += [_models(busiest[:some]), *_more(len(models) - some), Text()]
    first = sorted(workers, key=lambda one: (_sound(one), -one["in_flight"], one["url"]))
    parts += [_workers(first[:rest], wide), *_more(len(workers) - rest)]
    return Group(*parts)


def _title(state: dict[str, Any], where: str) -> Text:
    workers = [one for one in state["workers"] if not one["draining"]]
    up = sum(one["health"] == "up" for one in workers)
    title = Text.assemble(
        (where, "bold"), (f"  {state['status']}", "green" if state["status"] == "ready" else "bold yellow"),
        (f"  {time_left(state['uptime_s'])}", "dim"), "  workers ",
        (f"{up}/{len(workers)} up", "" if up == len(workers) else "red"),
        f"  requests {sum(one['in_flight'] for one in state['workers'])}", (f"  {_policy(state['policy'])}", "dim"),
    )  # fmt: skip
    title.no_wrap, title.overflow = True, "ellipsis"
    return title


def _policy(policy: dict[str, Any]) -> str:
    """Its name, or what it combines."""
    if policy["name"] is not None:
        return str(policy["name"])
    parts = [one["name"] for one in [*policy["filters"], *policy["scorers"], policy["picker"]]]
    return " + ".join(parts)


def _index(index: dict[str, Any], tall: bool) -> list[RenderableType]:
    """The index of KV events in one line, and whom it doesn't follow."""
    publishers = index["publishers"]
    lost = [one for one in publishers if not one["followed"]]
    followed = len(publishers) - len(lost)
    line = Text.assemble(
        ("index", "dim"), f"  {index['blocks']:,} of {index['max_blocks']:,} blocks  followed ",
        (f"{followed}/{len(publishers)}", "" if followed == len(publishers) else "red"),
        f"  lag {max((one['lag_s'] for one in publishers), default=0.0) * 1000:.0f} ms",
        f"  gaps {sum(one['gaps'] for one in publishers)}",
        (f"  shared places {len(index['shared'])}", "red") if index["shared"] else "",
    )  # fmt: skip
    line.no_wrap, line.overflow = True, "ellipsis"
    parts: list[RenderableType] = [line, Text()]
    return [*parts, _publishers(lost[:LEAST]), *_more(len(lost) - LEAST), Text()] if lost and tall else parts


def _publishers(publishers: Sequence[dict[str, Any]]) -> Table:
    """Those of KV events that are not followed."""
    table = _table("NOT FOLLOWED*", "OF WORKER*", "STATE", "BLOCKS>", "GAPS>")
    for one in publishers:
        state = "asked for what is missing" if one["connected"] else "no connection"
        table.add_row(_cut(one["endpoint"]), _cut(one["worker"]), state, str(one["blocks"]), str(one["gaps"]))
    return table


def _awaited(awaited: Sequence[dict[str, Any]], wide: bool) -> Table:
    table = _table("AWAITED*", "PHASE", "FETCHED>", "", "SINCE>", *(["REASON*"] if wide else []))
    for one in awaited:
        total, done = one["total"], one["done"]
        row: list[RenderableType] = [
            _cut(one["model"]), one["phase"], f"{size_text(done)} of {size_text(total)}" if total else "-",
            ProgressBar(total=total, completed=done, width=12) if total else "", time_left(one["waited_s"]),
        ]  # fmt: skip
        table.add_row(*row, *([_cut(one["reason"] or "")] if wide else []))
    return table


def _models(models: Sequence[dict[str, Any]]) -> Table:
    table = _table("MODEL*", "WORKERS>", "UP>", "CORDONED>", "REQUESTS>")
    for one in models:
        up = Text(str(one["up"]), "" if one["up"] == one["workers"] else "red" if not one["up"] else "yellow")
        table.add_row(_cut(one["model"]), str(one["workers"]), up, str(one["cordoned"] or "-"), str(one["in_flight"]))
    return table


def _workers(workers: Sequence[dict[str, Any]], wide: bool) -> Table:
    more = ["ROLE", "WEIGHT>", "REVISION", "LEASE>"] if wide else []
    table = _table("WORKER", "STATE", "REQUESTS>", *more, "MODELS*", "WHY*")
    for one in workers:
        details: list[RenderableType] = [
            one["role"], f"{one['weight']:g}", one["revision"][:12] or "-",
            "-" if one["lease_s"] is None else f"{one['lease_s']:.0f} s",
        ]  # fmt: skip
        why = "" if one["health"] == "up" else one["reason"] or ""
        table.add_row(
            one["id"], _state(one), str(one["in_flight"]), *(details if wide else []),
            _cut(", ".join([*one["models"], *one["adapters"]])), _cut(why),
        )  # fmt: skip
    return table


def _sound(worker: dict[str, Any]) -> bool:
    """Whether nothing is held against it."""
    return worker["health"] == "up" and worker["breaker"] == "closed" and worker["ejected_s"] is None


def _state(worker: dict[str, Any]) -> Text:
    state = Text(worker["health"], HEALTH[worker["health"]])
    for name in ("cordoned", "unready", "draining"):
        if worker[name]:
            state.append(f" {name}", "yellow")
    if worker["breaker"] != "closed":
        state.append(f" breaker {worker['breaker'].replace('_', ' ')}", "red")
    if worker["ejected_s"] is not None:
        state.append(f" ejected {worker['ejected_s']:.0f} s", "red")
    return state


def _more(count: int) -> list[Text]:
    return [Text(f"  and {count} more", "dim")] if count > 0 else []


def _table(*heads: str) -> Table:
    """Columns; with ``>`` to the right. Those with ``*`` give way where it is narrow, and their texts are cut."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for head in heads:
        justify: Literal["left", "right"] = "right" if head.endswith(">") else "left"
        table.add_column(head.rstrip("*>"), justify=justify, no_wrap=not head.endswith("*"), overflow="ellipsis")
    return table


def _cut(text: str) -> Text:
    return Text(text, overflow="ellipsis", no_wrap=True)
