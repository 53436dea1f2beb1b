"""How much a snapshot may hold: what is refused where it is made is what could not be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import InvalidInput
from heliosfs.store.bulk import MAX_DIRECTORY_BYTES, MAX_MANIFEST, check_bulk, directory_bytes, manifest_bytes
from heliosfs.store.manifest import Manifest
from tests.unit.store.test_manifest import trees


@given(trees)
def test_no_manifest_is_longer_than_foreseen(files: dict[str, object]) -> None:
    assert len(Manifest(files).encode()) <= manifest_bytes(files)  # type: ignore[arg-type]


@given(st.lists(st.text(max_size=20)))
def test_any_paths_are_counted(paths: list[str]) -> None:
    check_bulk(paths)


def test_a_hundred_thousand_files_are_taken_and_a_million_are_not() -> None:
    check_bulk([f"train/part-{number:06d}.parquet" for number in range(100_000)])
    with pytest.raises(InvalidInput, match=r"1,000,000 files need a manifest of up to \S+ bytes; 33,554,432") as caught:
        check_bulk([f"{number}" for number in range(1_000_000)])
    assert "split it" in (caught.value.hint or "")


def test_long_paths_count() -> None:
    with pytest.raises(InvalidInput, match="9,000 files need a manifest"):
        check_bulk([f"{number:06d}" + "/d" * 2000 for number in range(9_000)])
    assert manifest_bytes(["x"]) < MAX_MANIFEST


def test_very_many_directories_are_refused() -> None:
    paths = [f"{number}/" + "d/" * 500 + "file" for number in range(200)]
    assert directory_bytes(paths) > MAX_DIRECTORY_BYTES
    with pytest.raises(InvalidInput, match="too many directories"):
        check_bulk(paths)
