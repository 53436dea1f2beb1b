"""Which bytes are asked for, and what may be read: every history gives each byte to one fetch at a time."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from registry.pull.blocks import BLOCK, LOOK, PIECE, Blocks
from registry.pull.width import FIRST, Width

MIB = 1 << 20


def drain(blocks: Blocks) -> list[tuple[int, int]]:
    """Fetch everything, one span after the other."""
    out = []
    while (span := blocks.next()) is not None:
        list(blocks.advance(span, span.stop))
        blocks.end(span)
        out.append((span.start, span.stop))
    return out


def test_a_file_is_asked_for_in_aligned_pieces_each_once():
    size = 20 * MIB + 5
    blocks = Blocks(size)
    assert drain(blocks) == [(0, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, size)]
    assert blocks.whole
    assert blocks.here == size


def test_what_an_earlier_attempt_brought_is_not_asked_for():
    blocks = Blocks(10 * MIB, here=[0, 1, 5, 9, 10, 99])
    assert blocks.here == 4 * MIB
    assert drain(blocks) == [(2 * MIB, 5 * MIB), (6 * MIB, PIECE), (PIECE, 9 * MIB)]


def test_a_reader_far_ahead_is_served_first_and_then_what_follows_it():
    blocks = Blocks(64 * MIB)
    blocks.want(1, 0)
    first = blocks.next()
    blocks.want(2, 41 * MIB + 7)
    second, third = blocks.next(), blocks.next()
    assert (first.start, second.start, second.stop, third.start) == (0, 41 * MIB, 48 * MIB, 48 * MIB)
    blocks.want(2, None)
    assert blocks.next().start == PIECE


def test_the_last_block_is_held_back_until_the_file_is_verified():
    blocks = Blocks(3 * MIB + 1)
    drain(blocks)
    assert blocks.ready(0) == 3 * MIB
    assert blocks.ready(3 * MIB) == 3 * MIB
    assert blocks.ready(0, held_back=False) == 3 * MIB + 1
    blocks.verified = True
    assert blocks.ready(MIB) == 3 * MIB + 1


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB])
def test_of_a_small_file_nothing_is_shown_before_it_is_verified(size):
    blocks = Blocks(size)
    drain(blocks)
    assert blocks.whole
    assert blocks.ready(0) == 0
    blocks.verified = True
    assert blocks.ready(0) == size


class History(RuleBasedStateMachine):
    """Beside a plain set of bytes' numbers, in units of a quarter of a block."""

    spans = Bundle("spans")
    UNIT = BLOCK // 4

    @initialize(units=st.integers(0, 150), odd=st.integers(0, 3), kept=st.sets(st.integers(0, 40), max_size=10))
    def start(self, units, odd, kept):
        self.size = units * self.UNIT + odd if units else odd
        self.blocks = Blocks(self.size, kept)
        self.lasting = {k for k in kept if k * BLOCK < self.size}
        self.open = []

    @rule(target=spans)
    def ask(self):
        span = self.blocks.next()
        if span is None:
            under_way = {n for s in self.open for n in range(s.start // BLOCK, -(-s.stop // BLOCK))}
            assert under_way | self.lasting >= set(range(self.blocks.count))
            return None
        assert span.start % BLOCK == 0
        assert span.start // PIECE == (span.stop - 1) // PIECE
        for other in self.open:
            assert span.stop <= other.start or span.start >= other.stop, "two fetches of one byte"
        for number in range(span.start // BLOCK, -(-span.stop // BLOCK)):
            assert number not in self.lasting, "what is here is not fetched again"
        self.open.append(span)
        return span

    @rule(span=spans, share=st.floats(0, 1))
    def come(self, span, share):
        if span is None or span not in self.open:
            return
        at = span.at + int((span.stop - span.at) * share)
        done = list(self.blocks.advance(span, at))
        assert not set(done) & self.lasting
        self.lasting |= set(done)

    @rule(span=consumes(spans))
    def finish(self, span):
        if span in self.open:
            self.open.remove(span)
            self.blocks.end(span)

    @rule(reader=st.integers(0, 3), offset=st.none() | st.integers(0, 40 * BLOCK))
    def move(self, reader, offset):
        self.blocks.want(reader, offset)

    @rule(offset=st.integers(0, 40 * BLOCK))
    def look(self, offset):
        offset = min(offset, self.size)
        end = self.blocks.ready(offset, held_back=False)
        assert offset <= end <= self.size
        here = set(self.lasting)
        at = offset
        while at < min(end, self.size):
            number = at // BLOCK
            if number in here:
                at = (number + 1) * BLOCK
            else:
                reached = [s.at for s in self.open if s.start <= number * BLOCK < s.stop]
                assert reached, "bytes that nobody has brought"
                assert reached[0] >= end
                break
        held = self.blocks.ready(offset)
        assert held <= max(offset, (self.blocks.count - 1) * BLOCK)
        if end < self.size and end - offset < (LOOK - 1) * BLOCK:
            assert end // BLOCK not in here, "all that is here is shown"

    @invariant()
    def counted(self):
        if hasattr(self, "blocks"):
            sizes = [min(BLOCK, self.size - number * BLOCK) for number in self.lasting]
            assert self.blocks.here == sum(sizes)
            assert self.blocks.whole == (len(self.lasting) == self.blocks.count)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_span_goes_forward_only_and_not_beyond_its_end():
    blocks = Blocks(4 * MIB)
    span = blocks.next()
    list(blocks.advance(span, 2 * MIB))
    for wrong in (MIB, 5 * MIB):
        with pytest.raises(ValueError, match="can't go on"):
            list(blocks.advance(span, wrong))


# --- how many at a time ----------------------------------------------------------------------------------------------


def run(rate_of, seconds=60):
    """Simulate: bytes come at ``rate_of(width)`` a second."""
    width, now, widths = Width(0.0), 0.0, []
    for _ in range(seconds * 10):
        now += 0.1
        width.arrived(int(rate_of(width.now_open) / 10), now)
        widths.append(width.now_open)
    return width, widths


def test_more_ranges_where_each_brings_the_same_and_no_more_where_the_link_is_full():
    many, _ = run(lambda width: 10e6 * width)
    full, _ = run(lambda width: 40e6 * (1 + random.Random(width).random() / 50))
    assert many.now_open > 2 * FIRST
    assert full.now_open <= FIRST + 2


def test_trouble_halves_it_and_it_climbs_again():
    width, _ = run(lambda width: 10e6 * width)
    before = width.now_open
    for _ in range(10):
        width.trouble(100.0)
    assert width.now_open == 1
    width.arrived(10**7, 102.0)
    assert 1 < width.now_open < before
