"""docs/semantics.md: every promise names tests, and the tests are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "docs/semantics.md").read_text().splitlines()
PROMISES = [line for line in LINES if line.startswith("- ")]


def test_everything_below_a_heading_is_a_promise():
    sections = LINES[LINES.index(next(line for line in LINES if line.startswith("## "))) :]
    assert [line for line in sections if line and not line.startswith(("- ", "## "))] == []
    assert len(PROMISES) > 50


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise[2:50])
def test_a_promise_names_tests_that_exist(promise):
    match = re.fullmatch(r"- .+\. \[(.+)\]", promise)
    assert match, "it ends with its tests in brackets"
    for reference in match[1].split(", "):
        file, _, name = reference.partition("::")
        defined = re.compile(rf"^(async )?def {name}\(|^{name} = ", re.M)
        found = [path for path in (ROOT / "tests").rglob(file) if defined.search(path.read_text())]
        assert len(found) == 1, f"{name} in {file}: {found}"
