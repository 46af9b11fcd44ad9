"""The size of the package: files, lines, rooms and what imports what, words of documentation, options of each command.

python benchmarks/house.py [FOLDER]    # the folder of a checkout, this one by default
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

OPTIONS = """
import typer
from permprune.cli import app
for name, command in sorted(typer.main.get_command(app).commands.items()):
    print(name, sum(parameter.param_type_name == "option" for parameter in command.params))
"""


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def arrows(package: Path) -> set[tuple[str, str]]:
    """The pairs of rooms (sub-packages, or modules beside them) of which the first imports from the second."""
    found = set()
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("permprune."):
                found.add((room, node.module.split(".")[1]))
    return {(one, other) for one, other in found if one != other and not one.startswith("__")}


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    package = root / "permprune"
    python, native = ([*package.rglob("*.py")], [*package.rglob("*.c"), *package.rglob("*.h")])
    rooms = {path.relative_to(package).parts[0] for path in python} - {"__init__.py", "__main__.py"}
    pages = [*(root / "docs").rglob("*.md")]
    largest = max(python, key=lambda path: lines([path]))
    words = sum(len(path.read_text(encoding="utf-8").split()) for path in pages)
    tests = [*(root / "tests").rglob("*.py")]
    options = subprocess.run(
        [sys.executable, "-c", OPTIONS],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"package: {len(python)} Python files, {lines(python)} lines; {len(native)} C files, {lines(native)} lines")
    print(f"together {lines(python) + lines(native)} lines; {len(rooms)} rooms, {len(arrows(package))} arrows")
    print(f"largest Python file: {largest.relative_to(root)}, {lines([largest])} lines")
    print(f"tests: {len(tests)} files, {lines(tests)} lines; docs: {len(pages)} pages, {words} words")
    print("options:", ", ".join(options.stdout.splitlines()))


if __name__ == "__main__":
    main()
