"""``helios router keys``: the API keys that a router takes."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from helios.cli.common import as_json, print_json, print_table, time_text
from helios.errors import UsageError

if TYPE_CHECKING:
    from router.admission.keys import Key

UNITS = {"m": 60, "h": 3600, "d": 86400}

file_option = click.option(
    "--file", type=click.Path(dir_okay=False, path_type=Path),
    help="File of the keys (default: router.admission.keys of the configuration).",
)  # fmt: skip


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys that a router takes. A running router notices within two seconds."""


@keys.command()
@click.argument("tenant")
@click.option("--label", default="", help="What it is for.")
@click.option("--model", "models", multiple=True, metavar="PATTERN", help="Model that it may use (default: all).")
@click.option("--route", "routes", multiple=True, metavar="PATTERN", help="Path that it may use (default: all).")
@click.option("--requests-per-minute", type=click.FloatRange(min=0), default=0.0, help="0: no limit of its own.")
@click.option("--tokens-per-minute", type=click.FloatRange(min=0), default=0.0, help="0: no limit of its own.")
@click.option("--priority", type=click.Choice(["high", "normal", "low"]), default="normal", show_default=True)
@click.option("--expires", "lifetime", metavar="TIME", help="How long it is good: 12h, 90d (default: for ever).")
@file_option
@as_json
def create(
    tenant: str, label: str, models: tuple[str, ...], routes: tuple[str, ...], requests_per_minute: float,
    tokens_per_minute: float, priority: str, lifetime: str | None, file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Make a key for TENANT and print it. It is shown this once: the file has its hash alone."""
    from router.admission.keys import create as make

    now = time.time()
    fields: dict[str, Any] = {
        "label": label,
        "models": list(models) or ["*"],
        "routes": list(routes) or ["*"],
        "limits": {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute},
        "priority": priority,
        "expires": None if lifetime is None else now + _seconds(lifetime),
    }
    key, text = make(_file(file), tenant, now, **fields)
    if as_json:
        print_json({"key": text, **_described(key)})
        return
    click.echo(text)
    click.echo(f"Key {key.id} of tenant {tenant}: keep it now, it can't be shown again.", err=True)


@keys.command(name="list")
@file_option
@as_json
def list_(file: Path | None, as_json: bool) -> None:
    """List the keys, without the keys themselves."""
    from router.admission.keys import read

    found = read(_file(file)).keys
    if as_json:
        print_json([_described(key) for key in found])
        return
    rows = [
        [
            key.id, key.tenant, key.label, " ".join(key.models), key.priority,
            f"{key.limits.requests_per_minute:g}" if key.limits.requests_per_minute else "any",
            f"{key.limits.tokens_per_minute:g}" if key.limits.tokens_per_minute else "any",
            time_text(key.expires) if key.expires is not None else "never",
        ]
        for key in found
    ]  # fmt: skip
    head = ["ID", "TENANT", "LABEL", "MODELS", "PRIORITY", "REQUESTS/MIN", "TOKENS/MIN", "EXPIRES"]
    print_table(head, rows, right=frozenset({5, 6}))


@keys.command()
@click.argument("identity", metavar="ID")
@file_option
@as_json
def revoke(identity: str, file: Path | None, as_json: bool) -> None:
    """Take the key with this ID out of the file."""
    from router.admission.keys import revoke as take_out

    key = take_out(_file(file), identity)
    if as_json:
        print_json(_described(key))
    else:
        click.echo(f"Key {key.id} of tenant {key.tenant} is revoked.")


def _file(given: Path | None) -> Path:
    from helios.config import load_from_process

    if given is not None:
        return given
    if configured := load_from_process().router.admission.keys:
        return Path(configured)
    raise UsageError("no file of keys is given", hint="Give --file, or set router.admission.keys in the configuration.")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    if found is None:
        raise UsageError(f"{text!r} is not a time", hint="Write 30m, 12h or 90d.")
    return float(int(found[1]) * UNITS[found[2]])


def _described(key: Key) -> dict[str, Any]:
    import msgspec

    document: dict[str, Any] = msgspec.to_builtins(key)
    del document["digest"]
    return document
