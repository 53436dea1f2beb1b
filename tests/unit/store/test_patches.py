"""What is known of objects of which no copy is right as a whole."""

from heliosfs.store.patches import Patches


def test_right_ranges_are_read_and_written_over_a_copy(tmp_path):
    patches, copy = Patches(), tmp_path / "copy"
    copy.write_bytes(b"abXdefgXi")
    assert not patches.apply("key", copy)
    patches.add("key", 2, b"c")
    patches.add("key", 7, b"h")
    assert patches.read("key", 2, 1) == b"c"
    assert patches.read("key", 2, 2) is None, "exactly what was seen to be right"
    assert patches.read("other", 2, 1) is None
    assert patches.apply("key", copy)
    assert copy.read_bytes() == b"abcdefghi"
    patches.forget("key")
    patches.forget("key")
    assert patches.read("key", 2, 1) is None


def test_they_are_bounded(tmp_path):
    patches = Patches(room=100)
    for number in range(10):
        patches.add(f"key {number}", 0, bytes(30))
        patches.add(f"key {number}", 0, bytes(30))
    assert [patches.read(f"key {number}", 0, 30) is not None for number in range(10)] == [False] * 7 + [True] * 3
