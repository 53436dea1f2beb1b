"""Operations on a tree, against a plain dictionary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import EntryNotFound, InvalidInput
from heliosfs.store.manifest import FileEntry
from registry.hub.upload.apply import Change


def entry(number: int, executable: bool = False) -> FileEntry:
    return FileEntry(f"{number:064x}", number, f"{number:040x}", f"{number:064x}", False, executable)


PATHS = ["a", "b", "d/x", "d/y", "d/e/z", "de"]
OPERATION = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(PATHS), st.integers(0, 9)),
    st.tuples(st.just("delete"), st.sampled_from(PATHS), st.none()),
    st.tuples(st.just("folder"), st.sampled_from(["d", "d/e", "a"]), st.none()),
    st.tuples(st.just("copy"), st.sampled_from(PATHS), st.sampled_from(PATHS)),
)


@given(st.dictionaries(st.sampled_from(PATHS), st.integers(0, 9)), st.lists(OPERATION, max_size=12))
def test_it_does_what_a_dictionary_does(base, operations):
    change = Change({path: entry(n) for path, n in base.items()})
    model = dict(base)
    for kind, path, value in operations:
        missing = False
        match kind:
            case "put":
                change.put(path, entry(value))
                model[path] = value
            case "delete":
                missing = path not in model
                call = lambda path=path: change.delete_file(path)  # noqa: E731
                model.pop(path, None)
            case "folder":
                missing = not [p for p in model if p.startswith(path + "/")]
                call = lambda path=path: change.delete_folder(path)  # noqa: E731
                model = {p: n for p, n in model.items() if not p.startswith(path + "/")}
            case "copy":
                missing = value not in base
                call = lambda path=path, value=value: change.copy(path, value)  # noqa: E731
                model |= {path: base[value]} if not missing else {}
        if missing:
            with pytest.raises(EntryNotFound):
                call()
        elif kind != "put":
            call()
    assert {path: each.size for path, each in change.files.items()} == model
    if model:
        change.check()
    else:
        with pytest.raises(InvalidInput, match="nothing would be left"):
            change.check()


def test_a_file_keeps_its_executable_bit_and_a_copy_has_none():
    change = Change({"run.sh": entry(1, executable=True)})
    change.copy("copy.sh", "run.sh")
    change.put("run.sh", entry(2))
    assert (change.files["run.sh"].executable, change.files["copy.sh"].executable) == (True, False)


def test_a_path_is_not_both_a_file_and_a_directory():
    change = Change({"a": entry(1)})
    change.put("a/b", entry(2))
    with pytest.raises(InvalidInput, match="both a file and a directory"):
        change.check()
    change.delete_file("a")
    change.check()


def test_a_copy_from_another_revision():
    change = Change({"a": entry(1)})
    change.copy("b", "x", {"x": entry(7)})
    assert change.files["b"].size == 7
