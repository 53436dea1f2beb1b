"""The command line is a contract: docs/cli.md against the program, exit codes, and what goes to which stream."""

import importlib
import json
import re
import socket
from pathlib import Path

import click
import pytest

from helios.cli.main import COMMANDS, cli

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def sections():
    """Command -> its section of the page."""
    found = {}
    for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        name = re.match(r"`helios (\w+)", part)[1]
        found[name] = re.split(r"^## ", part, flags=re.MULTILINE)[0]
    return found


def command(name):
    module, attribute = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(module), attribute)


def options_of(name):
    """A command's own options, and those of the commands below it."""
    found = command(name)
    below = found.commands.values() if isinstance(found, click.Group) else ()
    return [p for each in (found, *below) for p in each.params if isinstance(p, click.Option)]


def documented(section):
    """Every option in the first column of a section's table."""
    cells = re.findall(r"^\| (`-.*?) \| ", section, flags=re.MULTILINE)
    return {word for cell in cells for word in re.findall(r"`(--?[a-z-]+)", cell)}


def test_the_page_has_every_command_and_no_other():
    assert set(sections()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented_and_no_other(name):
    has = {word for option in options_of(name) for word in (*option.opts, *option.secondary_opts)}
    assert documented(sections()[name]) == has


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_and_variables_are_documented(name):
    section = sections()[name]
    for option in options_of(name):
        row = next((line for line in section.splitlines() if f"`{option.opts[-1]}" in line), "")
        for variable in [option.envvar] if isinstance(option.envvar, str) else option.envvar or []:
            assert variable in row
            assert f"`{variable}`" in PAGE.split("## Environment")[1].split("## `HELIOS_HOME`")[0]
        told = re.search(r"\(default: ([^)]+)\)", option.help or "")
        if told and told[1][0].isdigit():
            assert f"default: {told[1]}" in row


def test_every_exit_code_the_program_uses_is_in_the_table():
    table = PAGE.split("## Exit codes")[1].split("## Environment")[0]
    assert re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE) == ["0", "1", "2", "130", "143"]


def test_help_lists_every_command(helios):
    text = helios("--help").out
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line[:30])}", text, re.MULTILINE)
    assert helios("-h").out == text
    assert re.fullmatch(r"helios, version \d+\.\d+\.\d+\n", helios("--version").out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    with click.Context(cli) as context:
        text = command(name).get_help(context)
    assert len(text.splitlines()) > 5
    for option in options_of(name):
        assert option.help


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["push"],
        ["ls", "--no-such-option"],
        ["router", "--port", "70000"],
        ["completion", "tcsh"],
        ["csi", "--endpoint", "unix:///x"],
        ["serve", "a/b/c"],
        ["push", ".", "bad name"],
        ["quickstart", "--max-tokens", "0"],
    ],
)
def test_wrong_usage_exits_2_and_prints_no_result(helios, arguments):
    result = helios(*arguments, code=2)
    assert result.out == ""
    assert result.err


def test_an_unknown_setting_exits_2_and_suggests_one(helios):
    result = helios("doctor", code=2, env={"HELIOS_ROUTER__PROT": "1"})
    assert "did you mean 'port'" in result.err


def test_a_csi_endpoint_that_is_no_socket_is_wrong_usage(helios):
    for endpoint in ("tcp://127.0.0.1:1", "unix://relative", f"unix:///{'x' * 120}"):
        result = helios("csi", "--endpoint", endpoint, "--node-id", "n1", code=2)
        assert result.out == ""
        assert "unix:///PATH" in result.err


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef helios"), ("fish", "complete ")]
)
def test_completion_scripts(helios, shell, word):
    script = helios("completion", shell).out
    assert word in script
    assert "_HELIOS_COMPLETE" in script


def test_completion_completes(helios):
    env = {"_HELIOS_COMPLETE": "bash_complete", "COMP_WORDS": "helios qui", "COMP_CWORD": "1"}
    assert helios(env=env, code=None).out.split(",")[-1].strip() == "quickstart"


def test_a_busy_port_is_said_with_the_flag_before_anything_starts(helios, helios_home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = helios("quickstart", "--port", port, code=1)
    assert f"127.0.0.1:{port} can't be used" in result.err
    assert "--port" in result.err
    assert not helios_home.logs.exists()


def test_a_model_that_is_neither_a_directory_nor_a_name(helios, helios_home):
    assert "is not a directory" in helios("quickstart", "--port", "0", "--model", "./nowhere", code=1).err
    assert "MODEL is a directory or org/name" in helios("quickstart", "--port", "0", "--model", "a b", code=2).err


def test_status_starts_nothing(helios, helios_home):
    document = helios("status", "--json").json()
    assert document["registry"] == {"urls": [], "embedded": False, "pid": None, "reachable": False}
    assert document["mounts"] == document["processes"] == []
    assert not helios_home.root.exists()
    assert "embedded, not running" in helios("status").out


def test_status_of_a_registry_that_does_not_answer(helios):
    env = {"HELIOS_REGISTRY__URLS": "http://127.0.0.1:9"}
    document = json.loads(helios("status", "--json", env=env).out)
    assert document["registry"]["urls"] == ["http://127.0.0.1:9"]
    assert not document["registry"]["reachable"]
    assert document["store"]["stored"] is None
    assert "does not answer" in helios("status", env=env).out
