"""What the registry allowed, and for how long that counts."""

from csi.rights import AWAY_S, FRESH_S, Remembered


def test_a_permission_counts_for_a_while_and_a_refusal_at_once():
    now = [0.0]
    remembered = Remembered(lambda: now[0])
    remembered.note("models/a", "team", True)
    assert remembered.allows("models/a", "team", FRESH_S)
    assert not remembered.allows("models/a", "other", FRESH_S)
    assert not remembered.allows("models/b", "team", FRESH_S)
    now[0] = FRESH_S
    assert not remembered.allows("models/a", "team", FRESH_S)
    assert remembered.allows("models/a", "team", AWAY_S)
    remembered.note("models/a", "team", False)
    assert not remembered.allows("models/a", "team", AWAY_S)


def test_only_so_many_permissions_are_remembered():
    remembered = Remembered(lambda: 0.0, most=3)
    for number in range(5):
        remembered.note(f"models/{number}", "team", True)
    remembered.note("models/2", "team", True)
    remembered.note("models/5", "team", True)
    found = [n for n in range(6) if remembered.allows(f"models/{n}", "team", 1.0)]
    assert found == [2, 4, 5]
