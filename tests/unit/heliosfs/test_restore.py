"""Inodes across restarts of the worker: what the kernel holds is found again, and is what it was, or is stale."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from heliosfs.tree import nodelog
from heliosfs.tree.nodelog import NodeLog
from heliosfs.tree.noderecords import Record
from heliosfs.tree.nodes import Absent, Directory, Found, Link, Node
from heliosfs.tree.restore import Restorer
from heliosfs.tree.table import ROOT, NodeTable, hash_key

MOUNT = 7


def now(coroutine):
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


class Folder(Directory):
    """A directory of a model of the tree: names and nodes, which a test changes."""

    def __init__(self, *key):
        super().__init__(key)
        self.names = {}

    async def lookup(self, name, source):
        return Found(name, self.names[name]) if name in self.names else Absent("no")


FOLDERS = ("", "a", "b", "a/c", "b/d")
NAMES = ("x", "y", "z")
TARGETS = st.sampled_from(["one", "two", "three", "four"])


def colliding(key, attempt):
    """Numbers of links collide all the time."""
    return hash_key(key, attempt) if key[0] == "folder" else hash_key(key, 0) % 5 + attempt


class Kernel(RuleBasedStateMachine):
    """A kernel that looks up, forgets and names inodes; workers that die at any moment; links that move.

    A link's key is its target, so one inode has several names.
    """

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "nodes"
        self.folders = {path: Folder("folder", path) for path in FOLDERS}
        for path in FOLDERS[1:]:
            above, _, name = path.rpartition("/")
            self.folders[above].names[name] = self.folders[path]
        self.counts = {}  # what the kernel holds: inode -> how often, all told
        self.fresh = {}  # and how often of this worker
        self.keys = {}  # what it is
        self.mtimes = {}
        self.places = {}  # where it was found last
        self.start()

    def teardown(self):
        self.log.close()
        self.directory.cleanup()

    def start(self, compact_bytes=nodelog.COMPACT_BYTES):
        self.log = NodeLog.open(self.path, MOUNT, compact_bytes=compact_bytes)
        self.table = NodeTable(self.folders[""], colliding, log=self.log)
        self.restorer = Restorer(self.table, None)
        self.fresh = {}

    def inode(self, path):
        """The kernel walks to a folder."""
        ino = ROOT
        for part in path.split("/") if path else ():
            ino = self.look(ino, part)
        return ino

    def look(self, parent, name):
        slot = self.table.get(parent) or now(self.restorer.slot(parent))
        found = now(slot.node.lookup(name, None))
        held = self.table.hold(found.node, parent, name.encode())
        self.table.record()
        ino = held.ino
        assert self.keys.setdefault(ino, found.node.key) == found.node.key, "two things share an inode"
        assert self.mtimes.setdefault(ino, held.mtime) == held.mtime, "the time of an inode changed"
        self.places[ino] = (parent, name)
        self.counts[ino] = self.counts.get(ino, 0) + 1
        self.fresh[ino] = self.fresh.get(ino, 0) + 1
        return ino

    @initialize(seed=st.lists(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), TARGETS), max_size=12))
    def fill(self, seed):
        for path, name, target in seed:
            self.folders[path].names[name] = Link(("link", target), target, mtime=len(self.keys))

    @rule(path=st.sampled_from(FOLDERS), name=st.sampled_from(NAMES))
    def lookup(self, path, name):
        if name in self.folders[path].names:
            self.look(self.inode(path), name)

    @rule(path=st.sampled_from(FOLDERS), name=st.sampled_from(NAMES))
    def refused(self, path, name):
        """The kernel gives a single entry back at once, as it does with a link that has moved."""
        if name in self.folders[path].names:
            ino = self.look(self.inode(path), name)
            self.give_back(ino, 1)

    @precondition(lambda self: self.counts)
    @rule(data=st.data())
    def forget(self, data):
        """All of an inode at once, in any order; but a directory outlives the names that the kernel has below it."""
        needed = {parent for ino, (parent, _) in self.places.items() if ino in self.counts}
        free = sorted(set(self.counts) - needed)
        ino = data.draw(st.sampled_from(free or [ROOT]))
        self.give_back(ino, self.counts.get(ino, 1))

    @precondition(lambda self: self.counts)
    @rule(data=st.data())
    def forget_a_directory_above_another_name(self, data):
        """A file that has a name elsewhere may outlive the directory that it was found in last."""
        ino = data.draw(st.sampled_from(sorted(self.counts)))
        if self.keys[ino][0] == "folder":
            self.give_back(ino, self.counts[ino])

    def give_back(self, ino, count):
        self.table.forget(ino, count)
        if ino == ROOT:
            return
        self.counts[ino] -= count
        self.fresh[ino] = self.fresh.get(ino, 0) - count
        if not self.counts[ino]:
            del self.counts[ino], self.keys[ino], self.mtimes[ino]
            self.fresh.pop(ino)

    @rule(path=st.sampled_from(FOLDERS), name=st.sampled_from(NAMES), to=TARGETS)
    def move(self, path, name, to):
        self.folders[path].names[name] = Link(("link", to), to, mtime=99)

    @rule(torn=st.binary(max_size=50), compact=st.booleans())
    def die(self, torn, compact):
        """A worker that is killed; another one comes."""
        self.log.flush()  # what it had not written was not answered, or was given back
        self.log.close()
        with self.path.open("ab") as file:
            file.write(torn)
        self.start(0 if compact else nodelog.COMPACT_BYTES)

    @rule(cut=st.integers(1, 40), path=st.sampled_from(FOLDERS), name=st.sampled_from(NAMES))
    def die_while_answering(self, cut, path, name):
        """The record is half written, and the kernel never hears of the inode."""
        if name not in self.folders[path].names:
            return
        parent = self.inode(path)
        self.log.flush()
        size = self.path.stat().st_size
        self.table.hold(self.folders[path].names[name], parent, name.encode())
        self.log.close()
        end = max(size, self.path.stat().st_size - cut)
        with self.path.open("ab") as file:
            file.truncate(end)
        self.start()

    @rule(data=st.data())
    def name_an_inode(self, data):
        if self.counts:
            self.check(data.draw(st.sampled_from(sorted(self.counts))))

    def check(self, ino):
        """The inode is what the kernel was told, or it is stale because its name now is something else's."""
        slot = now(self.restorer.slot(ino))
        if slot is None:
            assert not self.still_there(ino), "it is there, and not found"
        else:
            assert slot.ino == ino
            assert slot.node.key == self.keys[ino]
            assert slot.mtime == self.mtimes[ino]

    def still_there(self, ino):
        parent, name = self.places[ino]
        node = self.folders[""] if parent == ROOT else self.folders[self.keys_of_folder(parent)]
        return name in node.names and node.names[name].key == self.keys[ino]

    def keys_of_folder(self, ino):
        """The path of a folder's inode, held or not: folders never move."""
        parent, name = self.places[ino]
        above = "" if parent == ROOT else self.keys_of_folder(parent)
        return f"{above}/{name}" if above else name

    @invariant()
    def one_thing_is_one_inode(self):
        assert len(set(self.keys.values())) == len(self.keys)


