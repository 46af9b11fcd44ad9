"""Folders are uploaded whole, to a stub of the hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import permprune
from permprune import PermpruneError

from ..cli.running import fails, run
from ..faults.pruned import SETTINGS, WINDOWS
from .hub_stub import TOKEN, Hub, served


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with served() as stub:
        yield stub


@pytest.fixture
def pruned(tiny_llama: LlamaForCausalLM) -> permprune.Pruned:
    return permprune.prune(tiny_llama, examples=WINDOWS, mode="gather", **SETTINGS)


def test_a_pruned_model_is_pushed_whole(
    pruned: permprune.Pruned, tiny_tokenizer: PreTrainedTokenizerFast, hub: Hub, tmp_path: Path
) -> None:
    options = {"token": TOKEN, "endpoint": hub.endpoint}
    address = pruned.push_to_hub("someone/tiny-2-4", tiny_tokenizer, private=True, **options)
    assert address == f"{hub.endpoint}/someone/tiny-2-4" and hub.created == {"someone/tiny-2-4": True}
    pruned.save_pretrained(tmp_path / "tiny-2-4", tiny_tokenizer)
    written = {path.name: path.read_bytes() for path in (tmp_path / "tiny-2-4").iterdir()}
    assert hub.files.keys() == written.keys() and len(hub.commits) == 1
    assert {name for name in written if written[name] != hub.files[name]} <= {"README.md", "report.html"}
    card = ModelCard(hub.files["README.md"].decode())
    assert 'permprune.load(snapshot_download("someone/tiny-2-4"))' in card.text


def test_the_card_on_the_hub_does_not_name_the_local_folder(pruned: permprune.Pruned, hub: Hub, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path / "secret-place")
    folder = (tmp_path / "secret-place").rename(tmp_path / "renamed")
    permprune.push_to_hub(folder, "someone/tiny-2-4", token=TOKEN, endpoint=hub.endpoint)
    card = hub.files["README.md"].decode()
    assert "secret-place" not in card and "renamed" not in card
    assert "# someone/tiny-2-4, 2:4" in card and "This is `LlamaForCausalLM`, pruned" in card
    assert 'permprune.load(snapshot_download("someone/tiny-2-4"))' in card and "permprune has to be installed" in card
    assert 'AutoTokenizer.from_pretrained("someone/tiny-2-4")' in card and "model.generate(" in card
    assert "secret-place" in (folder / "README.md").read_text(encoding="utf-8"), "the folder stays as it is"


def test_what_is_pushed_names_no_folder_of_the_machine(
    tiny_checkpoint: Path, tiny_text: Path, hub: Hub, tmp_path: Path
) -> None:
    evaluation = permprune.Evaluation(str(tiny_text), 2, 16)
    config = permprune.PruneConfig(order="none", calibration=str(tiny_text), length=16, samples=24)
    permprune.prune_to_folder(str(tiny_checkpoint), tmp_path / "out", config, evaluation=evaluation)
    permprune.push_to_hub(tmp_path / "out", "someone/tiny-2-4", token=TOKEN, endpoint=hub.endpoint)
    record = json.loads(hub.files["permprune.json"])
    assert record["model"] == tiny_checkpoint.name and record["settings"]["calibration"] == tiny_text.name
    assert record["measured"]["data"] == tiny_text.name
    assert [name for name, content in hub.files.items() if tmp_path.name.encode() in content] == []
    assert tiny_checkpoint.name.encode() in hub.files["report.html"]
    assert str(tiny_checkpoint) in (tmp_path / "out" / "permprune.json").read_text(encoding="utf-8")


def test_a_written_folder_is_pushed_as_it_is(pruned: permprune.Pruned, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    pruned.save_pretrained(folder)
    (folder / "README.md").write_text("My own words.", encoding="utf-8")
    permprune.push_to_hub(folder, "someone/tiny", token=TOKEN, endpoint=hub.endpoint, message="By hand")
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.created == {"someone/tiny": False} and hub.commits == ["By hand"]


def test_what_cannot_be_uploaded_is_one_line(
    pruned: permprune.Pruned, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    pruned.save_pretrained(folder)
    with pytest.raises(PermpruneError, match=r"the hub refuses a/b \(401\): Invalid credentials.*hf auth login"):
        permprune.push_to_hub(folder, "a/b", token="hf_wrong", endpoint=hub.endpoint)
    with pytest.raises(PermpruneError, match=r"cannot upload to a/b/c: .*a/b/c"):
        permprune.push_to_hub(folder, "a/b/c", token=TOKEN, endpoint=hub.endpoint)
    with pytest.raises(PermpruneError, match="cannot reach the hub for a/b: "):
        permprune.push_to_hub(folder, "a/b", token=TOKEN, endpoint="http://127.0.0.1:9")
    assert "holds no permprune.json" in fails("push", tmp_path, "a/b")
    assert not hub.files
    monkeypatch.setattr("permprune.pruning.folder.push_to_hub", lambda *args, **options: f"{args[1]} {options}")
    code, stdout, _ = run("push", folder, "a/b", "--private")
    assert code == 0 and stdout == "uploaded to a/b {'private': True}\n"
