"""Prefixes as a radix tree of runs of blocks.

A node is a run: the tokens of one or more blocks that follow each other, with a bit mask of held blocks for each
holder. Runs are split where prompts part, as in a radix tree (D. Morrison, PATRICIA, JACM 1968; for prefix caches:
L. Zheng et al., SGLang, 2024), so a lookup compares thousands of tokens with one ``memcmp`` and takes as many steps as
there are partings on the way, not blocks.

A block is *held* by a holder or not, independently of those before it: what was forgotten in the middle of a prefix
makes the rest unreachable, and reachable again when it comes back. A leaf is cut back to its last held block at once.

``Place`` of a block: node number and depth in one int, so that the table of a holder's blocks consists of ints alone:
the garbage collector has nothing to walk there, and a block costs some 150 bytes. A split leaves the upper part in the
old node, whose number then also stands for the lower part: ``find`` goes on along ``rest``.
"""

from __future__ import annotations

from typing import Final

RUN_MAX: Final = 512
"""Most blocks in a node: what an operation on a mask or a run costs is bounded by it."""
DEPTH_BITS: Final = 20
DEPTH_MAX: Final = (1 << DEPTH_BITS) - 1
"""Most blocks in a prefix."""

Scope = tuple[str | None, str | None]
"""Adapter and cache salt: what, besides the tokens, makes prefixes different."""


class Held:
    """What one holder has of a node: a bit for each block, and the holder's own name for it."""

    __slots__ = ("mask", "names")

    def __init__(self) -> None:
        self.mask = 0
        self.names: list[int] = []


class Node:
    """A run of blocks from ``start`` to ``end``, counted from the beginning of the prompt.

    ``some`` and ``full`` are sets of holders as bits: those with a block here, and those with all of them.
    """

    __slots__ = ("children", "end", "full", "held", "number", "parent", "rest", "some", "start", "tokens", "tree")

    def __init__(self, tree: Tree, number: int, parent: Node | None, start: int, tokens: bytes) -> None:
        self.tree, self.number, self.parent, self.start, self.tokens = tree, number, parent, start, tokens
        self.end = start + len(tokens) // tree.width
        self.children: dict[bytes, Node] = {}
        """By the tokens of their first block."""
        self.held: dict[int, Held] = {}
        """By holder number."""
        self.some = self.full = 0
        self.rest: Node | None = None
        """The lower part, after a split."""


Segment = tuple[Node, int, int]
"""A node, the first block in it (counted from the beginning of the prompt), and how many."""


class Forest:
    """What the trees of an index share: nodes by number, and how many blocks they hold the tokens of."""

    __slots__ = ("_last", "blocks", "nodes")

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.blocks = 0
        self._last = 0

    def new(self, tree: Tree, parent: Node, start: int, tokens: bytes) -> Node:
        self._last += 1
        node = self.nodes[self._last] = Node(tree, self._last, parent, start, tokens)
        parent.children[tokens[: tree.width]] = node
        return node

    def find(self, place: int) -> tuple[Node, int]:
        """The node and the depth of a block that is held."""
        node, depth = self.nodes[place >> DEPTH_BITS], place & DEPTH_MAX
        while depth >= node.end and node.rest is not None:
            node = node.rest
        return node, depth


