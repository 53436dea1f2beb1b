import io
import json
import logging
import signal
import subprocess
import sys

import pytest

from helios.config import LogSettings
from helios.logs import JsonFormatter, TextFormatter, setup


def record(message="hello %s", args=("you",), **extra):
    made = logging.getLogger("helios.test").makeRecord(
        "helios.test", logging.WARNING, "f", 1, message, args, None, extra=extra
    )
    return made


def test_json_lines_carry_the_fields():
    line = json.loads(JsonFormatter().format(record(model="a/b", chunk=7)))
    assert (line["message"], line["level"], line["model"], line["chunk"]) == ("hello you", "warning", "a/b", 7)
    assert line["time"].endswith("Z")


def test_text_lines_carry_the_fields():
    line = TextFormatter().format(record(model="a/b"))
    assert "hello you" in line
    assert "model='a/b'" in line


def test_an_exception_is_kept():
    try:
        raise ValueError("boom")
    except ValueError:
        made = record()
        made.exc_info = sys.exc_info()
    assert "boom" in json.loads(JsonFormatter().format(made))["error"]
    assert "boom" in TextFormatter().format(made)


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield root
    root.handlers[:], level = before
    root.setLevel(level)


def test_a_pipe_gets_json_and_the_level_is_obeyed(root_logger):
    stream = io.StringIO()
    setup(LogSettings(level="warning"), stream)
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_a_crash_says_where_it_was() -> None:
    code = """
import os, signal
from helios import logs
from helios.config import LogSettings
logs.setup(LogSettings())
def culprit():
    os.kill(os.getpid(), signal.SIGSEGV)
culprit()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGSEGV
    assert "in culprit" in done.stderr
