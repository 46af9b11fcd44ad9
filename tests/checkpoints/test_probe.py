"""The probe of a folder and the digests in its record: weights that are not those that prune wrote are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import permprune
from permprune.checkpoints.probe import OLD_OUTPUTS, OUTPUTS, PROBE, TOLERANCE
from permprune.checkpoints.record import RECORD
from permprune.checkpoints.weights import GATHERED

from ..cli.running import fails, run
from ..faults.pruned import WINDOWS, commands, write_pruned, write_source

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["fold", "gather"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A pruned folder in bf16; shared, so leave it as it is."""
    place = tmp_path_factory.mktemp("probe")
    source = write_source(place / "source", tiny_tokenizer, torch.bfloat16)
    write_pruned(source, place / request.param, request.param)
    return place / str(request.param)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "pruned"))


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = next(path for path in (folder / GATHERED, folder / "model.safetensors") if path.exists())
    tensors = load_file(path)
    name = name if name in tensors else "lm_head.weight"  # which the embedding is tied to
    tensors[name] = edit(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def drop_digests(folder: Path) -> None:
    """Make the record one of an earlier release."""
    record = json.loads((folder / RECORD).read_text())
    assert record.pop("digests")
    (folder / RECORD).write_text(json.dumps(record))


def damage_unseen_rows(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What shuffles two rows of the embedding of tokens that the probe does not have."""
    seen = load_file(folder / PROBE)["input_ids"].unique().tolist()
    first, second = [token for token in range(128) if token not in seen][:2]

    def edit(weight: torch.Tensor) -> torch.Tensor:
        changed = weight.clone()
        changed[[first, second]] = weight[[second, first]]
        return changed

    return edit


def test_every_command_refuses_weights_that_prune_did_not_write(folder: Path, tmp_path: Path) -> None:
    change(folder, UP, lambda weight: weight * 1.02)
    text, out = folder / "text.txt", tmp_path / "out"
    lines = commands(folder, out) | {
        "pack": ["pack", folder, "--out", out],
        "kv": ["kv", folder, "--calibration", text, "--data", text, "--length", "16", "--samples", "4", "--out", out],
    }
    for command in lines.values():
        assert f"{UP} is not as permprune wrote it" in fails(*command)
    with pytest.raises(permprune.PermpruneError, match=r"permprune\.save"):
        permprune.load(folder)
    assert not out.exists()


def test_a_scaled_layer_changes_the_outputs_by_more_than_rounding(folder: Path) -> None:
    drop_digests(folder)
    before = permprune.verify(folder)
    tolerance = float(load_file(folder / PROBE)[TOLERANCE])
    assert before.difference < tolerance / 4
    change(folder, UP, lambda weight: weight * 1.02)
    assert "computes other outputs than the masked model did" in fails("verify", folder)


def test_damaged_rows_of_tokens_outside_the_probe_are_refused(folder: Path) -> None:
    change(folder, EMBEDDING, damage_unseen_rows(folder))
    assert re.search(r"(embed_tokens|lm_head)\.weight is not as permprune wrote it", fails("verify", folder))


def test_damaged_rows_of_tokens_of_the_probe_change_its_outputs(folder: Path) -> None:
    drop_digests(folder)
    token = int(load_file(folder / PROBE)["input_ids"][0, 0])
    change(folder, EMBEDDING, lambda weight: weight.index_fill(0, torch.tensor([token]), 0.01))
    assert "computes other outputs" in fails("verify", folder)


def test_packed_weights_are_compared_with_digests(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert run("pack", folder, "--out", packed)[0] == 0 and run("verify", packed)[0] == 0
    path = next(path for path in packed.glob("*.safetensors") if path.name != PROBE)
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.02
    save_file(tensors, path, {"format": "pt"})
    for command in (["verify", packed], ["unpack", packed, "--out", tmp_path / "out"]):
        assert "model.norm.weight is not as permprune wrote it" in fails(*command)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_packing_does_not_launder_a_folder(folder: Path, tmp_path: Path, dtype: str) -> None:
    drop_digests(folder)
    probe = load_file(folder / PROBE)
    assert run("pack", folder, "--dtype", dtype, "--out", tmp_path / "packed")[0] == 0
    packed = load_file(tmp_path / "packed" / PROBE)
    assert torch.equal(packed[OUTPUTS], probe[OUTPUTS]) and torch.equal(packed["input_ids"], probe["input_ids"])
    assert packed[TOLERANCE] > probe[TOLERANCE]
    assert run("unpack", tmp_path / "packed", "--out", tmp_path / "back")[0] == 0
    if dtype == "bf16":
        assert torch.equal(load_file(tmp_path / "back" / PROBE)[TOLERANCE], probe[TOLERANCE])
    change(folder, UP, lambda weight: weight * 1.02)
    assert "other outputs" in fails("pack", folder, "--dtype", dtype, "--out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_probe_holds_no_calibration_data(folder: Path) -> None:
    probe = load_file(folder / PROBE)
    assert probe.keys() == {"input_ids", OUTPUTS, TOLERANCE}
    ids = probe["input_ids"]
    assert ids.shape == (2, 16) and int(ids.max()) < 128 and not torch.isin(ids, torch.tensor([1, 2])).any()
    assert probe[OUTPUTS].shape == (2 * 4, 128)
    overlap = [int((row == window).sum()) for row in ids for window in WINDOWS]
    assert max(overlap) < 4


def test_a_probe_of_an_earlier_release_is_read(folder: Path, tmp_path: Path) -> None:
    drop_digests(folder)
    model = permprune.load(folder).float()
    with torch.no_grad():
        answer = model(input_ids=WINDOWS[:2]).logits[:, -1].contiguous()
    save_file({"input_ids": WINDOWS[:2].contiguous(), OLD_OUTPUTS: answer}, folder / PROBE)
    assert run("verify", folder)[0] == 0
    permprune.save(permprune.load(folder), tmp_path / "again")
    assert not torch.equal(load_file(tmp_path / "again" / PROBE)["input_ids"], WINDOWS[:2])
    save_file({"input_ids": WINDOWS[:2].contiguous(), OLD_OUTPUTS: answer * 1.1}, folder / PROBE)
    assert "other outputs" in fails("verify", folder)