class Tree:
    """The prefixes of one scope in blocks of ``block_size`` tokens."""

    __slots__ = ("block_size", "forest", "root", "scope", "width")

    def __init__(self, forest: Forest, scope: Scope, block_size: int) -> None:
        self.forest, self.scope, self.block_size = forest, scope, block_size
        self.width = 4 * block_size
        """Bytes of a block's tokens."""
        self.root = Node(self, 0, None, 0, b"")

    def common(self, node: Node, depth: int, tokens: bytes, at: int) -> int:
        """How many blocks of a node, from ``depth`` on, are those of ``tokens`` from byte ``at`` on."""
        run, width = node.tokens, self.width
        first = (depth - node.start) * width
        most = min(len(run) - first, len(tokens) - at) // width
        if tokens.startswith(run[first : first + most * width], at):
            return most
        low = 0  # blocks that are equal for sure; ``most`` are not
        while low + 1 < most:
            middle = (low + most) // 2
            if tokens.startswith(run[first + low * width : first + middle * width], at + low * width):
                low = middle
            else:
                most = middle
        return low

    def place(self, node: Node, depth: int, tokens: bytes) -> tuple[list[Segment], list[Node]]:
        """Where the blocks of ``tokens`` are that follow ``depth`` blocks, of which the last is in ``node``.

        Makes what is missing: the caller holds it before anything else is done. The second list are the lower parts
        of nodes that were split.
        """
        segments: list[Segment] = []
        parted: list[Node] = []
        at, width = 0, self.width
        while at < len(tokens):
            if depth < node.end:
                count = self.common(node, depth, tokens, at)
                if count:
                    segments.append((node, depth, count))
                    at, depth = at + count * width, depth + count
                if at < len(tokens) and depth < node.end:
                    parted.append(self._split(node, depth))
                continue
            child = node.children.get(tokens[at : at + width])
            if child is None:
                child, count = self._grow(node, tokens[at : at + (RUN_MAX * width)])
                segments.append((child, depth, count))
                at, depth = at + count * width, depth + count
            node = child
        return segments, parted

    def _grow(self, node: Node, tokens: bytes) -> tuple[Node, int]:
        """Put blocks after a node that has no such child: into it, if it is a leaf with room, or into a new one."""
        room = RUN_MAX - (node.end - node.start)
        if node.parent is not None and not node.children and room > 0:
            tokens = tokens[: room * self.width]
            count = len(tokens) // self.width
            node.tokens += tokens
            node.end += count
            node.full = 0
        else:
            node = self.forest.new(self, node, node.end, tokens)
            count = len(tokens) // self.width
        self.forest.blocks += count
        return node, count

    def _split(self, upper: Node, depth: int) -> Node:
        """Make the blocks from ``depth`` on a node of their own, below the rest."""
        keep = depth - upper.start
        children, cut = upper.children, keep * self.width
        upper.children = {}
        lower = self.forest.new(self, upper, depth, upper.tokens[cut:])
        upper.tokens, upper.end = upper.tokens[:cut], depth
        upper.rest, lower.rest = lower, upper.rest
        lower.children = children
        for child in children.values():
            child.parent = lower
        held, upper.held = upper.held, {}
        upper.some = upper.full = 0
        for holder, both in held.items():
            _set(lower, holder, both.mask >> keep, both.names[keep:])
            _set(upper, holder, both.mask & ((1 << keep) - 1), both.names[:keep])
        return lower

    def trim(self, node: Node) -> None:
        """Cut a leaf back to its last held block, and remove what is empty then, up to the root."""
        while not node.children and not node.full and node.parent is not None:
            most = max((held.mask.bit_length() for held in node.held.values()), default=0)
            size = node.end - node.start
            if most == size:
                return
            self.forest.blocks -= size - most
            parent = node.parent
            if most:
                node.tokens, node.end = node.tokens[: most * self.width], node.start + most
                whole = (1 << most) - 1
                node.full = sum(1 << holder for holder, held in node.held.items() if held.mask == whole)
                return
            del parent.children[node.tokens[: self.width]]
            del self.forest.nodes[node.number]
            if parent.rest is node:
                parent.rest = None
            node = parent


def _set(node: Node, holder: int, mask: int, names: list[int]) -> None:
    """What a holder has of a node that was just made by a split."""
    if not mask:
        return
    held = node.held[holder] = Held()
    held.mask, held.names = mask, names[: mask.bit_length()]
    node.some |= 1 << holder
    if mask == (1 << (node.end - node.start)) - 1:
        node.full |= 1 << holder
