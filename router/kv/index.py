"""Which worker has how much of a prompt in its KV cache.

Workers say which blocks they store and remove (``router.kv.wire``). Their names for blocks are opaque here: vLLM
hashes with one of several functions, from a seed that may differ from process to process, and only the last 64 bits
may be published. So names are used only to find a block again that the same worker removes or continues. What is
compared is the tokens themselves, which every event of a new block carries: the index keeps its own tree of them
(``router.kv.tree``), and a request needs nothing but its token ids.

What counts as held is in ``router.kv.holder``. There are two bounds, on the blocks of a worker's rank and on all. Who
has too many forgets where nothing was stored for the longest time, the end of a prefix before its beginning.

Every method is one synchronous step. What events do comes as generators: each step is small, and between two of them
they may be left or given up.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from router.kv.holder import PIECE, Holder
from router.kv.tree import Forest, Node, Scope, Tree

SETS: Final = 4096
"""Most sets of workers, or of holders, that are remembered."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Most blocks that the index holds, of a worker's rank and of all."""

    per_rank: int = 1 << 17
    total: int = 1 << 21


class KvIndex:
    """The index over all workers. ``skipped`` counts what was not taken in, by reason."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.forest = Forest()
        self.held = 0
        """Blocks held, over all holders."""
        self.skipped: Counter[str] = Counter()
        self.forgotten = 0
        """Blocks forgotten for the bounds."""
        self._trees: dict[Scope, dict[int, Tree]] = {}
        self._holders: dict[int, Holder] = {}
        """By number, those included that are swept away."""
        self._ranks: dict[str, dict[int, Holder]] = {}
        self._bits: dict[str, int] = {}
        """The holders of each worker, as bits."""
        self._sets: dict[tuple[str, ...], int] = {}
        """The holders of sets of workers that were asked about, and..."""
        self._names: dict[int, list[str]] = {}
        """...the workers of sets of holders that were found; both until a holder comes or goes. Of a hundred workers
        most have the same few beginnings, so going through a set once for many questions is most of the gain."""
        self._dead: deque[Holder] = deque()
        self._free: list[int] = []

    def rank(self, worker: str, rank: int) -> Holder:
        """Who takes the events of one rank of a worker."""
        ranks = self._ranks.setdefault(worker, {})
        holder = ranks.get(rank)
        if holder is None:
            number = self._free.pop() if self._free else len(self._holders)
            holder = ranks[rank] = self._holders[number] = Holder(self, worker, rank, number)
            self._bits[worker] = self._bits.get(worker, 0) | 1 << number
            self._holders_changed()
        return holder

    def forget(self, worker: str, rank: int | None = None) -> None:
        """Claim nothing any more of a worker, or of one of its ranks. ``sweep`` frees the memory."""
        ranks = self._ranks.get(worker, {})
        for one in [rank] if rank is not None else list(ranks):
            if holder := ranks.pop(one, None):
                holder.believed = False
                self._bits[worker] &= ~(1 << holder.number)
                self._dead.append(holder)
                self._holders_changed()
        if not ranks:
            self._ranks.pop(worker, None)
            self._bits.pop(worker, None)

    def sweep(self, nodes: int = 64) -> bool:
        """Free some of what was forgotten; whether something is left. To be called now and then."""
        if self._dead:
            holder = self._dead[0]
            holder.where.clear()
            holder.copies.clear()
            if not holder.sweep(nodes):
                self._dead.popleft()
                del self._holders[holder.number]
                self._free.append(holder.number)
        return bool(self._dead)

    def held_by(self, worker: str, rank: int) -> int:
        """Blocks of one rank of a worker in the index."""
        holder = self._ranks.get(worker, {}).get(rank)
        return 0 if holder is None else len(holder.where)

    def score(
        self, tokens: bytes, workers: Collection[str], adapter: str | None = None, salt: str | None = None
    ) -> dict[str, int]:
        """Tokens of a prompt that each worker has cached; a worker without any is left out.

        ``tokens`` are the prompt's token ids, packed. As in vLLM the last one is never counted: it is computed anyway.
        Of a worker with several ranks the best one counts. An adapter goes by its name.
        """
        asked = tuple(workers)
        wanted = self._sets.get(asked)
        if wanted is None:
            wanted = 0
            for worker in asked:
                wanted |= self._bits.get(worker, 0)
            self._sets[asked] = wanted
        best: dict[str, int] = {}
        if wanted:
            found = [
                (blocks * tree.block_size, holders)
                for tree in self._trees.get((adapter, salt), {}).values()
                for holders, blocks in _walk(tree, tokens, wanted)
                if blocks
            ]
            if len(found) > 1:
                found.sort()  # of a worker that is found more than once the most counts
            for count, holders in found:
                best.update(dict.fromkeys(self._workers(holders), count))
        if len(self._sets) > SETS or len(self._names) > SETS:
            self._holders_changed()
        return best

    def _workers(self, holders: int) -> list[str]:
        """Those of a set of holders."""
        names = self._names.get(holders)
        if names is None:
            names = self._names[holders] = []
            bits = bin(holders)[:1:-1]  # searching a text is the fastest way through the bits
            number = bits.find("1")
            while number >= 0:
                names.append(self._holders[number].worker)
                number = bits.find("1", number + 1)
        return names

    def _holders_changed(self) -> None:
        self._sets.clear()
        self._names.clear()

    # --- for holders ---------------------------------------------------------------------------------------------

    def tree(self, scope: Scope, block_size: int) -> Tree:
        trees = self._trees.setdefault(scope, {})
        tree = trees.get(block_size)
        if tree is None:
            tree = trees[block_size] = Tree(self.forest, scope, block_size)
        return tree

    def trim(self, node: Node) -> None:
        """Cut back a leaf, and let go of its tree if it was the last one."""
        tree = node.tree
        if self.forest.nodes.get(node.number) is not node:
            return  # it went with a node below it
        tree.trim(node)
        if not tree.root.children and (trees := self._trees.get(tree.scope)):
            trees.pop(tree.block_size, None)
            if not trees:
                del self._trees[tree.scope]

    def touch_all(self, lower: Node) -> None:
        """A node was split: each of its holders now has two, or the other one."""
        upper = lower.parent
        assert upper is not None
        for number in lower.held:
            holder = self._holders[number]
            if number not in upper.held:
                holder.order.pop(upper, None)
            holder.touch(lower)

    def bound(self, holder: Holder) -> None:
        """Forget until the bounds are met, after ``holder`` has stored something."""
        excess = len(holder.where) - self.bounds.per_rank
        while excess > 0:
            self._shorten(holder, excess)
            excess = len(holder.where) - self.bounds.per_rank
        while max(self.held, self.forest.blocks) > self.bounds.total:
            if self._dead:
                self.sweep()
            else:
                largest = max(self._holders.values(), key=lambda one: len(one.where))
                self._shorten(largest, PIECE)

    def _shorten(self, holder: Holder, most: int) -> None:
        before = self.held
        holder.shorten(most)
        self.forgotten += before - self.held


def _walk(tree: Tree, tokens: bytes, alive: int) -> Iterator[tuple[int, int]]:
    """Sets of holders, and how many blocks of the prompt each of them has without a gap."""
    width = tree.width
    blocks = max(0, (len(tokens) // 4 - 1) // tree.block_size)
    node, depth = tree.root, 0
    while depth < blocks:
        at = depth * width
        child = node.children.get(tokens[at : at + width])
        if child is None:
            break
        if (gone := alive & ~child.some) and depth:
            yield gone, depth
        alive &= child.some
        if not alive:
            return
        size = child.end - child.start
        count = min(tree.common(child, depth, tokens, at), blocks - depth)
        short = alive & ~child.full
        while short:
            lowest = short & -short
            mask = child.held[lowest.bit_length() - 1].mask
            has = (~mask & (mask + 1)).bit_length() - 1
            if has < count:
                yield lowest, depth + has
                alive ^= lowest
            short ^= lowest
        depth += count
        node = child
        if count < size:
            break
    if depth:
        yield alive, depth
