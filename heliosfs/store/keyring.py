"""Finds the keys of encrypted domains, and puts the layer that uses them over a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from helios.config import DomainSettings
from helios.errors import InvalidInput, UsageError
from heliosfs.store.keys import check_domain
from heliosfs.store.objects import ObjectStore
from heliosfs.store.sealed import SealedStore
from heliosfs.store.sealing import DomainKey

_KEY = re.compile(r"[0-9a-fA-F]{64}\Z")


def seal_objects(
    store: ObjectStore, settings: Mapping[str, DomainSettings], environ: Mapping[str, str], domains: Sequence[str]
) -> tuple[ObjectStore, Callable[[], None]]:
    """The store with the domains encrypted that have a key; ``domains`` are those in use, with a key or without.

    Raises UsageError for a key that is missing, malformed, or not the one that objects are encrypted with. The second
    value notes the keys as in use: call it when it is sure whose store this is.
    """
    keys = {domain: _keys(domain, its, environ) for domain, its in settings.items()}
    sealed = SealedStore(store, keys)
    sealed.check_keys(domains)
    return (sealed, sealed.mark_keys) if keys else (store, lambda: None)


def _keys(domain: str, settings: DomainSettings, environ: Mapping[str, str]) -> list[DomainKey]:
    where = f"registry.domains.{domain}"
    try:
        check_domain(domain)
    except InvalidInput as error:
        raise UsageError(f"{where}: {error.message}") from None
    if bool(settings.key_file) == bool(settings.key_env):
        raise UsageError(
            f"{where} needs a key: key_file or key_env, one of them",
            hint="Make one with: openssl rand -hex 32 > FILE; chmod 600 FILE. Without it all of the domain is lost.",
        )
    if settings.key_file:
        found = [_key(_read(f"{where}.key_file", settings.key_file), f"{where}.key_file ({settings.key_file})")]
    else:
        text = environ.get(settings.key_env)
        if text is None:
            raise UsageError(f"{where}.key_env: the environment variable {settings.key_env[:80]} is not set")
        found = [_key(text, f"{where}.key_env ({settings.key_env[:80]})")]
    for path in settings.old_key_files:
        found.append(_key(_read(f"{where}.old_key_files", path), f"{where}.old_key_files ({path})"))
    if len({key.id for key in found}) != len(found):
        raise UsageError(f"{where}: the same key is given twice")
    return found


def _key(text: str, where: str) -> DomainKey:
    if not _KEY.match(text.strip()):  # what it is instead stays unsaid: it may be a key in another form
        raise UsageError(f"{where} holds no key", hint="A key is 64 hexadecimal digits: openssl rand -hex 32")
    return DomainKey(bytes.fromhex(text.strip()))


def _read(where: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return file.read(1024).decode("ascii", "replace")
    except OSError as error:
        raise UsageError(f"{where}: {path} can't be read: {error.strerror}") from None
