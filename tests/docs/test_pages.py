"""The documentation: its examples run, its commands exist, and the API pages have every public name."""

import importlib
import re
import runpy
import shlex
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from transformers import AutoConfig, LlamaForCausalLM

import permprune
from permprune.cli import app

from ..cli.running import run
from ..vision_language import qwen, write_pairs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])

RUN = [
    "index",
    "start",
    "how-to/embeddings",
    "how-to/evaluate",
    "how-to/extend",
    "how-to/extend-coupling",
    "how-to/extend-permuter",
    "how-to/fine-tune",
    "how-to/gpu",
    "how-to/kv-cache",
    "how-to/large-models",
    "how-to/onnx",
    "how-to/train",
    "how-to/vision-language",
]
"""Pages whose Python examples run, one after the other, in a folder with the files that they name."""

SMALLER = {
    "smollm2-135m": "tiny-llama",
    "minilm-l6": "tiny-bert",
    "Qwen/Qwen2.5-VL-3B-Instruct": "tiny-qwen-vl",
    '"newton"': '"newton:rounds=1"',
}
"""What takes the place of real models and long searches."""

FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(permprune [a-z]+(?: [^`]*)?)`")


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(code) for _, tag, code in found if tag == language]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `permprune` command in the code blocks of a page, the indented ones included."""
    indented = re.findall(r"^    .*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    code = "\n".join([*fenced(page, "sh"), textwrap.dedent("\n".join(indented))]).replace("\\\n", " ")
    lines = re.findall(r"^(?:torchrun .* -m )?permprune (.*)$", code, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The working folder of an example: tiny models, texts and tables."""
    for name in ("tiny_checkpoint", "tiny_bert", "tiny_text"):
        request.getfixturevalue(name)
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    for name in ("my_text.txt", "other_text.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = [f"{line}\t{('no', 'Maybe', 'yes')[number % 3]}" for number, line in enumerate(text.splitlines()[:30])]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *rows]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of PEFT, the Trainer and the ONNX exporter
@pytest.mark.parametrize("name", RUN)
def test_python_examples_run(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "\n".join(fenced(DOCS / f"{name}.md", "python"))
    for real, tiny in SMALLER.items():
        source = source.replace(real, tiny)
    if name == "start":  # its folder comes from the command line
        assert run("prune", *TINY, "--out", "pruned", "--order", "ria")[0] == 0
    if name in ("how-to/fine-tune", "how-to/onnx"):
        assert run("prune", *TINY, "--out", "pruned", "--order", "ria")[0] == 0
        assert run("pack", "pruned", "--out", "packed")[0] == 0
    if name == "how-to/vision-language":
        write_pairs(folder / "photos", 6)
        for part in qwen():
            part.save_pretrained(folder / "tiny-qwen-vl")
    script = folder / "example.py"
    script.write_text(source, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


TINY = ["tiny-llama", "--calibration", "text.txt", "--data", "text.txt", "--samples", "24", "--length", "16"]


@pytest.mark.slow
def test_the_commands_of_the_start_page_run(folder: Path) -> None:
    found = commands(DOCS / "start.md")
    assert [arguments[0] for arguments in found] == ["prune", "verify", "evaluate", "compare"]
    small = {
        "prune": [*TINY, "--order", "newton:rounds=1"],
        "verify": ["pruned"],
        "evaluate": ["pruned", "--data", "text.txt"],
        "compare": TINY,
    }
    for command, _, *options in found:
        options = [option.replace("newton", "newton:rounds=1") for option in options]
        code, _, stderr = run(command, *small[command], *options)
        assert code == 0, stderr
    assert (folder / "pruned" / "report.html").exists() and (folder / "figures.json").exists()


def recipe(target: str) -> list[list[str]]:
    """The commands of a target of the Makefile, without the folder of their programs."""
    make = ["make", "--dry-run", "--no-print-directory", "--directory", str(ROOT), target, "MODEL=tiny-llama"]
    text = subprocess.run(make, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    lines = [
        shlex.split(line.replace(".venv/bin/", ""))
        for line in text.splitlines()
        if "tiny-llama" in line or "demo" in line
    ]
    return [words for words in lines if words[0] in ("permprune", "python")]


@pytest.mark.slow
def test_the_demo_runs_on_a_tiny_model(folder: Path) -> None:
    (folder / "demo").mkdir()
    config = AutoConfig.from_pretrained(folder / "tiny-llama")
    config.hidden_size = 64  # the least width of an embedding in int8
    LlamaForCausalLM(config).save_pretrained(folder / "tiny-llama")
    prune, verify = recipe("demo")
    code, stdout, stderr = run(*prune[prune.index("prune") :], *TINY[1:])
    assert code == 0, stderr
    assert "plain 2:4" in stdout and "permprune verify demo/pruned" in stdout
    assert (folder / "demo" / "pruned" / "packed.safetensors").exists()
    assert run(*verify[1:])[0] == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path) -> None:
    known: Any = typer.main.get_command(app)
    for name, *arguments in commands(page):
        known.commands[name].make_context(name, arguments)
    for inline in INLINE.findall(page.read_text(encoding="utf-8")):
        _, name, *arguments = shlex.split(inline)
        options = {option for parameter in known.commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= options, inline


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_are_python(page: Path) -> None:
    for source in fenced(page, "python"):
        compile(source, str(page), "exec")
        missing = {name for name in re.findall(r"(?<![\w.])permprune\.(\w+)", source) if not hasattr(permprune, name)}
        assert not missing


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_between_files_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", (ROOT / name).read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_the_navigation_has_every_page_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for section in config["nav"] for part in section.values() for page in pages_of(part)]
    generated = [str(path.relative_to(DOCS).with_suffix(".md")) for path in DOCS.rglob("*.ipynb")]
    written = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*written, *generated, "api/commands.md", "contributing.md", "changelog.md"])


def test_the_search_needs_no_other_host() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    scripts = config["extra"]["polyfills"]
    assert any("iframe-worker" in script for script in scripts), "the offline plugin would load its own"
    assert all((DOCS / script).is_file() for script in scripts)


def pages_of(part: str | list[dict[str, str]]) -> list[str]:
    """The pages of an entry of the navigation."""
    return [part] if isinstance(part, str) else [page for entry in part for page in entry.values()]


def test_the_api_pages_have_every_public_name_once() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    assert sorted(re.findall(r"^::: permprune\.(\w+)$", text, flags=re.MULTILINE)) == sorted(permprune.__all__)
    assert len(permprune.__all__) <= 60


def test_the_api_pages_name_what_there_is() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    for module, name in re.findall(r"^::: (permprune\.[\w.]+)\.(\w+)$", text, flags=re.MULTILINE):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quick-start", "own-permuter"])
def test_notebooks_run(name: str) -> None:
    notebook = runpy.run_path(str(DOCS / "notebooks" / "run.py"))["run"](DOCS / "notebooks" / f"{name}.ipynb")
    assert all(cell["outputs"] for cell in notebook["cells"] if "print(" in "".join(cell["source"]))


def test_the_tests_of_each_promise_exist() -> None:
    named = re.findall(r"`(tests/[^`]*)`", (DOCS / "guarantees.md").read_text(encoding="utf-8"))
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "qwen2.5-coder-1.5b", "minilm-l6", "minilm-sst2", "vit-s14", "llava", "whisper-tiny-en"]
)
def test_a_recipe_is_measured_by_the_command_of_its_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    recipe = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))["RECIPES"][name]
    _, _, page = runpy.run_path(str(DOCS / "figures" / "tables.py"))["RECIPES"][name]
    found = [sorted(command) for command in commands(DOCS / "recipes" / f"{page}.md")]
    assert sorted(["prune", recipe.model, *recipe.prune.split(), *recipe.data.split(), "--out", "pruned"]) in found
