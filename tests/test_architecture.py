"""The layers of the package: which parts may import which, and where public names are exported."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import permprune

ROOT = Path(permprune.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def levels() -> dict[str, int]:
    """Each sub-package or module, and the level at which docs/architecture.md lists it, the lowest level last."""
    listed = re.search(r"## Who may import what.*?```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert listed
    lines = [line.partition("(")[0] for line in listed[1].splitlines()]
    return {part.strip(): level for level, line in enumerate(lines) for part in line.split(",")}


def imports(path: Path) -> Iterator[str]:
    """The sub-packages and modules of permprune that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "permprune":
            module = node.module.split(".")
            yield from [module[1]] if len(module) > 1 else [alias.name for alias in node.names]


def test_a_part_imports_only_from_parts_below_it() -> None:
    level = levels()
    upwards = []
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        for other in {*imports(path)} - {part}:
            if level[part] >= level[other] and (part, other) != ("report", "evaluation"):
                upwards.append(f"{path.relative_to(ROOT)} imports from {other}")
    assert not upwards


def test_every_part_is_on_the_page_and_exists() -> None:
    found = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__main__", "__pycache__", "py.typed"} == levels().keys()


def test_public_names_are_exported_by_the_package_alone() -> None:
    for path in ROOT.glob("*/__init__.py"):
        if path.parent.name != "cli":
            statements = ast.parse(path.read_text(encoding="utf-8")).body
            assert all(isinstance(statement, ast.Expr) for statement in statements), path


def test_no_name_hides_a_module() -> None:
    def packages(package: ModuleType) -> Iterator[ModuleType]:
        yield package
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if found.ispkg:
                yield from packages(importlib.import_module(found.name))

    for package in packages(permprune):
        for found in pkgutil.iter_modules(package.__path__):
            if found.name == "libpermprune":  # the native library, no module
                continue
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            assert getattr(package, found.name) is module
