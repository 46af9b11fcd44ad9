"""What a run depends on."""

import ast
import dataclasses
import inspect
import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import permprune
from permprune import Newton, PermpruneError, PruneConfig, prune
from permprune.options import nearest
from permprune.permuters.registry import permuter
from permprune.saliency.metrics import OBS, Wanda
from permprune.updates.methods import SparseGPT

from .cli.running import run

WINDOWS = torch.randint(128, (12, 16), generator=torch.Generator().manual_seed(0))


def test_a_misspelt_setting_names_the_nearest() -> None:
    assert PruneConfig().replace(pattern="4:8", seed=3) == PruneConfig(pattern="4:8", seed=3)
    with pytest.raises(PermpruneError, match=r'there is no setting "patern": did you mean "pattern"\?'):
        PruneConfig().replace(patern="2:4")
    with pytest.raises(PermpruneError, match='there is no setting "colour": choose one of pattern, candidates'):
        PruneConfig().replace(colour=1)


def test_every_field_is_explained_on_its_own() -> None:
    body = ast.parse(inspect.getsource(PruneConfig)).body[0].body  # type: ignore[attr-defined]
    explained = {
        field.target.id
        for field, after in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text(after)
    }
    assert explained == {field.name for field in dataclasses.fields(PruneConfig)}


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_a_config_and_keywords_beside_it(tiny_llama: LlamaForCausalLM) -> None:
    config = PruneConfig(order="random", pattern="2:4", precision="fp32")
    pruned = prune(tiny_llama, None, config, examples=WINDOWS, pattern="4:8")
    assert pruned.config.pattern == pruned.layers[0].pattern == "4:8" and config.pattern == "2:4"
    assert pruned.record().settings["order"] == "random"
    with pytest.raises(PermpruneError, match='did you mean "order"'):
        prune(tiny_llama, None, config, orders="ria")
    with pytest.raises(PermpruneError, match=r"the model is 'smollm2-135m': give what permprune.read_model reads"):
        prune("smollm2-135m", examples=WINDOWS)  # type: ignore[arg-type]
    with pytest.raises(PermpruneError, match=r"the config is 'ria': give a PruneConfig, or its fields as keywords"):
        prune(tiny_llama, None, "ria")  # type: ignore[arg-type]


def test_a_record_describes_objects(tiny_llama: LlamaForCausalLM) -> None:
    methods: dict[str, Any] = {
        "order": Newton(rounds=1),
        "saliency": OBS(damping=0.1),
        "update": SparseGPT(),
    }
    pruned = prune(tiny_llama, examples=WINDOWS, precision="fp32", **methods)
    recorded = read_record_of(pruned)
    assert [recorded[key] for key in methods] == ["newton:rounds=1", "obs:damping=0.1", "sparsegpt"]
    assert recorded["calibration"] == "12 examples given in Python"


def read_record_of(pruned: permprune.Pruned) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(json.dumps(pruned.record().to_json()))["settings"]
    return settings


def test_states_tell_objects_with_other_options_apart() -> None:
    own = PruneConfig(saliency=OBS(damping=0.1)).identity()
    assert own == PruneConfig(saliency="obs:damping=0.1").identity()
    assert own["saliency"] != PruneConfig(saliency="obs").identity()["saliency"]
    assert PruneConfig(saliency="obs:damping=0.01").identity()["saliency"] == "obs"
    assert PruneConfig(saliency=Wanda()).identity() != PruneConfig(saliency="magnitude").identity()


def test_a_misspelt_method_names_the_nearest() -> None:
    with pytest.raises(PermpruneError, match=r'unknown permuter "newtn": did you mean "newton"\?'):
        permuter("newtn:rounds=3")
    assert nearest("x", ["one", "two"]) == "choose one of one, two"


def test_the_version_stands_in_one_place() -> None:
    code, stdout, _ = run("--version")
    assert (code, stdout.strip()) == (0, permprune.__version__)


def test_the_library_prints_nothing_unasked() -> None:
    code = "import permprune.system.progress as p; p.log.error('said'); print(type(p.log.handlers[0]).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("NullHandler\n", "")
