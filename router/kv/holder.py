"""What events do: the blocks that one rank of a worker holds.

- A block counts once for each copy: vLLM stores a block again that two requests computed at the same time, and then
  removes each. But a chain from the start of a prompt of which all is held already may be a report of what was reused
  (``kv_cache_report_mode``), which no removal will follow: it isn't counted. In doubt the index claims too little.
- Removed blocks leave those after them unreachable, not forgotten.
- Adapters (LoRA) and cache salts have trees of their own. A chain ends at the first block whose hash depends on what
  a router can't compute, such as an image; so images never match by their placeholder tokens.
- Only attention over the whole prefix is followed. Of a model with other layers besides it is an upper bound.
- GPU and CPU memory count alike; storage, which workers may share, doesn't count.

Names and places are one to one, whatever a worker says: the last that was said counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from router.kv.tree import DEPTH_BITS, DEPTH_MAX, Held, Node
from router.kv.wire import Removed, Stored

if TYPE_CHECKING:
    from router.kv.index import KvIndex

WHOLE_PREFIX: Final = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of KV cache (``kv_cache_spec_kind``) of which a prompt needs every block."""
PIECE: Final = 256
"""Most blocks that are stored or removed in one step."""
BLOCK_MAX: Final = 1 << 16
"""Most tokens in a block."""


