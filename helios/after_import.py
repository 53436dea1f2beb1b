"""Do something as soon as another package's module has been imported, and nothing if it never is.

What changes a module of somebody else must have it imported first. Importing it for that alone would cost every
process its time (seconds, for parts of vLLM) and change the order of imports that the other package counts on. So a
finder (importlib's ``sys.meta_path``) waits for the module's name and lets the ordinary ones do the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call ``then`` with the module ``name`` once it has been executed; now, where it has been already.

    It runs within the import, in the thread that imports: what it raises is what the import raises.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        then(module)
        return
    waiting = next((finder for finder in _waiting() if finder.name == name), None)
    if waiting is None:
        waiting = _Waiting(name)
        sys.meta_path.insert(0, waiting)
    waiting.then.append(then)


class _Waiting(MetaPathFinder):
    """Finds one module by asking the finders beside it, until it has been imported."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.then: list[Callable[[ModuleType], None]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder.find_spec for finder in sys.meta_path if finder not in _waiting())
        spec = next((spec for find in others if (spec := find(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec


def _waiting() -> list[_Waiting]:
    return [finder for finder in sys.meta_path if isinstance(finder, _Waiting)]


class _Then(Loader):
    """The module's own loader, and what comes after it."""

    def __init__(self, loader: Loader, waiting: _Waiting) -> None:
        self._loader, self._waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # for all who look at it later
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._waiting in sys.meta_path:
            sys.meta_path.remove(self._waiting)
        for then in self._waiting.then:
            then(module)
