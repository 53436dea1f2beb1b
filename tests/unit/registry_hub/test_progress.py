"""The state behind a pull's event stream."""

from hypothesis import given
from hypothesis import strategies as st

from registry.pull.progress import MAX_LOGS, Progress


def apply(view: dict, events: list) -> dict:
    for event in events:
        match event["event"]:
            case "file":
                view.setdefault("files", {})[event["path"]] = [0, event["size"]]
            case "progress":
                assert event["path"] in view["files"], "a file is announced before its figures"
                assert event["total"] == view["files"][event["path"]][1]
                view["files"][event["path"]][0] = event["done"]
            case "log":
                view.setdefault("logs", []).append(event["message"])
    return view


STEP = st.one_of(
    st.tuples(st.just("file"), st.sampled_from("abc"), st.integers(0, 9)),
    st.tuples(st.just("done"), st.sampled_from("abc"), st.integers(0, 9)),
    st.tuples(st.just("log"), st.text(max_size=2), st.just(0)),
    st.tuples(st.just("look"), st.just(""), st.just(0)),
)


@given(st.lists(STEP, max_size=60))
def test_whenever_readers_look_they_end_up_with_the_same_state(steps):
    progress, early, seen = Progress(), {}, 0
    files = set()
    for kind, name, number in steps:
        if kind == "file" and name not in files:
            files.add(name)
            progress.file(name, number)
        elif kind == "done" and name in files:
            progress.done(name, number)
        elif kind == "log":
            progress.log(name)
        elif kind == "look":
            events, seen = progress.since(seen)
            apply(early, events)
    events, seen = progress.since(seen)
    apply(early, events)
    late = apply({}, progress.since(0)[0])
    assert early == late
    assert progress.since(seen) == ([], seen)
    mirrored = Progress()
    mirrored.mirror(progress)
    assert apply({}, mirrored.since(0)[0]) == late


def test_a_thousand_blocks_are_one_event():
    progress = Progress()
    progress.file("a", 1000)
    for done in range(1001):
        progress.done("a", done)
    events, _ = progress.since(0)
    assert events == [
        {"event": "file", "path": "a", "size": 1000},
        {"event": "progress", "path": "a", "done": 1000, "total": 1000},
    ]
    assert progress.unfinished() is None


def test_logs_are_bounded():
    progress = Progress()
    for number in range(2 * MAX_LOGS):
        progress.log(str(number))
    events, _ = progress.since(0)
    assert [e["message"] for e in events] == [str(n) for n in range(MAX_LOGS, 2 * MAX_LOGS)]


def test_listeners_hear_until_they_stop():
    progress, heard = Progress(), []
    stop = progress.listen(lambda: heard.append(1))
    progress.log("x")
    progress.changed()
    stop()
    progress.log("y")
    assert len(heard) == 2


def test_a_mirror_follows_until_it_stops():
    leader, follower = Progress(), Progress()
    leader.file("a", 5)
    stop = follower.mirror(leader)
    leader.done("a", 3)
    leader.log("hello")
    stop()
    leader.done("a", 5)
    assert apply({}, follower.since(0)[0]) == {"files": {"a": [3, 5]}, "logs": ["hello"]}