class Holder:
    """One rank of a worker, as long as what it said is believed."""

    __slots__ = ("believed", "copies", "group", "index", "number", "order", "rank", "where", "worker")

    def __init__(self, index: KvIndex, worker: str, rank: int, number: int) -> None:
        self.index, self.worker, self.rank, self.number = index, worker, rank, number
        self.believed = True
        self.where: dict[int, int] = {}
        """Place of each block that is held, by the worker's name for it."""
        self.copies: dict[int, tuple[int, int]] = {}
        """Copies in GPU and in CPU memory, where they are not one and none."""
        self.order: dict[Node, None] = {}
        """Nodes with a block of this holder, the one it stored into longest ago first; a child before its parent."""
        self.group: int | None = None
        """The KV cache group that is followed."""

    # --- what events do ------------------------------------------------------------------------------------------

    def stored(self, event: Stored) -> Iterator[None]:
        if event.kind not in WHOLE_PREFIX or event.medium not in ("GPU", "CPU"):
            return self._skip("unsupported")
        if self.group is None:
            self.group = event.group
        if self.group != event.group:
            return self._skip("group")
        cpu = event.medium == "CPU"
        if not event.tokens:
            return self._copied(event.hashes, cpu)
        if not 0 < event.block_size <= BLOCK_MAX or len(event.tokens) != 4 * event.block_size * len(event.hashes):
            return self._skip("malformed")
        return self._store(event, cpu)

    def removed(self, event: Removed) -> Iterator[None]:
        if event.medium not in ("GPU", "CPU"):
            return self._skip("unsupported")
        if self.group not in (None, event.group):
            return self._skip("group")
        return self._remove(event.hashes, event.medium == "CPU")

    def cleared(self) -> Iterator[None]:
        self.index.forget(self.worker, self.rank)
        return iter(())

    def _skip(self, reason: str) -> Iterator[None]:
        self.index.skipped[reason] += 1
        return iter(())

    def _copied(self, names: list[int], cpu: bool) -> Iterator[None]:
        """Blocks without tokens: those that are known are held once more."""
        for start in range(0, len(names), PIECE):
            for name in names[start : start + PIECE]:
                if self.believed and name in self.where:
                    self._count(name, cpu, 1)
            yield

    def _store(self, event: Stored, cpu: bool) -> Iterator[None]:
        count, salt = _comparable(event)
        anew = event.parent is not None or not all(self._has(name, cpu) for name in event.hashes)
        after = event.parent
        for start in range(0, count, PIECE):
            at = self._root(event, salt) if after is None else self._end_of(after, event)
            if at is None or not self.believed:
                self.index.skipped["orphan"] += 1
                return
            names = event.hashes[start : min(start + PIECE, count)]
            width = 4 * event.block_size
            tokens = event.tokens[start * width : (start + len(names)) * width]
            self._hold(*at, tokens, names, cpu, anew)
            self.index.bound(self)
            after = names[-1]
            yield
        if count < len(event.hashes):
            self.index.skipped["opaque"] += 1

    def _root(self, event: Stored, salt: str | None) -> tuple[Node, int]:
        return self.index.tree((event.adapter, salt), event.block_size).root, 0

    def _end_of(self, name: int, event: Stored) -> tuple[Node, int] | None:
        """Where blocks go that follow the one of this name; None if they can't."""
        place = self.where.get(name)
        if place is None:
            return None
        node, depth = self.index.forest.find(place)
        tree = node.tree
        if tree.block_size != event.block_size or tree.scope[0] != event.adapter or depth + 1 + PIECE > DEPTH_MAX:
            return None
        return node, depth + 1

    def _remove(self, names: list[int], cpu: bool) -> Iterator[None]:
        """Take one copy of each block away."""
        for start in range(0, len(names), PIECE):
            for name in names[start : start + PIECE]:
                if self.believed and name in self.where and self._count(name, cpu, -1):
                    self.release(name)
            yield

    def _has(self, name: int, cpu: bool) -> bool:
        """Whether a block is in this memory."""
        return name in self.where and self.copies.get(name, (1, 0))[cpu] > 0

    def _count(self, name: int, cpu: bool, change: int) -> bool:
        """Count a copy up or down; whether none is left. A copy that is not known can't be removed."""
        on_gpu, on_cpu = self.copies.get(name, (1, 0))
        if cpu:
            on_cpu = max(0, on_cpu + change)
        else:
            on_gpu = max(0, on_gpu + change)
        if (on_gpu, on_cpu) == (1, 0):
            self.copies.pop(name, None)
        else:
            self.copies[name] = (on_gpu, on_cpu)
        return not on_gpu and not on_cpu

    # --- holding and releasing -----------------------------------------------------------------------------------

    def _hold(self, node: Node, depth: int, tokens: bytes, names: list[int], cpu: bool, anew: bool) -> None:
        """Hold the blocks of ``tokens``, which follow ``depth`` blocks that end in ``node``."""
        segments, parted = node.tree.place(node, depth, tokens)
        for lower in parted:
            self.index.touch_all(lower)
        emptied: list[Node] = []
        taken = 0
        for node, depth, count in segments:
            held = node.held.get(self.number)
            if held is None:
                held = node.held[self.number] = Held()
                node.some |= 1 << self.number
            for offset in range(depth - node.start, depth - node.start + count):
                self._name(names[taken], node, held, offset, cpu, anew, emptied)
                taken += 1
            if held.mask == (1 << (node.end - node.start)) - 1:
                node.full |= 1 << self.number
        self.touch(segments[-1][0])
        for node in emptied:
            self._tidy(node)

    def _name(self, name: int, node: Node, held: Held, offset: int, cpu: bool, anew: bool, emptied: list[Node]) -> None:
        """Give a block its name. One name has one place, one place one name: the last that was said counts."""
        where, names = self.where, held.names
        place = where.get(name)
        if place is not None:
            if self.index.forest.find(place) == (node, node.start + offset):
                if anew:
                    self._count(name, cpu, 1)
                return
            emptied.append(self._drop(name))
        if offset < len(names):
            if held.mask >> offset & 1:
                self._forget_name(names[offset])
        else:
            names.extend([0] * (offset + 1 - len(names)))
        names[offset] = name
        held.mask |= 1 << offset
        where[name] = node.number << DEPTH_BITS | node.start + offset
        self.index.held += 1
        if cpu:
            self.copies[name] = (0, 1)

    def _forget_name(self, name: int) -> None:
        del self.where[name]
        self.copies.pop(name, None)
        self.index.held -= 1

    def release(self, name: int) -> None:
        """Hold a block no longer."""
        self._tidy(self._drop(name))

    def _drop(self, name: int) -> Node:
        """Take a block's name away, and return its node, which has to be tidied."""
        node, depth = self.index.forest.find(self.where[name])
        self._forget_name(name)
        held = node.held[self.number]
        held.mask &= ~(1 << (depth - node.start))
        del held.names[held.mask.bit_length() :]
        node.full &= ~(1 << self.number)
        return node

    def _tidy(self, node: Node) -> None:
        held = node.held.get(self.number)
        if held is not None and not held.mask:
            self._leave(node)
        self.index.trim(node)

    def _leave(self, node: Node) -> None:
        del node.held[self.number]
        node.some &= ~(1 << self.number)
        self.order.pop(node, None)

    def touch(self, node: Node) -> None:
        """Something was stored into this node: it and those above it are the last to be forgotten."""
        order, number = self.order, self.number
        step: Node | None = node
        while step is not None:
            if number in step.held:
                order.pop(step, None)
                order[step] = None
            step = step.parent

    def shorten(self, most: int) -> None:
        """Forget up to ``most`` blocks, of the node that was left alone for the longest time, from its end on."""
        node = next(iter(self.order))
        names = node.held[self.number].names
        while most > 0 and names:  # the last name is always one of a held block
            self.release(names[-1])
            most -= 1

    def sweep(self, nodes: int) -> bool:
        """Let go of up to ``nodes`` nodes when nothing is believed any more; whether something is left."""
        while self.order and nodes:
            node, _ = self.order.popitem()
            self.index.held -= node.held[self.number].mask.bit_count()
            node.full &= ~(1 << self.number)
            self._leave(node)
            self.index.trim(node)
            nodes -= 1
        return bool(self.order)


def _comparable(event: Stored) -> tuple[int, str | None]:
    """How many blocks depend on nothing but tokens, adapter and salt; and the salt, which the first block has."""
    salt = None
    for number, keys in enumerate(event.extras[: len(event.hashes)]):
        if not keys:
            continue
        if number == 0 and event.parent is None and len(keys) == 1 and isinstance(keys[0], str):
            salt = keys[0]
            continue
        return number, salt
    return len(event.hashes), salt
