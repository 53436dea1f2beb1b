"""What one of several processes has learnt of an upstream is seen by the others as a whole."""

import contextlib

from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from registry.admission.admission import Admission
from registry.catalog import Catalog
from registry.mirror.asking import Asking, Caller
from registry.mirror.state import MirrorState
from registry.pull.listing import RemoteFile, Snapshot
from tests.support.postgres import open_database

REPO = RepoId.parse("org/m")
COMMIT = "1" * 40
SNAPSHOT = Snapshot(REPO, COMMIT, (RemoteFile("a", 3, "2" * 40, None),), "org", None, {}, False)


def test_what_another_process_has_learnt_meanwhile_is_believed_as_a_whole(tmp_path, engine_url):
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(DirectoryStore(tmp_path / "store"))
        states = []
        for _ in range(2):  # neither is told of what the other one writes
            database = open_database(tmp_path / "metadata.db", engine_url)
            stack.callback(database.close)
            states.append(MirrorState(Catalog(database, store)))
        here, there = states
        assert here.restricted(REPO) is None
        there.learn(SNAPSHOT, False, "main", COMMIT, None)
        asking = Asking(None, here, [], Admission([]), lambda snapshot, token: None)
        asking.learn(REPO, "main", Caller(None))  # asks nobody: the other one has
        assert here.restricted(REPO) is False
        assert here.ref(REPO, "main").commit == COMMIT
