"""Dependencies point down: which package imports which, read from the source of every module."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("helios", "heliosfs", "registry", "router", "csi", "orchestrator")
ALLOWED = {
    "helios": {"helios"},
    "heliosfs.store": {"helios", "heliosfs.store"},
    "heliosfs": {"helios", "heliosfs.store", "heliosfs"},
    "registry": {"helios", "heliosfs.store", "registry"},
    "router": {"helios", "router"},
    "csi": {"helios", "csi"},
    "orchestrator": {"helios", "orchestrator"},
}
PUT_TOGETHER = ("helios.cli", "helios.launch")
"""These may import any package, but only inside functions, so that each command starts fast."""


def layer(module: str) -> str:
    return "heliosfs.store" if (module + ".").startswith("heliosfs.store.") else module.split(".")[0]


def imports(tree: ast.AST, here: str, *, in_function: bool = False):
    """(module, whether inside a function, whether only for types) of every import of ours."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = here.split(".")[: -node.level]
                base = ".".join([*parts, base] if base else parts)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, here, in_function=inside)
            continue
        yield from ((name, in_function) for name in names if name.split(".")[0] in OURS)


def modules():
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def violations(here: str, source: str):
    free = any((here + ".").startswith(name + ".") for name in PUT_TOGETHER)
    for name, in_function in imports(ast.parse(source), here):
        if layer(name) not in ALLOWED[layer(here)] and not (free and in_function):
            yield f"{here} imports {name}"


def test_arrows_point_down():
    found = list(modules())
    assert len(found) > 30
    assert [line for here, path in found for line in violations(here, path.read_text())] == []


@pytest.mark.parametrize(
    ("here", "source", "wrong"),
    [
        ("heliosfs.daemon", "import router.app", True),
        ("heliosfs.daemon", "def f():\n    from registry import app", True),
        ("heliosfs.store.pack", "from heliosfs import daemon", True),
        ("heliosfs.daemon", "from .store import pack", False),
        ("registry.app", "from heliosfs.store.pack import x", False),
        ("registry.app", "from heliosfs import daemon", True),
        ("helios.config", "def f():\n    import registry.app", True),
        ("helios.cli.registry", "def f():\n    import registry.app", False),
        ("helios.cli.registry", "import registry.app", True),
        ("router.app", "import helios.config, trio", False),
    ],
)
def test_the_check_sees_violations(here, source, wrong):
    assert bool(list(violations(here, source))) == wrong
