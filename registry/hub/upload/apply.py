"""A commit's operations on the tree they start from, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from helios.errors import EntryNotFound, InvalidInput
from heliosfs.store.bulk import check_bulk
from heliosfs.store.manifest import FileEntry, check_tree


@dataclass(slots=True)
class Change:
    """The files of a commit in the making, in the order in which operations come.

    As on the Hub and in git, a file that is put where a directory was, or the other way round, is an error, not a
    silent removal; what is deleted must be there; the last operation on a path counts.
    """

    base: Mapping[str, FileEntry]
    files: dict[str, FileEntry] = field(init=False)

    def __post_init__(self) -> None:
        self.files = dict(self.base)

    def put(self, path: str, entry: FileEntry) -> None:
        """Add or replace a file; the executable bit of one that was there stays."""
        old = self.files.get(path)
        executable = old is not None and old.executable
        self.files[path] = FileEntry(entry.sha256, entry.size, entry.git_oid, entry.recipe, entry.lfs, executable)

    def delete_file(self, path: str) -> None:
        if path not in self.files:
            raise EntryNotFound(f"{path!r} can't be deleted: there is no such file")
        del self.files[path]

    def delete_folder(self, path: str) -> None:
        below = [each for each in self.files if each.startswith(f"{path}/")]
        if not below:
            raise EntryNotFound(f"{path!r} can't be deleted: there is no such directory")
        for each in below:
            del self.files[each]

    def copy(self, path: str, source: str, origin: Mapping[str, FileEntry] | None = None) -> None:
        """Put what ``source`` has in another snapshot; None: where this commit starts from."""
        entry = (self.base if origin is None else origin).get(source)
        if entry is None:
            raise EntryNotFound(f"{source!r} can't be copied: there is no such file")
        self.put(path, entry)

    def check(self) -> None:
        """Raise InvalidInput for a tree that can't be: paths that collide, too many files, none at all."""
        if not self.files:
            raise InvalidInput("nothing would be left: a commit has one file at least")
        check_bulk(self.files)
        check_tree(self.files)
