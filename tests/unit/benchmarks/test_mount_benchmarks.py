"""The pure parts of the mount benchmarks: who reads what, percentiles, plots, the delayed line, the ratios kept."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import BENCHMARKS, cold_ratios, metadata_ratios
from benchmarks.cold_link import medians
from benchmarks.plots import bars
from benchmarks.readers import BLOCKS, parts, places, read, read_together
from benchmarks.scene import percentile
from benchmarks.shaped import Line


@given(st.integers(0, 1 << 36), st.integers(1, 64))
def test_the_readers_parts_cover_the_file_once(size: int, readers: int) -> None:
    found = parts(size, readers, 1 << 20)
    assert len(found) == readers
    assert sum(length for _, length in found) == size
    position = 0
    for offset, length in found:
        assert offset % (1 << 20) == 0
        assert not length or offset == position
        position += length


@given(st.integers(0, 1 << 20), st.integers(0, 300), st.integers(0, 400), st.integers())
def test_random_places_are_whole_blocks_of_the_part_and_none_comes_twice(
    offset: int, blocks: int, count: int, seed: int
) -> None:
    found = places(offset, blocks * 4096 + 5, 4096, count, seed)
    assert len(found) == len(set(found)) == min(count, blocks)
    assert all(offset <= at <= offset + (blocks - 1) * 4096 and (at - offset) % 4096 == 0 for at in found)


@pytest.mark.parametrize("way", sorted(BLOCKS))
def test_every_way_reads_what_it_says(way: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20) + b"end")
    fd = os.open(path, os.O_RDONLY)
    try:
        where = places(0, 3 << 20, BLOCKS[way], 2, 0)
        done = read(way, fd, 0, (3 << 20) + 3, where)
    finally:
        os.close(fd)
    assert done == (2 * BLOCKS[way] if way.startswith("rand") else (3 << 20) + 3)


def test_readers_in_processes_read_the_whole_file_together(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5 << 20))
    reading = read_together("seq", path, 5 << 20, 3)
    assert reading.bytes == 5 << 20
    assert reading.seconds > 0


def test_a_reader_that_fails_fails_the_measurement(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with pytest.raises(SystemExit, match="a reader of"):
        read_together("seq", path, 2 << 20, 1)


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([7.0], 0.01) == percentile([7.0], 0.99) == 7.0


def test_a_plot_is_xml_with_a_bar_for_every_value() -> None:
    plot = ElementTree.fromstring(bars("a < b", "GB/s", {"one & two": {"x": 2.0, "y": 1.0}, "three": {"x": 0.0}}))
    rects = [each for each in plot.iter("{http://www.w3.org/2000/svg}rect") if each.find("{*}title") is not None]
    assert [each.find("{*}title").text for each in rects] == [  # type: ignore[union-attr]
        "one & two, x: 2 GB/s",
        "one & two, y: 1 GB/s",
        "three, x: 0 GB/s",
    ]
    widths = [float(each.attrib["width"]) for each in rects]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1)


def test_a_plot_of_nothing_is_still_one() -> None:
    ElementTree.fromstring(bars("nothing", "s", {}))


def test_the_line_holds_packets_back_in_order_and_drops_what_is_too_much() -> None:
    line = Line(0.02, limit=2)
    assert line.wait_s(0.0) is None
    for now, packet in ((0.0, b"a"), (0.01, b"b"), (0.01, b"c")):
        line.take(now, packet)
    assert line.dropped == 1
    assert list(line.due(0.019)) == []
    assert line.wait_s(0.015) == pytest.approx(0.005)
    assert list(line.due(0.02)) == [b"a"]
    assert list(line.due(1.0)) == [b"b"]
    assert line.wait_s(1.0) is None


def test_the_ratios_of_cold_reads_tell_how_late_the_worse_byte_came() -> None:
    edges = {"bare_byte_s": 0.04, "first_s": 0.06, "last_s": 0.14}
    rows = [{"link": link, "ratio": 0.5, **edges} for link in ("2 Gbit/s", "4 Gbit/s", "unshaped")]
    result = {"median": medians([*rows, {"link": "store", "ratio": 0.7}])}
    assert result["median"]["2 Gbit/s"]["late_s"] == pytest.approx(0.1)
    ratios = cold_ratios(result)
    assert ratios["50_ms_to_late_byte"] == pytest.approx(0.5)
    assert ratios.keys() == BENCHMARKS["cold_link"].targets.keys()


def test_the_ratios_of_names_grow_when_the_mount_gets_faster() -> None:
    result = {
        "open_plain_p50_s": 1.0,
        "open_plain_p99_s": 2.0,
        "open_mount_p50_s": 4.0,
        "open_mount_p99_s": 4.0,
        "find_plain_s": 1.0,
        "find_s": 2.0,
        "median": {"ref_s": 0.2, "volume_s": 0.05},
        "memory_bytes": 125e6,
    }
    ratios = metadata_ratios(result)
    assert ratios.keys() == BENCHMARKS["metadata_ops"].targets.keys()
    assert (ratios["find"], ratios["memory"]) == (0.5, 2.0)
    assert ratios["400_us_to_open"] == pytest.approx(0.0004 / result["open_mount_p50_s"])
    assert (ratios["100_ms_to_ref"], ratios["100_ms_to_volume"]) == (0.5, 2.0)
