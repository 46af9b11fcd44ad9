"""Weights that plain Transformers would misread: it stops, and every way out of a packed model keeps its gathers."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import permprune
from permprune.checkpoints.record import read_record
from permprune.checkpoints.weights import CURES, GATHERED, PACKED_WEIGHTS
from permprune.kernels.product.module import PackedLinear

from ..cli.running import run
from ..faults.pruned import logits, write_pruned, write_source

pytestmark = pytest.mark.slow

PLAIN = """
import sys, transformers
for kind in (transformers.AutoModel, transformers.AutoModelForCausalLM):
    for folder in sys.argv[1:]:
        try:
            kind.from_pretrained(folder)
            print("loaded")
        except OSError as error:
            print(error)
import permprune
print(type(kind.from_pretrained(folder).model.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A folder of each mode, and what `pack` makes of it; shared, so leave them as they are."""
    place = tmp_path_factory.mktemp("weights")
    source = write_source(place / "source", tiny_tokenizer)
    for mode in ("fold", "gather"):
        write_pruned(source, place / mode, mode)
        assert run("pack", place / mode, "--dtype", "fp32", "--out", place / f"{mode}-packed")[0] == 0
    return {name: place / name for name in ("fold", "gather", "fold-packed", "gather-packed")}


def test_plain_transformers_stops_and_names_the_cure(folders: dict[str, Path]) -> None:
    names = ["gather", "fold-packed", "gather-packed"]
    command = [sys.executable, "-c", PLAIN, *(str(folders[name]) for name in names)]
    *lines, loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    cures = [CURES[GATHERED], CURES[PACKED_WEIGHTS], CURES[PACKED_WEIGHTS]]
    assert len(lines) == 6 and all(cure in line for cure, line in zip(2 * cures, lines, strict=True))
    assert loaded == "PackedLinear"


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("change", [lambda model: model, copy.deepcopy])
def test_packed_models_are_written_again(
    folders: dict[str, Path],
    tmp_path: Path,
    shards: dict[str, str],
    change: Callable[[PreTrainedModel], PreTrainedModel],
) -> None:
    model = change(AutoModelForCausalLM.from_pretrained(folders["gather-packed"]))
    model.save_pretrained(tmp_path / "again", **shards)
    assert not list((tmp_path / "again").glob("model.safetensors*"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_packed_folders_of_earlier_releases_load(folders: dict[str, Path], tmp_path: Path) -> None:
    old = Path(shutil.copytree(folders["gather-packed"], tmp_path / "old"))
    (old / PACKED_WEIGHTS).rename(old / "model.safetensors")
    config = json.loads((old / "config.json").read_text())
    del config["transformers_weights"], config["quantization_config"]["weights"]
    (old / "config.json").write_text(json.dumps(config))
    assert run("verify", old)[0] == 0
    expected = logits(permprune.load(folders["gather-packed"]))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(old)), expected)


@pytest.mark.parametrize("way", [permprune.unpack, lambda model: model.dequantize()])
@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_unpacked_models_keep_their_gathers(
    folders: dict[str, Path], tmp_path: Path, mode: str, way: Callable[[PreTrainedModel], object]
) -> None:
    model = permprune.load(folders[f"{mode}-packed"])
    way(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    expected = logits(permprune.load(folders[mode]))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    permprune.save(model, tmp_path / "saved")
    assert run("verify", tmp_path / "saved")[0] == 0
    assert read_record(tmp_path / "saved") == read_record(folders[mode])
    assert torch.equal(logits(permprune.load(tmp_path / "saved")), expected)
    if mode == "gather":
        with pytest.raises(permprune.PermpruneError, match=r"permprune\.save"):
            model.save_pretrained(tmp_path / "plain")
    else:
        model.save_pretrained(tmp_path / "plain")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert torch.equal(logits(plain), expected)


def test_a_packed_model_that_transformers_loaded_does_not_lose_gathers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["gather-packed"])
    permprune.unpack(model)
    torch.testing.assert_close(logits(model), logits(permprune.load(folders["gather"])), rtol=0, atol=1e-6)
    with pytest.raises(permprune.PermpruneError, match=r"permprune\.load"):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_model_that_is_packed_in_memory_keeps_its_gathers(folders: dict[str, Path], tmp_path: Path) -> None:
    model = permprune.load(folders["gather"])
    expected = logits(model)
    permprune.pack(model, {row.name: row.pattern for row in read_record(folders["gather"]).layers}, dtype="fp32")
    with pytest.raises(permprune.PermpruneError, match="packed: write it with its own save_pretrained, or unpack it"):
        permprune.save(model, tmp_path / "out")
    permprune.unpack(model)
    permprune.save(model, tmp_path / "out")
    assert torch.equal(logits(permprune.load(tmp_path / "out")), expected)
