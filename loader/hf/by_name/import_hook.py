"""Calls a function right after a module is imported, without importing that module itself."""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, function: Callable[[], None]) -> None:
    """Call `function` once: now if module `name` is already imported, else when its import ends."""
    if name in sys.modules:
        # The module may be half imported by another thread: import_module waits for that.
        importlib.import_module(name)
        function()
    else:
        sys.meta_path.insert(0, _Finder(name, function))


class _Finder(MetaPathFinder):
    """A finder for one module. It asks the other finders and wraps their loader."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self._name = name
        self._function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._executed)
        return spec

    def _executed(self) -> None:
        # Removed here and not in find_spec, which is also called without a following import.
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._function()


class _Loader(Loader):
    """A wrapper of another loader that calls `executed` after the module's code has run."""

    def __init__(self, loader: Any, executed: Callable[[], None]) -> None:
        self._loader = loader
        self._executed = executed

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # inspect and other tools ask the module's loader for its source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._executed()
