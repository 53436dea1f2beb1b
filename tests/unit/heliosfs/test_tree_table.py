"""Inodes: stable numbers, right counts, nothing kept that the kernel dropped."""

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from helios.names import RepoId
from heliosfs.tree.nodes import REGULAR, BlobFile, Node
from heliosfs.tree.root import root
from heliosfs.tree.snapshot import Snapshot
from heliosfs.tree.table import ROOT, NodeTable, hash_key
from tests.support.tree import file


def node(name: str, mtime: int = 0) -> Node:
    return Node(("test", name), REGULAR, mtime=mtime)


def test_numbers_are_the_same_in_every_table_and_fit_63_bits():
    first, second = NodeTable(root()), NodeTable(root())
    second.hold(node("something else"), ROOT, b"x")
    assert first.hold(node("a"), ROOT, b"x").ino == second.hold(node("a"), ROOT, b"x").ino
    assert all(1 < hash_key(("x", str(i)), 0) < 1 << 63 for i in range(1000))


def test_the_root_is_never_forgotten():
    table = NodeTable(root())
    table.forget(ROOT, 100)
    assert table.get(ROOT) is not None


def test_an_inode_keeps_its_first_time_until_it_is_forgotten():
    table = NodeTable(root())
    slot = table.hold(node("a", mtime=1), ROOT, b"x")
    assert table.hold(node("a", mtime=2), ROOT, b"x") is slot
    assert slot.mtime == 1
    table.forget(slot.ino, 2)
    assert table.hold(node("a", mtime=2), ROOT, b"x").mtime == 2


def test_an_inode_knows_every_repository_it_was_found_in():
    table, entry = NodeTable(root()), file(1)
    repos = [RepoId.parse(f"org/m{number}") for number in range(10)]
    for repo in (*repos, repos[9], repos[0]):
        found = BlobFile(entry, Snapshot(repo, "1" * 40, 1, {"a": entry}), "a", executable=False)
        held = table.hold(found, ROOT, b"x").node
    assert held.repo == repos[0]
    assert held.also == tuple(reversed(repos[3:])), "the last ones, the latest first"


def test_forgetting_what_is_unknown_changes_nothing():
    table = NodeTable(root())
    table.forget(12345, 1)
    assert len(table) == 1


class Kernel(RuleBasedStateMachine):
    """The kernel looks up and forgets; hashes collide all the time."""

    inodes = Bundle("inodes")

    def __init__(self):
        super().__init__()
        self.table = NodeTable(root(), lambda key, attempt: sum(map(ord, key[1])) % 5 + attempt)
        self.counts: dict[int, int] = {}
        self.names: dict[int, str] = {}

    @rule(target=inodes, name=st.text("abc", min_size=1, max_size=2))
    def lookup(self, name):
        ino = self.table.hold(node(name), ROOT, b"x").ino
        assert ino > ROOT
        assert self.names.setdefault(ino, name) == name, "two things share an inode"
        self.counts[ino] = self.counts.get(ino, 0) + 1
        return ino

    @rule(ino=consumes(inodes), count=st.integers(1, 3))
    def forget(self, ino, count):
        held = self.counts.get(ino, 0)
        if not held:
            return
        count = min(count, held)
        self.table.forget(ino, count)
        self.counts[ino] -= count
        if not self.counts[ino]:
            del self.counts[ino], self.names[ino]

    @rule(target=inodes)
    def again(self):
        return multiple(*self.counts)

    @invariant()
    def the_table_holds_what_the_kernel_holds(self):
        assert len(self.table) == len(self.counts) + 1
        for ino, name in self.names.items():
            assert self.table.get(ino).node.key == ("test", name)
        assert len(set(self.names.values())) == len(self.names), "one thing has two inodes"


TestKernel = Kernel.TestCase
