"""A store in which the objects of some domains are encrypted: a layer over any engine, and nothing above it knows.

What the engine sees of such a domain is its name, and how many objects of which kind and size there are; see
``sealing.py``. Nobody reads such objects but through here: there are no local files of them to send, and no addresses
for others.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from blake3 import blake3

from helios.errors import IntegrityError, NoSpace, NotFound, Unavailable, UsageError
from heliosfs.store import sealing
from heliosfs.store.directory import FULL
from heliosfs.store.keys import KINDS, SEALED, check_key, domain_of, sealed_mark
from heliosfs.store.objects import Good, ObjectInfo, ObjectStore
from heliosfs.store.sealing import BLOCK, END_SIZE, HEAD_SIZE, DomainKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

WINDOW: Final = 64
"""Blocks read or written at a time: 4 MiB."""
KNOWN: Final = 16_384
"""Objects whose head and size are remembered."""
MARK: Final = b"helios-key 1\n"
"""Content of the object that says that a key is in use."""


@dataclass(frozen=True, slots=True)
class _Known:
    """An object that was found: what the engine calls it, its own size, and what opens it."""

    name: str
    size: int
    key: DomainKey
    cipher: AESGCM


class SealedStore:
    """``ObjectStore`` over ``inner``. ``keys``: by domain, that for writing first. Threads may share one."""

    def __init__(self, inner: ObjectStore, keys: Mapping[str, Sequence[DomainKey]]) -> None:
        self._inner, self._keys = inner, {domain: list(found) for domain, found in keys.items()}
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()

    # --- keys ---

    def check_keys(self, domains: Sequence[str]) -> None:
        """Raise UsageError unless every object of the domains in use, and of those with keys, can be read: a key that
        is missing or another one, objects that were stored before the domain had a key."""
        for domain in sorted({*domains, *self._keys}):
            used = {info.key.rpartition("/")[2] for info in self._inner.list(sealed_mark(domain, ""))}
            given = {key.id for key in self._keys.get(domain, ())}
            if missing := sorted(used - given):
                raise UsageError(
                    f"objects of the domain {domain} are encrypted with a key that is not here (key id "
                    f"{', '.join(missing)}; here: {', '.join(sorted(given)) or 'none'})",
                    hint=f"Say where it is: registry.domains.{domain}.key_file, or old_key_files for a former one.",
                )
            if given and any(True for kind in KINDS for _ in self._inner.list(f"{domain}/{kind}/")):
                raise UsageError(
                    f"the domain {domain} holds objects that were stored before it had a key",
                    hint="Without the key, carry its models out (helios bundle export) and remove them (helios rm, "
                    "helios gc); with it, bring them in again (helios bundle import).",
                )

    def mark_keys(self) -> None:
        """Note which keys are in use from here on."""
        for domain, keys in self._keys.items():
            self._inner.put_bytes(sealed_mark(domain, keys[0].id), MARK)

    # --- writing ---

    def put_file(self, key: str, path: Path) -> None:
        keys = self._sealing(key)
        if keys is None:
            self._inner.put_file(key, path)
            return
        with _guard(key), open(path, "rb", buffering=0) as source:
            size, digest = _hash(source)
            if not self._is_there(key, keys[1:], size):
                target = self._staged(key, keys[0], source, size, digest)
                try:
                    self._inner.put_file(keys[0].seal_key(key), target)
                finally:
                    target.unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def put_bytes(self, key: str, data: bytes) -> None:
        keys = self._sealing(key)
        if keys is None:
            self._inner.put_bytes(key, data)
            return
        if self._is_there(key, keys[1:], len(data)):
            found = bytearray(len(data))
            self.read_into(key, 0, memoryview(found))
            if found != data:
                raise IntegrityError(f"the object {key} is there already with other content")
            return
        out = bytearray(keys[0].head(key, blake3(data).digest()))
        cipher = keys[0].opened(key, bytes(out))
        view = memoryview(data)
        last = max(1, -(-len(data) // BLOCK)) - 1
        for number in range(last + 1):
            out += sealing.seal_block(cipher, number, view[number * BLOCK : (number + 1) * BLOCK], last=number == last)
        self._inner.put_bytes(keys[0].seal_key(key), bytes(out) + blake3(out).digest())

    def _is_there(self, key: str, former: Sequence[DomainKey], size: int) -> bool:
        """Whether an object lies there that a former key has sealed."""
        for each in former:
            with contextlib.suppress(NotFound):
                found = sealing.plain_size(self._inner.info(each.seal_key(key)).size)
                if found != size:
                    raise IntegrityError(f"the object {key} is there already with {found} bytes, not {size}")
                return True
        return False

    def _staged(self, key: str, with_key: DomainKey, source: BinaryIO, size: int, digest: bytes) -> Path:
        """A file like ``source``, sealed, from which the engine can take it."""
        head = with_key.head(key, digest)
        cipher = with_key.opened(key, head)
        fd, name = tempfile.mkstemp(prefix="sealed-", dir=self._inner.staging())
        try:
            with open(fd, "wb", buffering=0) as target:
                sum_, last = blake3(head), max(1, -(-size // BLOCK)) - 1
                _write(target, head)
                buffer = memoryview(bytearray(WINDOW * BLOCK))
                for first in range(0, last + 1, WINDOW):
                    count = _fill(source, buffer, first * BLOCK)
                    blocks = range(first, min(first + WINDOW, last + 1))
                    parts = (buffer[(n - first) * BLOCK : min((n - first + 1) * BLOCK, count)] for n in blocks)
                    sealed = b"".join(
                        sealing.seal_block(cipher, n, part, last=n == last)
                        for n, part in zip(blocks, parts, strict=True)
                    )
                    sum_.update(sealed)
                    _write(target, sealed)
                _write(target, sum_.digest())
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)

    # --- reading ---

    def info(self, key: str) -> ObjectInfo:
        if self._sealing(key) is None:
            return self._inner.info(key)
        name, _, size = self._find(key)
        return ObjectInfo(key, _content_size(name, size))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        if self._sealing(key) is None:
            self._inner.read_into(key, offset, buffer)
            return
        try:
            self._read(key, self._look(key), offset, buffer)
        except (IntegrityError, NotFound):
            # It may have been removed and written anew, by another process too, since its head was read.
            self._forget(key)
            self._read(key, self._look(key), offset, buffer)

    def _read(self, key: str, found: _Known, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > found.size:
            raise IntegrityError(f"the object {key} ends at byte {found.size}, not at {offset + len(buffer)} or later")
        blocks = sealing.covering(offset, len(buffer), found.size)
        for first in range(blocks.start, blocks.stop, WINDOW):
            some = range(first, min(first + WINDOW, blocks.stop))
            start, end = sealing.block_span(some.start, some.stop, found.size)
            data = memoryview(bytearray(end - start))
            self._inner.read_into(found.name, start, data)
            self._place(key, found, some, data, offset, buffer)

    @staticmethod
    def _place(key: str, found: _Known, blocks: range, data: memoryview, offset: int, buffer: memoryview) -> None:
        """Put into the buffer, which begins at ``offset``, what blocks hold of it."""
        for number, content in zip(
            blocks, sealing.open_blocks(found.cipher, key, blocks, found.size, data), strict=True
        ):
            at = number * BLOCK - offset
            low, high = max(at, 0), min(at + len(content), len(buffer))
            buffer[low:high] = memoryview(content)[low - at : high - at]

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        if self._sealing(key) is None:
            return self._inner.heal(key, offset, length, good)
        found = self._look(key)
        blocks = sealing.covering(offset, length, found.size)
        start, end = sealing.block_span(blocks.start, blocks.stop, found.size)

        def good_blocks(data: memoryview) -> bool:
            out = memoryview(bytearray(length))
            try:
                self._place(key, found, blocks, data, offset, out)
            except IntegrityError:
                return False
            return good(out)

        return self._inner.heal(found.name, start, end - start, good_blocks)

    def _look(self, key: str) -> _Known:
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
                return found
        name, with_key, sealed = self._find(key)
        found = _Known(name, _content_size(name, sealed), with_key, self._cipher(key, name, with_key))
        with self._lock:
            self._known[key] = found
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
        return found

    def _cipher(self, key: str, name: str, with_key: DomainKey) -> AESGCM:
        head = bytearray(HEAD_SIZE)
        self._inner.read_into(name, 0, memoryview(head))
        try:
            return with_key.opened(key, bytes(head))
        except IntegrityError:

            def good(data: memoryview) -> bool:
                with contextlib.suppress(IntegrityError):
                    with_key.opened(key, bytes(data))
                    return True
                return False

            if not self._inner.heal(name, 0, HEAD_SIZE, good):
                raise
        self._inner.read_into(name, 0, memoryview(head))
        return with_key.opened(key, bytes(head))

    def _find(self, key: str) -> tuple[str, DomainKey, int]:
        """What the engine calls the object, the key it is sealed with, and its size there. Raises NotFound."""
        for each in self._keys[domain_of(key)]:
            name = each.seal_key(key)
            with contextlib.suppress(NotFound):
                return name, each, self._inner.info(name).size
        raise NotFound(f"the object store has no object {key}")

    def _forget(self, key: str) -> None:
        with self._lock:
            self._known.pop(key, None)

    # --- the rest ---

    def delete(self, key: str) -> None:
        keys = self._sealing(key)
        if keys is None:
            self._inner.delete(key)
            return
        self._forget(key)
        for each in keys:
            self._inner.delete(each.seal_key(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``ObjectStore``; those of encrypted domains in an order of their own."""
        domain, _, rest = prefix.partition("/")
        kind, slash, _ = rest.partition("/")
        if domain not in self._keys or kind == SEALED:
            inner = prefix
        else:
            inner = f"{domain}/{SEALED}/{kind}/" if slash and kind in KINDS else f"{domain}/"
        for info in self._inner.list(inner):
            opened = self._opened(info) if kind != SEALED else info
            if opened.key.startswith(prefix):
                yield opened

    def _opened(self, info: ObjectInfo) -> ObjectInfo:
        """A listed object as what it is."""
        domain, kind, rest = info.key.split("/", 2)
        if kind != SEALED or domain not in self._keys or rest.partition("/")[0] not in KINDS:
            return info
        for each in self._keys[domain]:
            if (key := each.open_key(info.key)) is not None:
                return ObjectInfo(key, _content_size(info.key, info.size))
        raise IntegrityError(
            f"the object {info.key} is encrypted with none of the keys of its domain",
            hint="It does not come from this registry, or a former key is missing (old_key_files).",
        )

    def open_local(self, key: str) -> BinaryIO | None:
        return self._inner.open_local(key) if self._sealing(key) is None else None

    def signed_urls(self, keys: Sequence[str], expires_s: float) -> Sequence[str | None] | None:
        if any(self._sealing(key) is not None for key in keys):
            return None
        return self._inner.signed_urls(keys, expires_s)

    def near(self, key: str) -> bool:
        return any(map(self._inner.near, self._names(key)))

    def waits(self, key: str) -> bool:
        return any(map(self._inner.waits, self._names(key)))

    def _names(self, key: str) -> Sequence[str]:
        """What the engine may call the object."""
        keys = self._sealing(key)
        return [key] if keys is None else [each.seal_key(key) for each in keys]

    @property
    def lasting(self) -> SealedStore:
        return SealedStore(self._inner.lasting, self._keys)

    @property
    def local(self) -> Path | None:
        return self._inner.local

    def staging(self) -> Path:
        return self._inner.staging()

    def check(self) -> None:
        self._inner.check()

    def problems(self) -> Sequence[str]:
        return self._inner.problems()

    def tidy(self) -> int:
        return self._inner.tidy()

    def close(self) -> None:
        self._inner.close()

    def describe(self) -> str:
        return self._inner.describe()

    def _sealing(self, key: str) -> Sequence[DomainKey] | None:
        """The keys of an object that is encrypted, that for writing first; None for any other object."""
        keys = self._keys.get(domain_of(key))
        if keys is None:
            return None
        _, kind, *name = check_key(key).split("/", 2)
        return keys if kind in KINDS and name else None