TestKernel = Kernel.TestCase
TestKernel.settings = settings(max_examples=150, stateful_step_count=40)


@settings(max_examples=40, stateful_step_count=60)
class Patient(Kernel):
    """The same; in the end every inode that the kernel holds is named, in another worker."""

    def teardown(self):
        self.log.close()
        self.start(compact_bytes=0)
        for ino in sorted(self.counts):
            self.check(ino)
        super().teardown()


TestPatient = Patient.TestCase


# --- one after the other ---------------------------------------------------------------------------------------------


def chain(depth):
    top = Folder("root")
    at = top
    for n in range(depth):
        at.names["a"] = Folder("d", str(n))
        at = at.names["a"]
    return top


def worker(path, top, **options):
    log = NodeLog.open(path, MOUNT, **options)
    table = NodeTable(top, log=log)
    return log, table, Restorer(table, None)


def test_a_deep_file_is_found_again_and_so_is_the_way_to_it(tmp_path):
    top = chain(2000)
    log, table, _ = worker(tmp_path / "nodes", top)
    ino, node = ROOT, top
    for _ in range(2000):
        node = node.names["a"]
        ino = table.hold(node, ino, b"a").ino
    log.close()
    log, table, restorer = worker(tmp_path / "nodes", top)
    assert now(restorer.slot(ino)).node is node
    assert len(table) == 2001
    log.close()


def test_a_log_whose_ways_lead_in_a_circle_is_stale(tmp_path):
    top = chain(2)
    log, table, _ = worker(tmp_path / "nodes", top)
    log.held(Record(5, 6, b"a", None, 0, 0))
    log.held(Record(6, 5, b"a", None, 0, 0))
    log.held(Record(7, 99, b"a", None, 0, 0))
    log.close()
    log, table, restorer = worker(tmp_path / "nodes", top)
    assert [now(restorer.slot(ino)) for ino in (5, 6, 7, 8)] == [None] * 4
    assert len(table) == 1
    log.close()


