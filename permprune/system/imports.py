"""Imports that are postponed until a name is used or a class called, and imports right after another module's."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


@contextmanager
def on_first_use(names: dict[str, Any]) -> Iterator[None]:
    """A context whose import statements run when one of the imported names is first used.

    `names` are the globals of the module that imports. Options can so be checked without torch, whose import takes
    seconds, by the classes that use it. Names that are used while a module is imported, such as base classes and
    decorators, have to be imported outside. (PEP 810 gives the statement `lazy import` to Python 3.15.)
    """
    import_now = builtins.__import__

    def postpone(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if globals is not names:  # another thread's
            return import_now(name, globals, locals, fromlist or (), level)
        if not fromlist:
            return _Postponed(name, "", names)
        return SimpleNamespace(**{attribute: _Postponed(name, attribute, names) for attribute in fromlist})

    builtins.__import__ = postpone
    try:
        yield
    finally:
        builtins.__import__ = import_now


class _Postponed:
    """What a postponed import gives its name until the name is used; then all names of the module get their values."""

    def __init__(self, module: str, name: str, names: dict[str, Any]) -> None:
        self._source, self._names = (module, name), names

    def _value(self) -> Any:
        for name, held in [*self._names.items()]:
            if isinstance(held, _Postponed) and held._names is self._names:
                self._names[name] = held._import()
        return self._import()

    def _import(self) -> Any:
        module, name = self._source
        imported = __import__(module, fromlist=[name] if name else ())
        value = getattr(imported, name) if name else imported
        if isinstance(value, str | int | float | tuple | dict):
            raise TypeError(f"{module}.{name} is a value, which nothing shows the use of: import it at once")
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value(), name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._value()(*arguments, **keywords)

    def __getitem__(self, key: Any) -> Any:
        return self._value()[key]

    def __ror__(self, other: Any) -> Any:
        return other | self._value()

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._value())


@contextmanager
def called_later(module: str, name: str) -> Iterator[None]:
    """A context in which other modules may import a class that they rarely call: its module is imported by a call.

    What they get is a class, so that annotations may name it, but no instance is one of it.
    """

    def call(_: type, *arguments: Any, **keywords: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **keywords)

    if module in sys.modules:
        yield
        return
    sys.modules[module] = ModuleType(module)
    setattr(sys.modules[module], name, type(name, (), {"__new__": call}))
    try:
        yield
    finally:
        del sys.modules[module]


def after_import(awaited: str, wanted: str) -> None:
    """Import `wanted` now if `awaited` has been imported, otherwise right after it is imported."""
    module = sys.modules.get(awaited)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        importlib.import_module(wanted)
    else:
        sys.meta_path.insert(0, _Watch(awaited, wanted))


class _Watch:
    """A finder that imports the wanted module right after the awaited one was executed."""

    def __init__(self, awaited: str, wanted: str) -> None:
        self.awaited, self.wanted = awaited, wanted

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(self.wanted)

            spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec
