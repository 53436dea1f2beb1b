"""How much of a commit is here: which weights belong together, and what counts as whole."""

from __future__ import annotations

import hashlib

import pytest
import trio

from helios.names import RepoId
from heliosfs.control.models import MAX_FILES, MAX_SEEN, Files, Seen, files_of, model_of
from heliosfs.store.manifest import FileEntry
from heliosfs.tiers.history import Use
from heliosfs.tree.shards import sets
from heliosfs.tree.snapshot import Snapshot

REPO, COMMIT = RepoId.parse("o/m"), "d" * 40


def digest(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()


def snapshot(*paths: str, size: int = 10) -> Snapshot:
    return Snapshot(REPO, COMMIT, 0, {p: FileEntry(digest(p), size, "b" * 40, "c" * 64) for p in paths})


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def weights(paths: list[str], local: list[str]) -> str:
    here = frozenset(map(digest, local))
    return model_of((REPO, COMMIT), files_of(snapshot(*paths)), here, {}, 0.0).weights


@pytest.mark.parametrize(
    ("others", "local", "found"),
    [
        (["config.json"], SHARDS, "whole"),
        (["config.json"], SHARDS[:1], "none"),
        (["config.json"], ["config.json"], "none"),
        (["original/consolidated.00.pth", "config.json"], SHARDS, "part"),
        (["original/consolidated.00.pth", "config.json"], ["original/consolidated.00.pth"], "part"),
        (["pytorch_model.bin"], [*SHARDS, "pytorch_model.bin"], "whole"),
        (["pytorch_model.bin"], [], "none"),
    ],
)
def test_weights_are_here_when_what_a_loader_takes_is(others: list[str], local: list[str], found: str) -> None:
    assert weights([*SHARDS, *others], local) == found


def test_one_quantisation_of_several_is_a_part() -> None:
    assert weights(["m-Q4.gguf", "m-Q8.gguf", "README.md"], ["m-Q4.gguf"]) == "part"


def test_what_has_no_weights_is_whole_with_all_its_files() -> None:
    assert weights(["a.json", "b.txt"], ["a.json", "b.txt"]) == "whole"
    assert weights(["a.json", "b.txt"], ["a.json"]) == "none"
    assert weights([], []) == "none"


def test_every_weight_file_is_in_one_set() -> None:
    paths = [*SHARDS, "mtp.safetensors", "config.json", "unet/a.safetensors", "unet/config.json", "x.gguf"]
    found = sets(snapshot(*paths))
    assert sorted(path for each in found for path in each) == sorted(p for p in paths if not p.endswith(".json"))
    assert SHARDS in found


def test_sizes_and_the_last_use_are_those_of_its_files() -> None:
    files = files_of(snapshot("a.json", "b.safetensors", size=7))
    last = {"a.json": 90.0, "b.safetensors": 96.75, "other": 99.0}
    opened = {digest(path): Use(0.0, 1, at, at) for path, at in last.items()}
    here = frozenset(map(digest, ["a.json", "b.safetensors", "other"]))
    model = model_of((REPO, COMMIT), files, here, opened, 100.0)
    assert (model.files, model.local_files, model.bytes, model.local, model.idle_s) == (2, 2, 14, 14, 3.25)
    assert model_of((REPO, COMMIT), files, frozenset([digest("a.json")]), {}, 100.0).idle_s is None


class Commits:
    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes, self.asked = sizes, 0

    def commits(self, most: int) -> list[tuple[RepoId, str]]:
        return [(REPO, commit) for commit in self.sizes][:most]

    async def told(self, repo, commit, summary):  # type: ignore[no-untyped-def]
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if commit == "unknown":
            return None
        return summary(snapshot(*(f"{commit}/{n}" for n in range(self.sizes[commit]))))


def test_commits_are_looked_up_once_and_forgotten_when_they_go() -> None:
    async def main() -> None:
        commits = Commits({"a": 2, "b": 3, "unknown": 1})
        seen = Seen(commits)
        assert {key[1]: len(files.sizes) for key, files in (await seen.files()).items()} == {"a": 2, "b": 3}
        await seen.files()
        assert commits.asked == 4, "the unknown one is asked for again"
        del commits.sizes["a"]
        assert [key[1] for key in await seen.files()] == ["b"]
        commits.sizes = {str(n): 1 for n in range(MAX_SEEN + 5)}
        assert len(await seen.files()) == MAX_SEEN

    trio.run(main)


def test_a_commit_of_more_files_than_there_is_room_for_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliosfs.control.models.MAX_FILES", 5)
    assert MAX_FILES > 5

    async def main() -> None:
        found = await Seen(Commits({"a": 3, "b": 3, "c": 2})).files()
        assert [found[REPO, name] == Files({}) for name in "abc"] == [False, True, False]

    trio.run(main)
