"""Labels of cached models: the node has those that the mount's models call for, and what is others' stays."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from csi.api_server import ApiServer
from csi.calls import Calls
from csi.node_labels import EVERY_S, LOOK_S, MOST, Held, NodeLabels, changes, ours, wanted
from helios.errors import HeliosError, InvalidInput, Unavailable
from helios.metrics import CsiMetrics
from helios.names import RepoId
from helios.node_labels import PREFIX, cached_key
from tests.fakes.kubernetes.patches import merge_patch
from tests.fakes.kubernetes_nodes import NodeServer

THEIRS = {"kubernetes.io/hostname": "n", "helios.dev/pool": "gpu"}
NAMES = [f"org/m{n}" for n in range(6)]


def commit(number):
    return f"{number:040x}"


def key(name, number=0):
    return cached_key(RepoId.parse(name), commit(number))


def held(name, weights="whole", number=0, idle_s=None):
    return {"repo": f"models/{name}", "commit": commit(number), "weights": weights, "idle_s": idle_s, "bytes": 1}


class Mount:
    """What a mount says; ``away``: nothing."""

    def __init__(self, *models):
        self.models, self.away = list(models), False

    def call(self, method, path, *, timeout_s):
        assert (method, path) == ("GET", "models")
        if self.away:
            raise Unavailable("no mount at /m")
        return {"models": self.models}


models = st.lists(
    st.builds(
        Held,
        repo=st.sampled_from([f"models/{name}" for name in NAMES]),
        commit=st.integers(0, 9).map(commit),
        weights=st.sampled_from(["whole", "part", "none"]),
        idle_s=st.none() | st.floats(0, 1e6),
    ),
    max_size=12,
    unique_by=lambda each: (each.repo, each.commit),
)
labels = st.dictionaries(
    st.sampled_from([key(name, n) for name in NAMES for n in range(3)] + ["a/b", "zone", "helios.dev/pool"]),
    st.sampled_from(["whole", "part", "x"]),
)


@given(labels, models, st.integers(0, 12))
def test_after_the_changes_the_node_has_what_is_here_and_what_is_others(present, found, most):
    after = wanted(found, most)
    patch = changes(present, after)
    node = merge_patch(present, patch)
    assert ours(node) == after
    others = {name: value for name, value in present.items() if not name.startswith(PREFIX)}
    assert {name: value for name, value in node.items() if not name.startswith(PREFIX)} == others
    assert not changes(node, after), "there is nothing left to change"
    assert len(after) == min(most, sum(each.weights != "none" for each in found))


@given(models, st.integers(1, 12))
def test_those_that_were_used_last_have_a_label(found, most):
    chosen = wanted(found, most)
    here = [each for each in found if each.weights != "none"]
    ages = [float("inf") if each.idle_s is None else each.idle_s for each in here]
    has = [cached_key(RepoId.from_canonical(each.repo), each.commit) in chosen for each in here]
    assert max([age for age, label in zip(ages, has, strict=True) if label], default=0) <= min(
        [age for age, label in zip(ages, has, strict=True) if not label], default=float("inf")
    )


def test_a_node_has_64_at_the_most():
    found = wanted([Held("models/org/name", commit(n), "whole", float(n)) for n in range(200)])
    assert list(found) == [key("org/name", n) for n in range(MOST)]


def test_a_repository_that_is_none_is_refused():
    with pytest.raises(InvalidInput):
        wanted([Held("org/..", commit(0), "whole")])


class Site:
    """A real client of a real server, and the labels of one node; ``now`` is their clock."""

    def __init__(self, tmp_path, node_labels=None):
        node = {"metadata": {"name": "n", "labels": dict(THEIRS if node_labels is None else node_labels)}, "spec": {}}
        self.server, self.mount, self.now, self.metrics = NodeServer(node, tmp_path), Mount(), 0.0, CsiMetrics()

    def __enter__(self):
        self.server.__enter__()
        self.restart()
        return self

    def __exit__(self, *how):
        self.nodes.close()
        self.server.__exit__(*how)
        assert self.server.complaints == []

    def restart(self):
        """A driver of its own."""
        if hasattr(self, "nodes"):
            self.nodes.close()
        self.nodes = ApiServer(self.server.account, self.server.environ, request_s=1.0)
        self.labels = NodeLabels(self.mount, self.nodes, Calls(), "n", self.metrics, clock=lambda: self.now)

    def step(self):
        asyncio.run(self.labels.step())

    def look(self, times, then=lambda pause: None):
        """``run`` for so many pauses; what they were."""
        pauses = []

        async def sleep(seconds):
            pauses.append(seconds)
            self.now += seconds
            then(len(pauses))
            await asyncio.sleep(0 if len(pauses) < times else 3600)

        async def main():
            task = asyncio.create_task(self.labels.run(sleep))
            while len(pauses) < times:
                await asyncio.sleep(0.002)
            task.cancel()

        asyncio.run(main())
        return pauses

    @property
    def ours(self):
        return {name: value for name, value in self.server.labels.items() if name.startswith(PREFIX)}


@pytest.fixture
def site(tmp_path):
    with Site(tmp_path) as found:
        yield found


def test_what_is_here_is_said_and_taken_back_and_others_labels_stay(site):
    site.mount.models = [held("org/a"), held("org/b", "part"), held("org/c", "none")]
    site.step()
    assert site.server.labels == {**THEIRS, key("org/a"): "whole", key("org/b"): "part"}
    site.mount.models = [held("org/b")]
    site.step()
    assert site.server.labels == {**THEIRS, key("org/b"): "whole"}
    site.mount.models = []
    site.step()
    assert site.server.labels == THEIRS


def test_nothing_is_written_where_nothing_changed(site):
    site.mount.models = [held("org/a", idle_s=1.0)]
    site.look(4)
    site.mount.models = [held("org/a", idle_s=40.0)]
    site.look(4)
    assert [each.split()[0] for each in site.server.requests] == ["GET", "PATCH"]
    assert "helios_csi_node_labels 1.0" in site.metrics.render().decode()


def test_what_a_driver_before_left_goes_at_the_start(tmp_path):
    with Site(tmp_path, {**THEIRS, key("org/gone"): "whole", key("org/a"): "part"}) as site:
        site.mount.models = [held("org/a")]
        site.step()
        assert site.server.labels == {**THEIRS, key("org/a"): "whole"}
        site.mount.models = []
        site.restart()
        site.step()
        assert site.server.labels == THEIRS


def test_nodes_without_any_label_get_them(tmp_path):
    with Site(tmp_path) as site:
        del site.server.node["metadata"]["labels"]
        site.mount.models = [held("org/a")]
        site.step()
        assert site.server.labels == {key("org/a"): "whole"}


def test_what_others_did_to_our_labels_is_mended_after_a_while(site):
    site.mount.models = [held("org/a")]
    site.step()
    site.server.node["metadata"]["labels"] = {**THEIRS, key("org/b"): "whole"}
    site.step()
    assert key("org/a") not in site.server.labels
    site.now += LOOK_S
    site.step()
    assert site.server.labels == {**THEIRS, key("org/a"): "whole"}


def test_a_mount_that_is_away_takes_no_label_away(site):
    site.mount.models = [held("org/a")]
    site.step()
    site.mount.away = True
    pauses = site.look(3)
    assert key("org/a") in site.server.labels
    assert EVERY_S < pauses[0] < pauses[2]
    site.mount.away = False
    site.mount.models = []
    site.step()
    assert site.server.labels == THEIRS


def test_an_api_server_that_fails_is_asked_again_with_growing_pauses(site):
    site.mount.models = [held("org/a")]
    site.server.refuse = [500, 409, 403, 429, 401, 503]
    pauses = site.look(8)
    assert site.server.labels == {**THEIRS, key("org/a"): "whole"}
    assert all(pause <= 480 * 1.2 for pause in pauses)
    assert pauses[4] > 4 * EVERY_S, "it isn't hammered"
    assert pauses[-1] <= EVERY_S * 1.2, "and asked as ever when it answers"
    assert "helios_csi_node_label_failures_total 6.0" in site.metrics.render().decode()


def test_a_silent_api_server_is_given_up_and_asked_again(site):
    site.mount.models = [held("org/a")]
    site.server.silent = True

    def then(pause):
        site.server.silent = False

    site.look(2, then)
    assert key("org/a") in site.server.labels


def test_a_change_whose_answer_was_lost_is_read_and_not_guessed(site):
    site.mount.models = [held("org/a")]
    site.server.torn = 2  # the client sends once more by itself on a connection that was in use
    with pytest.raises(HeliosError):
        site.step()
    site.mount.models = []
    site.step()
    assert site.server.labels == THEIRS


def test_an_answer_that_is_none_says_so(site):
    site.mount.models = [{"repo": 3}]
    with pytest.raises(Unavailable, match="not understood"):
        site.step()


class Machine(RuleBasedStateMachine):
    """Models come and go, drivers restart, others label, the API server fails: a step that succeeds makes it right."""

    tmp = None

    def __init__(self):
        super().__init__()
        self.site = Site(self.tmp).__enter__()
        self.others = dict(THEIRS)

    @rule(name=st.sampled_from(NAMES), weights=st.sampled_from(["whole", "part", "none"]))
    def comes(self, name, weights):
        self.goes(name)
        self.site.mount.models.append(held(name, weights))

    @rule(name=st.sampled_from(NAMES))
    def goes(self, name):
        self.site.mount.models = [each for each in self.site.mount.models if each["repo"] != f"models/{name}"]

    @rule()
    def restarts(self):
        self.site.restart()

    @rule(name=st.sampled_from(["zone", "a/b"]), value=st.sampled_from(["", "x", "whole"]))
    def others_label(self, name, value):
        self.others[name] = self.site.server.node["metadata"]["labels"][name] = value

    @rule(fault=st.sampled_from([0, 409, 500, 503, "torn"]), again=st.booleans())
    def looks(self, fault, again):
        server = self.site.server
        server.torn, server.refuse = int(fault == "torn"), [fault] if isinstance(fault, int) and fault else []
        try:
            self.site.step()
        except HeliosError:
            server.torn, server.refuse = 0, []
            if not again:
                return
            self.site.step()
        right = {
            cached_key(RepoId.from_canonical(each["repo"]), each["commit"]): each["weights"]
            for each in self.site.mount.models
            if each["weights"] != "none"
        }
        assert self.site.ours == right

    @invariant()
    def others_labels_are_theirs(self):
        assert {n: v for n, v in self.site.server.labels.items() if not n.startswith(PREFIX)} == self.others

    def teardown(self):
        self.site.__exit__(None, None, None)


def test_whatever_happens_a_step_that_succeeds_makes_it_right(tmp_path):
    from hypothesis.stateful import run_state_machine_as_test

    Machine.tmp = tmp_path
    run_state_machine_as_test(Machine, settings=settings(max_examples=10, stateful_step_count=15, deadline=None))
