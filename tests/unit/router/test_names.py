"""What names stand for, in a process that relays: what was told last, asked about in the background, bounded."""

from __future__ import annotations

import msgspec

from helios.errors import NotFound, Retired, Unavailable
from router.discovery import names as module
from router.discovery.models import Name, Resolution
from router.discovery.names import Names, Standing, standing

NAME = Name.parse("org/name@champion")
COMMIT = "c" * 40


class Scene:
    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[str] = []
        self.names = Names(self.asked.append, lambda: self.now)

    def tell(self, answer: object, name: Name = NAME) -> None:
        sent = msgspec.msgpack.encode(standing(answer))  # type: ignore[arg-type]
        self.names.told(str(name), msgspec.msgpack.decode(sent, type=Standing))


def test_a_name_is_asked_about_once_a_second_and_answered_from_what_was_told():
    scene = Scene()
    assert scene.names.known(NAME) is None
    scene.tell(Resolution(NAME, COMMIT, "it is old", "org/new"))
    for _ in range(100):
        found = scene.names.known(NAME)
    assert (found.pinned, found.headers) == (f"org/name@{COMMIT}", [("x-helios-warning", "it is old Use org/new.")])
    assert scene.asked == ["org/name@champion"]
    scene.now = 1.0
    scene.names.known(NAME)
    assert len(scene.asked) == 2
    scene.tell(Resolution(NAME, "d" * 40))
    assert scene.names.known(NAME).commit == "d" * 40


def test_a_registry_that_is_away_takes_no_answer_back_and_a_no_does():
    scene = Scene()
    scene.names.known(NAME)
    scene.tell(Resolution(NAME, COMMIT))
    scene.tell(Unavailable("it is down"))
    scene.now = 3600.0
    assert scene.names.known(NAME).commit == COMMIT
    for error in (Retired("it is wrong"), NotFound("there is none")):
        scene.tell(error)
        assert (type(scene.names.known(NAME)), scene.names.known(NAME).message) == (type(error), error.message)
    scene.now += module.KEEP_S
    assert scene.names.known(NAME) is None, "a no is too old after a while"
    scene.tell(Unavailable("it is down"))
    assert isinstance(scene.names.known(NAME), Unavailable), "nothing else is known of it"


def test_names_that_clients_make_up_push_none_out_that_is_known(monkeypatch):
    monkeypatch.setattr(module, "MOST_OTHERS", 5)
    scene = Scene()
    scene.names.known(NAME)
    scene.tell(Resolution(NAME, COMMIT))
    for number in range(50):
        made_up = Name.parse(f"made/up{number}")
        scene.names.known(made_up)
        if number % 2:
            scene.tell(NotFound("no"), made_up)
    assert len(scene.names._others) == 5
    assert scene.names.known(NAME).commit == COMMIT
    scene.tell(Resolution(NAME, COMMIT), Name.parse("made/up0"))
    assert len(scene.names._known) == 1, "what nobody asks about is not kept"
