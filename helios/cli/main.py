"""The ``helios`` command: a table of commands, each imported only when it runs, so that every one starts fast."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import click

from helios.errors import HeliosError

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module:attribute, one line of help)
    "pull": ("helios.cli.models:pull", "Bring a model from the upstream Hub into the registry."),
    "push": ("helios.cli.models:push", "Publish a directory as org/name and print its commit."),
    "replicate": ("helios.cli.transfer:replicate", "Bring the repositories of another registry here."),
    "bundle": ("helios.cli.transfer:bundle", "Carry models to a registry that no network reaches, in a file."),
    "ls": ("helios.cli.models:ls", "List the models in the registry."),
    "show": ("helios.cli.models:show", "Show a model's revisions and files."),
    "ref": ("helios.cli.ref:ref", "List a model's refs, move them, and see who moved them."),
    "deprecate": ("helios.cli.deprecate:deprecate", "Warn of a model, or retire it."),
    "rm": ("helios.cli.models:rm", "Remove a model or one of its refs from the registry."),
    "where": ("helios.cli.where:where", "Show at which level models are, and have one brought here."),
    "usage": ("helios.cli.store:usage", "Show the bytes of each model: logical, unique and stored."),
    "quota": ("helios.cli.quota:quota", "Show how much of their quotas namespaces use."),
    "priority": ("helios.cli.quota:priority", "Say which models matter more, and which less."),
    "gc": ("helios.cli.store:gc", "Remove what nothing in the registry needs any more."),
    "store": ("helios.cli.store:store", "Verify and repair what the registry stores."),
    "domain": ("helios.cli.domain:domain", "List the domains that tenants' models are stored in, and remove one."),
    "mirror": ("helios.cli.mirror:mirror", "Show and approve the upstream refs that the registry follows."),
    "quarantine": ("helios.cli.quarantine:quarantine", "Show and release files that the registry keeps back."),
    "mount": ("helios.cli.mount:mount", "Mount the registry's models as files."),
    "umount": ("helios.cli.mount:umount", "Unmount."),
    "warm": ("helios.cli.control:warm", "Have a mount fetch a model's files now."),
    "pin": ("helios.cli.cache:pin", "Keep a model's files in a mount's cache."),
    "unpin": ("helios.cli.cache:unpin", "Let a pinned model's files go when room is needed."),
    "evict": ("helios.cli.cache:evict", "Remove a model's files from a mount's cache."),
    "verify": ("helios.cli.control:verify", "Hash what a mount's cache holds, and fetch what is wrong again."),
    "drain": ("helios.cli.control:drain", "Have a mount begin nothing new, before it is stopped."),
    "serve": ("helios.cli.serve:serve", "Serve a model with vLLM behind the router."),
    "worker": ("helios.cli.worker:worker", "Serve one mounted model with vLLM, in a pod."),
    "router": ("helios.cli.router:router", "Run the router in front of vLLM workers."),
    "registry": ("helios.cli.registry:registry", "Run the registry."),
    "csi": ("helios.cli.csi:csi", "Run the CSI driver."),
    "operator": ("helios.cli.operator:operator", "Run the Kubernetes operator."),
    "status": ("helios.cli.status:status", "Show what runs on this machine and what it holds."),
    "doctor": ("helios.cli.doctor:doctor", "Check this machine and say what to fix."),
    "quickstart": ("helios.cli.quickstart:quickstart", "Publish, mount, serve and ask a model, start to end."),
    "completion": ("helios.cli.completion:completion", "Print the shell completion script."),
}


class Commands(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="helios-llm", prog_name="helios")
def cli() -> None:
    """Helios: large language models as files, served without copying them."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exits 0 on success only, 1 on an error, 2 on wrong usage, 130 on Ctrl-C, 143 on SIGTERM."""
    try:
        result: Any = cli.main(argv, standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except HeliosError as error:
        if "--json" in (argv if argv is not None else sys.argv):
            document = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
            print(json.dumps(document), file=sys.stderr)
        else:
            print(f"helios: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(result if isinstance(result, int) else 0)
