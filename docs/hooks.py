"""Hooks of mkdocs: pages from files in the root of the repository, from notebooks, and from the command line."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from permprune.cli import app

ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_config(config: MkDocsConfig) -> None:
    """Show the version in the header."""
    config.site_name = f"{config.site_name} {importlib.metadata.version('permprune')}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not Markdown files in docs/."""
    root = Path(config.config_file_path).parent
    for name in ROOT_PAGES:
        text = (root / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(file.content_string)
        files.remove(file)
        files.append(File.generated(config, f"{file.src_uri.removesuffix('.ipynb')}.md", content=markdown(notebook)))
        files.append(file)
    files.append(File.generated(config, "api/commands.md", content=command_page()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Keep figures, their errors and their units on one line in the cells of tables."""
    return re.sub(r"<td[^>]*>[^<]*", lambda cell: re.sub(r"(?<=[\d±]) (?=[\d±%])", "&nbsp;", cell[0]), html)


def on_post_page(output: str, page: Page, **_: Any) -> None:
    """Check that no request leaves the reader's machine."""
    if foreign := re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\s\">]*", output):
        raise PluginError(f"{page.url} loads from another host: {foreign[0]}")


def command_page() -> str:
    """Every command with its arguments and options, as `--help` gives them."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line", group.help, "`permprune COMMAND --help` shows the same in a terminal."]
    parts += [part for name, command in sorted(group.commands.items()) for part in _command(name, command)]
    return "\n\n".join(parts)


def _command(name: str, command: Any) -> list[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(["permprune", name, *(argument.name.upper() for argument in arguments), "[OPTIONS]"])
    rows = ["| option | meaning | default |", "|---|---|---|"]
    rows += [f"| `{argument.name.upper()}` | {_cell_text(argument.help)} | required |" for argument in arguments]
    rows += [f"| `{option.opts[0]}` | {_cell_text(option.help)} | {_default(option)} |" for option in options]
    return [f"## {name}", f"```sh\n{usage}\n```", command.help, "\n".join(rows)]


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    absent = (
        isinstance(option.default, bool) or not isinstance(option.default, (int, float, str)) or option.default == ""
    )
    return "" if absent else f"`{option.default}`"


def _cell_text(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook with their text outputs."""
    return "\n\n".join(filter(None, (part for cell in notebook["cells"] for part in _cell(cell))))


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    shown = "".join(text for output in cell["outputs"] for text in _texts(output)).rstrip()
    return [f"```python\n{source}\n```", f'```text title="Output"\n{shown}\n```' if shown else ""]


def _texts(output: dict[str, Any]) -> list[str]:
    return output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
