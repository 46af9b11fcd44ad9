"""The start of the program: help imports nothing heavy, and names all that there is."""

import re
import subprocess
import sys

import pytest

from permprune.config import PruneConfig
from permprune.jobs.finetune import RATES
from permprune.options import PACKED
from permprune.permuters.registry import PERMUTERS
from permprune.updates.methods import UPDATES

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
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "Annotated" not in result.output, arguments
print(len(names), *(module for module in {HEAVY!r} if module in sys.modules))
"""
    count, *heavy = python(code).split()
    assert int(count) > 10 and not heavy


STARTS = [
    # any public name may be imported first
    *(f"from permprune import {name}; print({name}.__name__)" for name in ("Examples", "load", "evaluate")),
    # any module may be the first that needs Transformers
    *(
        f"import permprune.{module}, transformers.modeling_utils; print()"
        for module in ("examples", "models.layers", "checkpoints.origin", "system.digests")
    ),
    # Transformers knows packed checkpoints though it was imported first
    """
import transformers.modeling_utils, permprune
from transformers import LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("permprune" in AUTO_QUANTIZER_MAPPING)
""",
    # permprune's own imports fail as they do on Windows; its dependencies know what they run on
    """
import builtins

find = builtins.__import__

def windows(name, globals=None, *rest, **named):
    asks = (globals or {}).get("__name__", "")
    if asks.startswith("permprune") and name in ("fcntl", "grp", "pwd", "resource", "termios"):
        raise ModuleNotFoundError(name)
    return find(name, globals, *rest, **named)

builtins.__import__ = windows
import permprune, permprune.cli
assert all(getattr(permprune, name) for name in permprune.__all__)
from permprune.system.memory import peak_memory_mb
from transformers import LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(peak_memory_mb() > 100, "permprune" in AUTO_QUANTIZER_MAPPING)
""",
]
EACH = f"""
import os, sys
# what takes longest to import, once for all
import accelerate, jinja2, scipy.optimize, torchvision.transforms
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor

for code in {STARTS!r}:
    child = os.fork()
    if child == 0:
        try:
            exec(code)
        finally:
            os._exit(sys.stdout.flush() or 0)
    os.waitpid(child, 0)
"""
"""Runs each start in a process of its own, in which neither permprune nor Transformers is imported."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_permprune_and_transformers_are_imported_in_any_order() -> None:
    assert python(EACH).split("\n") == ["Examples", "load", "evaluate", "", "", "", "", "True", "True True"]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("prune", [*PERMUTERS]),
        ("prune", [*UPDATES]),
        ("finetune", [*RATES]),
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