def test_a_late_name_for_what_was_given_back_is_found_and_kept(tmp_path):
    top = chain(1)
    log, table, _ = worker(tmp_path / "nodes", top)
    ino = table.hold(top.names["a"], ROOT, b"a").ino
    table.record()
    log.close()
    log, table, restorer = worker(tmp_path / "nodes", top)
    table.forget(ino, 1)
    assert len(table) == 1
    assert now(restorer.slot(ino)).ino == ino
    log.close()
    log, table, restorer = worker(tmp_path / "nodes", top, compact_bytes=0)
    assert now(restorer.slot(ino)).ino == ino, "it was named, so it is live, and compacting keeps it"
    log.close()


def test_an_inode_of_before_is_over_when_more_comes_back_than_was_handed_out_since(tmp_path):
    top = chain(1)
    log, table, _ = worker(tmp_path / "nodes", top)
    for _ in range(3):
        ino = table.hold(top.names["a"], ROOT, b"a").ino
    table.record()
    log.close()
    log, table, _ = worker(tmp_path / "nodes", top)
    table.hold(top.names["a"], ROOT, b"a")
    table.forget(ino, 1)
    assert table.get(ino) is not None, "a single entry was refused"
    table.hold(top.names["a"], ROOT, b"a")
    table.forget(ino, 4)
    assert table.get(ino) is None
    log.close()


def test_an_inode_that_was_named_is_held_until_all_of_it_comes_back(tmp_path):
    top = chain(1)
    log, table, _ = worker(tmp_path / "nodes", top)
    ino = table.hold(top.names["a"], ROOT, b"a").ino
    table.record()
    log.close()
    log, table, restorer = worker(tmp_path / "nodes", top)
    now(restorer.slot(ino))
    table.hold(top.names["a"], ROOT, b"a")
    table.forget(ino, 1)
    assert table.get(ino) is not None
    table.forget(ino, 1)
    assert table.get(ino) is None
    log.close()


def test_an_inode_is_found_where_it_was_handed_out_last(tmp_path):
    top = Folder("root")
    top.names = {"old": Node(("blob",), 0o100444), "new": Node(("blob",), 0o100444)}
    log, table, _ = worker(tmp_path / "nodes", top)
    inos = {table.hold(top.names[name], ROOT, name.encode()).ino for name in ("old", "new")}
    table.record()
    log.close()
    del top.names["old"]
    log, _, restorer = worker(tmp_path / "nodes", top)
    assert {now(restorer.slot(ino)).ino for ino in inos} == inos
    assert len(inos) == 1
    log.close()


def test_what_the_kernel_gave_back_leaves_the_log(tmp_path):
    """Whichever worker handed it out, and whether it came up since or not."""
    top = chain(1)
    top.names |= {"b": Folder("b"), "c": Folder("c"), "d": Folder("d")}
    log, table, _ = worker(tmp_path / "nodes", top)
    a, b, c, d = (table.hold(top.names[name], ROOT, name.encode()).ino for name in "abcd")
    table.forget(a, 1)
    log.close()
    log, table, restorer = worker(tmp_path / "nodes", top)
    now(restorer.slot(b))
    table.forget(b, 1)
    table.forget(c, 1)
    log.close()
    log, _, restorer = worker(tmp_path / "nodes", top, compact_bytes=0)
    assert [ino in log for ino in (a, b, c, d)] == [False, False, False, True]
    assert now(restorer.slot(d)).ino == d
    log.close()


def test_nothing_is_written_of_what_the_log_says_already(tmp_path):
    top = chain(1)
    log, table, _ = worker(tmp_path / "nodes", top)
    table.hold(top.names["a"], ROOT, b"a")
    log.close()
    size = (tmp_path / "nodes").stat().st_size
    log, table, _ = worker(tmp_path / "nodes", top)
    for _ in range(3):
        table.hold(top.names["a"], ROOT, b"a")
    table.forget(12345, 1)
    log.close()
    assert (tmp_path / "nodes").stat().st_size == size


def test_what_is_not_of_the_log_is_stale(tmp_path):
    log, _, restorer = worker(tmp_path / "nodes", chain(1))
    assert now(restorer.slot(12345)) is None
    assert now(restorer.slot(ROOT)).ino == ROOT
    log.close()
    assert now(Restorer(NodeTable(chain(1)), None).slot(12345)) is None


def test_a_node_that_is_no_directory_any_more_is_stale(tmp_path):
    top = chain(2)
    log, table, _ = worker(tmp_path / "nodes", top)
    first = table.hold(top.names["a"], ROOT, b"a").ino
    second = table.hold(top.names["a"].names["a"], first, b"a").ino
    table.record()
    log.close()
    top.names["a"] = Node(top.names["a"].key, 0o100444)
    log, table, restorer = worker(tmp_path / "nodes", top)
    assert now(restorer.slot(second)) is None
    log.close()
