import io
import re

import pytest

from helios.launch.progress import Progress
from helios.launch.quickstart import merged


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_lines_and_times(clock):
    out = io.StringIO()
    progress = Progress(out, clock)
    with progress.stage("vLLM") as stage:
        stage.doing("importing")
        clock.now = 8.0
        stage.doing("loading weights: shard 1 of 2")
        clock.now = 9.0
        stage.doing("loading weights: shard 2 of 2")
        clock.now = 10.5
        stage.done("ready")
    assert out.getvalue().splitlines() == [
        "vLLM: importing",
        "vLLM: loading weights: shard 1 of 2",
        "vLLM: loading weights: shard 2 of 2",
        "vLLM: ready (10.5 s)",
    ]
    assert stage.seconds == 10.5
    assert merged(stage.parts) == [("importing", 8.0), ("loading weights", 2.5)]


def test_figures_are_thinned_out_and_silence_is_broken(clock):
    out = io.StringIO()
    with Progress(out, clock).stage("Publish") as stage:
        stage.doing("reading")
        for second in range(12):
            clock.now = float(second)
            stage.figure(f"{second} MB")
        clock.now += 20
        stage.display.tick()
        stage.display.tick()
    assert out.getvalue().splitlines() == [
        "Publish: reading",
        "Publish: 5 MB",
        "Publish: 10 MB",
        "Publish: 11 MB (still, after 31 s)",
        "Publish: done (31.0 s)",
    ]


def test_an_error_ends_the_stage_and_goes_on(clock):
    out = io.StringIO()
    with pytest.raises(ValueError, match="boom"), Progress(out, clock).stage("Mount"):
        raise ValueError("boom")
    assert out.getvalue() == "Mount: stopped (0.0 s)\n"


def test_a_terminal_gets_marks(clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def text():
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", out.getvalue())

    out = Terminal()
    progress = Progress(out, clock)
    with progress.stage("Mount") as stage:
        stage.doing("mounting")
        stage.done("portable")
    assert "✓ Mount  portable" in text()
    with pytest.raises(RuntimeError), progress.stage("vLLM"):
        raise RuntimeError
    assert "✗ vLLM" in text()
