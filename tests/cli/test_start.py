"""The start of the program: help imports nothing heavy, and names all that there is."""

import re
import subprocess
import sys

import pytest

from permprune.config import PruneConfig
from permprune.evaluation.dispatch import ACCURACY
from permprune.evaluation.metrics import METRICS
from permprune.options import PACKED
from permprune.permuters.registry import PERMUTERS
from permprune.saliency.registry import SALIENCIES
from permprune.training.weights import TRAINED
from permprune.updates.registry import UPDATES

from .running import run

HEAVY = ("torch", "transformers", "scipy", "sklearn", "matplotlib", "jinja2", "datasets", "lm_eval", "jiwer")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from permprune.cli import app
names = [command.callback.__name__ for command in app.registered_commands]
for arguments in [["--help"], *([name, "--help"] for name in names)]:
    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments
print(len(names), *(module for module in {HEAVY!r} if module in sys.modules))
"""
    count, *heavy = python(code).split()
    assert int(count) > 10 and not heavy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Examples", "PruneConfig", "load", "evaluate"])
def test_any_public_name_may_be_imported_first(name: str) -> None:
    assert python(f"from permprune import {name}; print({name}.__name__)") == name


@pytest.mark.slow
def test_transformers_knows_packed_checkpoints_though_it_was_imported_first() -> None:
    code = """
import transformers.modeling_utils, permprune
from transformers import LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("permprune" in AUTO_QUANTIZER_MAPPING)
"""
    assert python(code) == "True"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["examples", "models.layers", "checkpoints.origin", "system.digests"])
def test_any_module_may_be_the_first_that_needs_transformers(module: str) -> None:
    assert python(f"import permprune.{module}, transformers.modeling_utils") == ""


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("prune", [*PERMUTERS]),
        ("prune", [*SALIENCIES]),
        ("prune", [ACCURACY, *METRICS]),
        ("prune", [*UPDATES]),
        ("finetune", [*TRAINED]),
        ("pack", [*PACKED]),
    ],
)
def test_help_names_every_choice(command: str, names: list[str]) -> None:
    code, stdout, _ = run(command, "--help")
    words = set(re.findall(r"[\w-]+", stdout.replace("│", " ")))
    assert code == 0 and words >= set(names)


def test_every_public_name_is_there() -> None:
    import permprune

    assert all(getattr(permprune, name) is not None for name in permprune.__all__)
    assert set(permprune.__all__) <= set(dir(permprune)) and permprune.PruneConfig is PruneConfig
    with pytest.raises(AttributeError, match="luck"):
        _ = permprune.luck
