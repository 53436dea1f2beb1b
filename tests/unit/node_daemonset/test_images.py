"""The Dockerfiles: one target for each image of the chart, of sources that there are, without root where possible.

They are not built here. What they run is looked at in pieces: extras, constraints, commands, paths.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from dataclasses import dataclass, field

import pytest

from tests.support.chart import DAEMONSET, ROOT, Chart
from tests.support.manifests import command_line
from tests.unit.node_daemonset.conftest import VALUES

IMAGES = DAEMONSET / "images"
DOCKERFILES = ("Dockerfile", "vllm.Dockerfile")
ROOT_USERS = {"keeper", "worker"}
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "RUN", "SHELL", "USER", "WORKDIR"}


@dataclass
class Stage:
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str | None:
        return next((text for name, text in reversed(self.steps) if name == instruction), None)


def stages(name: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """Arguments with their defaults, and the stages by name."""
    text = re.sub(r"^\s*#.*\n", "", (IMAGES / name).read_text(), flags=re.MULTILINE)
    text = re.sub(r"\\\n", " ", text)
    arguments: dict[str, str] = {}
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, (line.strip() for line in text.splitlines())):
        instruction, _, rest = line.partition(" ")
        assert instruction in KNOWN, line
        if instruction == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", rest)
            assert match, f"a stage without a name: {line}"
            current = found[match[2]] = Stage(match[1])
        elif current is None:
            key, _, value = rest.partition("=")
            arguments[key] = value
        else:
            current.steps.append((instruction, rest))
    return arguments, found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_bases_are_pinned_and_stages_stand_on_earlier_ones(name: str):
    arguments, found = stages(name)
    seen: set[str] = set()
    for stage, its in found.items():
        base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], its.base)
        if base not in seen:
            tag = base.rpartition("/")[2].partition(":")[2]
            assert re.search(r"\d+\.\d+\.\d+", tag), f"{base} is pinned to no version"
        seen.add(stage)
        for instruction, text in its.steps:
            for other in re.findall(r"(?:--from=|from=)([\w-]+)", text):
                assert other in seen, (stage, instruction, other)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_in_the_repository_and_all_of_what_the_wheel_needs(name: str):
    _, found = stages(name)
    copied = []
    for _, text in (step for stage in found.values() for step in stage.steps if step[0] == "COPY"):
        if "--from=" not in text:
            *sources, _ = [word for word in text.split() if not word.startswith("--")]
            copied += sources
    for source in copied:
        assert (ROOT / source).exists(), source
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], wheel["hooks"]["custom"]["path"], "pyproject.toml", "README.md", "LICENSE"}
    assert needed <= set(copied)


def test_every_image_of_the_chart_is_a_target_that_says_who_runs_it(chart: Chart):
    used = set()
    for text in chart.files(VALUES["everything"]).values():
        used |= set(re.findall(r"image: registry\.example/helios/([\w-]+):", text))
    _, found = stages("Dockerfile")
    assert used == {"keeper", "worker", "csi", "registry", "router", "operator"} <= set(found)
    for image in used:
        user = found[image].last("USER")
        assert user == ("0:0" if image in ROOT_USERS else "10001:10001"), image
    assert stages("vllm.Dockerfile")[1]["vllm"].last("USER") == "10001:10001"


def test_environments_are_made_of_extras_that_there_are_in_versions_that_were_tried():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    _, found = stages("Dockerfile")
    made = {}
    for stage in found.values():
        for _, text in stage.steps:
            if match := re.fullmatch(r"environment (\S+) ?(\S*)", text):
                made[match[1]] = [extra for extra in match[2].split(",") if extra]
    assert set(made) == {"keeper", "worker", "csi", "registry", "router", "operator"}
    for image, names in made.items():
        assert set(names) <= set(extras), image
        assert ("COPY", f"--from={image}-environment /made/{image}/ /") in found[image].steps
    assert made["keeper"] == []
    script = (IMAGES / "environment.sh").read_text()
    assert "--constraint requirements/lock.txt" in script
    assert "--no-deps" in script


def test_the_keepers_image_has_all_that_the_keeper_imports():
    """It has Helios and the standard library."""
    for path in [*(ROOT / "heliosfs" / "keeper").glob("*.py"), ROOT / "heliosfs" / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.startswith("heliosfs.keeper") or name.split(".")[0] in sys.stdlib_module_names, (path, name)


def test_builds_are_repeatable_and_leave_a_bill_of_materials():
    script = (IMAGES / "environment.sh").read_text()
    assert "SOURCE_DATE_EPOCH" in script
    assert "--output-reproducible" in script
    assert "unchecked-hash" in script, "compiled files with times in them differ from build to build"
    for name in DOCKERFILES:
        text = (IMAGES / name).read_text()
        assert "ARG SOURCE_DATE_EPOCH" in text
        assert "cyclonedx-bom==" in text
        assert not re.search(r"^(ADD|MAINTAINER)\b|\bdate\b.*\+|LABEL .*(created|build-date)", text, re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_runs_by_itself_is_a_command(name: str):
    for stage in stages(name)[1].values():
        words = stage.last("CMD")
        if words is None:
            continue
        command = [word for word in ast.literal_eval(words) if word != "--help"]
        if command[-1].startswith("heliosfs"):
            assert (ROOT / command[-1].replace(".", "/") / "__main__.py").exists()
        elif command != ["helios", "worker"] and command != ["helios", "csi"]:  # which need more than their name
            assert command_line({"command": command})[0] == command[1]


def test_vllm_is_the_version_that_the_tests_run():
    setup = (ROOT / "scripts" / "setup.py").read_text()
    version = re.search(r'^VLLM = "(.*)"', setup, re.MULTILINE)
    assert version
    assert stages("vllm.Dockerfile")[0]["VLLM"] == f"vllm/vllm-openai:v{version[1]}"
