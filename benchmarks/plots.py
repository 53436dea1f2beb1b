"""A plot of a benchmark: grouped bars as SVG, written beside its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""Told apart by people who see fewer colours (Paul Tol's bright scheme)."""
LEFT, RIGHT, ROW, GAP, HEAD = 190, 90, 16, 12, 58
WIDTH = 760


def bars(title: str, unit: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Horizontal bars: one group a key, in it one bar a series. ``unit`` is written beside the title."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(series)}
    top = max((value for group in groups.values() for value in group.values()), default=0.0) or 1.0
    out, y = [], HEAD
    for label, group in groups.items():
        out.append(_text(LEFT - 8, y + ROW * len(group) / 2 + 4, label, anchor="end"))
        for name, value in group.items():
            length = max(1.0, value / top * (WIDTH - LEFT - RIGHT))
            out.append(
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 3}" fill="{colour[name]}">'
                f"<title>{escape(f'{label}, {name}: {value:.4g} {unit}')}</title></rect>"
            )
            out.append(_text(LEFT + length + 4, y + ROW - 6, f"{value:.3g}"))
            y += ROW
        y += GAP
    legend, x = [], LEFT
    for name in series:
        legend.append(f'<rect x="{x}" y="32" width="10" height="10" fill="{colour[name]}"/>')
        legend.append(_text(x + 14, 41, name))
        x += 30 + 7 * len(name)
    head = _text(10, 20, f"{title} ({unit})", size=14)
    width = max(WIDTH, x)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
        f'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join([head, *legend, *out])
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def draw(json_path: Path, title: str, unit: str, groups: Mapping[str, Mapping[str, float]], part: str = "") -> Path:
    """Write the plot beside a result and return where; ``part``: which one, of a result with several."""
    out = json_path.with_name(f"{json_path.stem}{'-' if part else ''}{part}.svg")
    out.write_text(bars(title, unit, groups))
    return out
