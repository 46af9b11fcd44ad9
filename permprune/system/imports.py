"""Importing a module as soon as another one has been imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(awaited: str, wanted: str) -> None:
    """Import `wanted` now if `awaited` has been imported, otherwise right after it is imported."""
    module = sys.modules.get(awaited)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        importlib.import_module(wanted)
    else:
        sys.meta_path.insert(0, _Watch(awaited, wanted))


class _Watch(MetaPathFinder):
    """A finder that imports the wanted module right after the awaited one was executed."""

    def __init__(self, awaited: str, wanted: str) -> None:
        self.awaited, self.wanted = awaited, wanted

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.wanted)
        return spec


class _Then(Loader):
    """Loads a module with its own loader, and then imports another module."""

    def __init__(self, loader: Loader, wanted: str) -> None:
        self.loader, self.wanted = loader, wanted

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.wanted)