def check_end(key: str, file: BinaryIO) -> None:
    """Compare a sealed object with its own sum, without any key. Raises IntegrityError."""
    size = os.fstat(file.fileno()).st_size
    if sealing.plain_size(size) is None:
        raise IntegrityError(f"no encrypted object has {size} bytes: {key}")
    sum_, left = blake3(), size - END_SIZE
    buffer = memoryview(bytearray(1 << 20))
    file.seek(0)
    while left:
        count = file.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            break
        sum_.update(buffer[:count])
        left -= count
    if sum_.digest() != file.read(END_SIZE):
        raise IntegrityError(f"the encrypted object {key} is damaged")


def _content_size(name: str, sealed: int) -> int:
    size = sealing.plain_size(sealed)
    if size is None:
        raise IntegrityError(f"the encrypted object {name} has {sealed} bytes, which none has")
    return size


def _hash(source: BinaryIO) -> tuple[int, bytes]:
    sum_, size = blake3(), 0
    buffer = memoryview(bytearray(WINDOW * BLOCK))
    while count := source.readinto(buffer):  # type: ignore[attr-defined]
        sum_.update(buffer[:count])
        size += count
    return size, sum_.digest()


def _fill(source: BinaryIO, buffer: memoryview, offset: int) -> int:
    done = 0
    while done < len(buffer) and (count := os.preadv(source.fileno(), [buffer[done:]], offset + done)):
        done += count
    return done


def _write(target: BinaryIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[target.write(left) :]


@contextlib.contextmanager
def _guard(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(
                f"no space left to encrypt {key}", hint="Encrypted objects are written twice: make some room."
            ) from None
        raise Unavailable(f"{key} can't be encrypted: {error.strerror}") from None
