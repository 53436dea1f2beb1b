"""``helios push``, ``ls``, ``show``, ``rm`` as a person or a script runs them."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.registry import Running, running_registry
from tests.support.terminal import on_a_terminal

pytestmark = pytest.mark.both_databases

WEIGHTS = random.Random(11).randbytes(5_000_000)


@pytest.fixture
def registry(helios: Any) -> Iterator[Running]:
    """One on the test's home, which the commands find by themselves."""
    with running_registry(helios) as found:
        yield found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text('{"a": 1}')
    (directory / "sub" / "w.bin").write_bytes(WEIGHTS)
    return directory


def tensors(header: dict[str, Any] | bytes, size: int) -> bytes:
    """A safetensors file with this header and ``size`` bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def test_stdout_is_the_commit_and_nothing_else(registry: Running, helios: Any, model: Path) -> None:
    first = helios("push", model, "org/name")
    assert len(first.out) == 41
    assert first.out.endswith("\n")
    assert not set(first.out.strip()) - set("0123456789abcdef")
    assert first.err == ""
    assert helios("push", model, "org/name").out == first.out
    assert helios("push", model, "org/name@dev").out == first.out
    assert helios("push", model, "org/other").out != first.out


def test_json(registry: Running, helios: Any, model: Path) -> None:
    first = helios("push", model, "org/name@v1", "--json", "-m", "the first").json()
    assert first == {
        "commit": first["commit"],
        "repo": "org/name",
        "ref": "v1",
        "manifest": first["manifest"],
        "logical_bytes": len(WEIGHTS) + 8,
        "new_bytes": len(WEIGHTS) + 8,
        "deduplicated_bytes": 0,
        "sent_bytes": 0,
        "unchanged": False,
    }
    again = helios("push", model, "org/name@v1", "--json").json()
    assert (again["commit"], again["new_bytes"], again["unchanged"]) == (first["commit"], 0, True)
    shown = helios("show", "org/name@v1", "--json").json()
    assert (shown["message"], shown["commit"], shown["refs"]) == ("the first", first["commit"], {"v1": first["commit"]})
    assert [f["path"] for f in shown["files"]] == ["config.json", "sub/w.bin"]
    assert shown["usage"]["unique"] == len(WEIGHTS) + 8
    listed = helios("ls", "--json").json()
    assert [(r["repo"], r["refs"], r["bytes"]) for r in listed] == [
        ("org/name", {"v1": first["commit"]}, len(WEIGHTS) + 8)
    ]


def test_a_second_commit_knows_its_parent_and_shares_bytes(registry: Running, helios: Any, model: Path) -> None:
    first = helios("push", model, "org/name").out.strip()
    (model / "config.json").write_text('{"a": 2}')
    second = helios("push", model, "org/name", "--json").json()
    assert (second["new_bytes"], second["deduplicated_bytes"]) == (8, len(WEIGHTS))
    assert helios("show", "org/name", "--json").json()["parent"] == first
    assert helios("show", f"org/name@{first}", "--json").json()["commit"] == first


def test_tables_for_people(registry: Running, helios: Any, model: Path) -> None:
    assert helios("ls").out == ""
    commit = helios("push", model, "org/name").out.strip()
    listing = helios("ls").out.splitlines()
    assert listing[0].split() == ["NAME", "SIZE", "REFS", "UPDATED"]
    assert listing[1].split()[:4] == ["org/name", "5.0", "MB", "main"]
    shown = helios("show", "org/name").out
    assert commit in shown
    assert "sub/w.bin" in shown


def test_rm(registry: Running, helios: Any, model: Path) -> None:
    helios("push", model, "org/name")
    helios("push", model, "org/name@dev")
    assert "--yes" in helios("rm", "org/name", code=2).err
    helios("rm", "org/name@dev", "--yes")
    assert helios("show", "org/name", "--json").json()["refs"].keys() == {"main"}
    assert helios("rm", "org/name", "--yes", "--json").json()["removed"] is True
    assert "no repository" in helios("show", "org/name", code=1).err
    assert helios("ls", "--json").json() == []


def test_what_is_not_there(registry: Running, helios: Any, model: Path) -> None:
    helios("push", model, "org/name")
    assert "'org/none'" in helios("show", "org/none", code=1).err
    assert "its refs: main" in helios("show", "org/name@none", code=1).err
    problem = json.loads(helios("show", "org/none", "--json", code=1).err)["error"]
    assert problem["code"] == "RepoNotFound"


@pytest.mark.one_database
def test_wrong_usage_exits_2(registry: Running, helios: Any, model: Path) -> None:
    for args in (
        ("push", model),
        ("push", model / "missing", "org/name"),
        ("push", model / "config.json", "org/name"),
        ("push", model, "a/b/c"),
        ("push", model, "org/name@"),
        ("push", model, "org/.hidden"),
        ("push", model, "_/name"),
        ("push", model, "org/name@" + "a" * 40 + "b/../c"),
        ("ls", "--nonsense"),
    ):
        result = helios(*args, code=2)
        assert result.out == ""
        assert result.err
    assert helios("ls", "--json").json() == []


def test_the_tree_may_hold_links_inside_it_and_executables(registry: Running, helios: Any, model: Path) -> None:
    (model / "link.bin").symlink_to("sub/w.bin")
    (model / "again").symlink_to("sub", target_is_directory=True)
    (model / "tool").write_text("#!/bin/sh\n")
    (model / "tool").chmod(0o700)
    (model / ".git").mkdir()
    (model / ".git" / "HEAD").write_text("x")
    (model / ".cache" / "huggingface").mkdir(parents=True)
    (model / ".cache" / "huggingface" / "lock").touch()
    (model / "nothing").mkdir()
    helios("push", model, "org/name")
    files = {f["path"]: f for f in helios("show", "org/name", "--json").json()["files"]}
    assert set(files) == {"config.json", "sub/w.bin", "link.bin", "again/w.bin", "tool"}
    assert files["link.bin"]["sha256"] == files["sub/w.bin"]["sha256"]
    assert {path for path, f in files.items() if f["executable"]} == {"tool"}


def break_link(model: Path) -> None:
    (model / "out").symlink_to("/etc/passwd")


def break_parent_link(model: Path) -> None:
    (model / "sub" / "out").symlink_to("../../elsewhere")
    (model.parent / "elsewhere").write_text("x")


def break_directory_link(model: Path) -> None:
    (model / "out").symlink_to("/etc", target_is_directory=True)


def break_dangling(model: Path) -> None:
    (model / "out").symlink_to("missing")


def break_loop(model: Path) -> None:
    (model / "sub" / "out").symlink_to("..", target_is_directory=True)


def break_self(model: Path) -> None:
    (model / "out").symlink_to("out")


def break_backslash(model: Path) -> None:
    (model / "a\\out").touch()


def break_control(model: Path) -> None:
    (model / "out\n").touch()


def break_encoding(model: Path) -> None:
    Path(os.fsdecode(os.fsencode(model) + b"/out\xff")).touch()


def break_fifo(model: Path) -> None:
    os.mkfifo(model / "out")


def break_socket(model: Path) -> None:
    here = os.getcwd()
    os.chdir(model)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("out")
    finally:
        os.chdir(here)


def break_truncated(model: Path) -> None:
    (model / "out.safetensors").write_bytes(struct.pack("<Q", 1000) + b"{}")


def break_short(model: Path) -> None:
    (model / "out.safetensors").write_bytes(b"abc")


def break_overlap(model: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
    }
    (model / "out.safetensors").write_bytes(tensors(header, 6))


def break_json(model: Path) -> None:
    (model / "out.safetensors").write_bytes(tensors(b"{nonsense", 10))


def break_size(model: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}
    (model / "out.safetensors").write_bytes(tensors(header, 4))


@pytest.mark.one_database
def test_bad_directories_are_refused_naming_the_file(registry: Running, helios: Any, tmp_path: Path) -> None:
    breaks = {name: call for name, call in globals().items() if name.startswith("break_")}
    assert len(breaks) == 16
    for name, damage in breaks.items():
        directory = tmp_path / name / "model"
        (directory / "sub").mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        damage(directory)
        result = helios("push", directory, "org/name", code=None)
        assert (result.code, result.out) == (1, ""), name
        assert "out" in result.err.replace(str(directory), ""), name
        assert "Traceback" not in result.err, name
    assert helios("ls", "--json").json() == []


def test_an_empty_directory(registry: Running, helios: Any, tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    assert "no file to publish" in helios("push", tmp_path / "empty", "org/name", code=1).err


@pytest.mark.one_database
def test_a_file_that_changes_meanwhile(
    registry: Running, helios: Any, model: Path, wait_for: Callable[..., None]
) -> None:
    """A writer that never stops: whenever the registry looks, the file is another one."""
    target = model / "sub" / "w.bin"
    script = (
        "import os,sys,time\n"
        "with open(sys.argv[1],'r+b') as f:\n"
        "    while True:\n"
        "        os.pwrite(f.fileno(), os.urandom(64), 0); time.sleep(0.0005)\n"
    )
    before = target.read_bytes()[:64]
    with subprocess.Popen(["python3", "-c", script, str(target)]) as writer:
        try:
            wait_for(lambda: target.read_bytes()[:64] != before)
            result = helios("push", model, "org/name", code=1)
        finally:
            writer.kill()
    assert "sub/w.bin: changed while it was published" in result.err
    assert helios("ls", "--json").json() == []


@pytest.mark.one_database
def test_several_registries_the_first_that_answers(registry: Running, helios: Any, model: Path) -> None:
    dead = "http://127.0.0.1:9"
    commit = helios("push", model, "org/name", "--registry", dead, "--registry", registry.url).out
    assert commit.strip() == helios("show", "org/name", "--json").json()["commit"]
    result = helios("ls", "--registry", dead, code=1)
    assert "no registry answers" in result.err
    assert dead in result.err


@pytest.mark.one_database
def test_a_progress_bar_only_on_a_terminal(registry: Running, helios: Any, model: Path) -> None:
    done = on_a_terminal(helios, "push", model, "org/name")
    assert done.code == 0
    assert len(done.out) == 41
    assert "push org/name" in done.err
