"""The table of who got which prompt: small, shared, and never wrong but by what it forgets."""

from __future__ import annotations

import os
import random
from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from router.scheduling import homes
from router.scheduling.homes import ENTRY, HOMES, WAYS, Homes, local

MARKS = st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.lists(st.tuples(st.one_of(MARKS, st.integers(0, 5)), st.integers(1, (1 << 32) - 1)), max_size=60))
def test_what_fits_is_remembered_the_last_worker_first(steps: list[tuple[int, int]]) -> None:
    table = local(1 << 16)  # 60 marks: five in one of 16,384 sets do not happen by chance
    model: dict[int, OrderedDict[int, None]] = {}
    for now, (mark, home) in enumerate(steps, 1):
        table.add(mark, home, now)
        known = model.setdefault(mark or 1, OrderedDict())
        known[home] = None
        known.move_to_end(home)
    for mark, known in model.items():
        assert table.of(mark) == list(reversed(known))[:HOMES]
    unknown = next(mark for mark in range(1, 1000) if mark not in model)
    assert table.of(unknown) == []


def test_of_marks_with_one_set_those_used_longest_ago_go() -> None:
    table = local(WAYS)  # a single set
    for mark in range(1, WAYS + 1):
        table.add(mark, mark, mark)
    table.add(1, 9, 100)  # used again
    table.add(77, 7, 101)
    assert table.of(77) == [7]
    assert table.of(1) == [9, 1]
    assert table.of(2) == []
    assert all(table.of(mark) == [mark] for mark in range(3, WAYS + 1))


def test_a_table_takes_no_more_than_its_size() -> None:
    memory = bytearray(homes.size(1024) + ENTRY)
    table = Homes(memory, 1024)
    for mark in range(100_000):
        table.add(mark * 0x9E3779B97F4A7C15 & ((1 << 63) - 1), 1 + mark % 5, 1 + mark)
    assert not any(memory[homes.size(1024) :])
    found = sum(bool(table.of(mark * 0x9E3779B97F4A7C15 & ((1 << 63) - 1))) for mark in range(99_000, 100_000))
    assert 500 < found <= 1000  # sets of four are not all equally full


def test_processes_write_at_once_and_none_reads_what_nobody_wrote() -> None:
    """Four processes write the same few entries; whatever is read is a worker that some of them named."""
    memory = homes.shared()
    pids = []
    for number in range(4):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                table, rng = Homes(memory, 64), random.Random(number)
                for step in range(20_000):
                    table.add(rng.randrange(1, 200), 1 + number, 1 + step)
                    if any(not 1 <= home <= 4 for home in table.of(rng.randrange(1, 200))):
                        break
                else:
                    status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert {home for mark in range(1, 200) for home in Homes(memory, 64).of(mark)} <= {1, 2, 3, 4}
    memory.close()
