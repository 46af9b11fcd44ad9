"""Labelled texts."""

from pathlib import Path

import datasets
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from permprune.checkpoints.io import read_model
from permprune.data.items import Labels, Selection
from permprune.data.labelled import load_labelled_text, read_labelled_text
from permprune.errors import PermpruneError
from permprune.models.processors import tokenizer_of

Classifier = tuple[PreTrainedModel, PreTrainedTokenizerBase]
LAYOUTS = {
    "names.tsv": "sentence\tlabel\nthe order\tNO\na text\tMaybe\n",
    "numbers.tsv": "sentence\tlabel\nthe order\t0\na text\t1\n",
    "names.csv": 'text,label\n"the order", no\na text,maybe\n',
    "names.jsonl": '{"text": "the order", "label": 0}\n{"text": "a text", "label": "Maybe"}\n',
}


@pytest.fixture
def classifier(tiny_bert: Path) -> Classifier:
    model, processor, _ = read_model(str(tiny_bert))
    return model, tokenizer_of(processor)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same(classifier: Classifier, tmp_path: Path, name: str) -> None:
    model, tokenizer = classifier
    (tmp_path / name).write_text(LAYOUTS[name])
    found = load_labelled_text(tmp_path / name, model, tokenizer, Selection("calibration", 9), 20)
    assert {"input_ids", "attention_mask", "labels"} <= found.keys()
    masks = found["attention_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(found["input_ids"], masks, strict=True)]
    assert [ids[at] for at in found["labels"].argsort()] == tokenizer(["the order", "a text"])["input_ids"]
    assert found["labels"].dtype == torch.int64
    assert model(**found).loss.isfinite()


def test_pairs_are_joined_and_cut(classifier: Classifier, tmp_path: Path) -> None:
    model, tokenizer = classifier
    file = tmp_path / "pairs.tsv"
    file.write_text(
        "index\tsentence1\tsentence2\tlabel\n0\tthe order\ta text\tno\n1\ta text of many words\tthe other\tyes\n"
    )
    found = load_labelled_text(file, model, tokenizer, Selection("evaluation", 2), 100)
    first = found["labels"].tolist().index(0)
    mask = found["attention_mask"][first].bool()
    assert found["input_ids"][first][mask].tolist() == tokenizer("the order", "a text")["input_ids"]
    cut = load_labelled_text(file, model, tokenizer, Selection("evaluation", 2), 5)
    assert {name: tensor.shape[1:] for name, tensor in cut.items() if name != "labels"}["input_ids"] == (5,)


def test_draws_are_deterministic_and_halves_apart(classifier: Classifier, tmp_path: Path) -> None:
    model, tokenizer = classifier
    file = tmp_path / "many.tsv"
    words = ["the", "order", "of", "channels", "text"]
    rows = [f"{a} {b} {c}\t{(a + b) > c!s}".lower() for a in words for b in words for c in words]
    file.write_text("\n".join(["sentence\tlabel", *rows, *rows]))  # every row twice

    def ids(part: str, seed: int = 0, shared: bool = True) -> list[tuple[int, ...]]:
        found = load_labelled_text(file, model, tokenizer, Selection(part, 40, seed, shared), 20)  # type: ignore[arg-type]
        return [tuple(row) for row in found["input_ids"].tolist()]

    assert ids("calibration") == ids("calibration") != ids("calibration", seed=1)
    assert not set(ids("calibration")) & set(ids("evaluation", seed=1))
    assert ids("calibration", shared=False) == ids("evaluation", shared=False)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["not_entailment", "entailment", "entailment"], ["entailment", "not_entailment"]),
        (["10", "2", "1"], ["1", "2", "10"]),
        (["1.0", "0.0"], ["0.0", "1.0"]),
        (["1.0", "0.5"], None),
    ],
)
def test_classes_are_sorted_and_scores_told_apart(tmp_path: Path, labels: list[str], classes: list[str] | None) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + "".join(f"a text\t{label}\n" for label in labels))
    assert read_labelled_text(tmp_path / "a.tsv", "calibration").classes() == classes


def test_scores_are_real_numbers(classifier: Classifier, tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(num_labels=1, num_hidden_layers=0))
    file = tmp_path / "scores.tsv"
    file.write_text("sentence1\tsentence2\tscore\nthe order\ta text\t3.25\n")
    found = load_labelled_text(file, model, classifier[1], Selection("evaluation", 1), 20)
    assert found["labels"].dtype == torch.float32 and found["labels"].tolist() == [3.25]
    for score in ("nan", "inf"):
        file.write_text(f"sentence1\tsentence2\tscore\nthe order\ta text\t{score}\n")
        with pytest.raises(PermpruneError, match=f'row 1 has the label "{score}".*it knows scores'):
            load_labelled_text(file, model, classifier[1], Selection("evaluation", 1), 20)


def test_a_model_without_a_head_gets_no_labels(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tkind\nthe order\tunheard of\n")
    model = BertModel(BertConfig(num_hidden_layers=0))
    assert "labels" not in load_labelled_text(tmp_path / "a.tsv", model, classifier[1], Selection("evaluation", 1), 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence\tlabel\nthe order\tperhaps", r'row 1 has the label "perhaps".*knows no, Maybe, yes \(0 to 2\)'),
        ("sentence\tlabel\nthe order\t3", 'row 1 has the label "3", which the model does not know'),
        ("sentence\tlabel\nthe order\t0.5", 'row 1 has the label "0.5", which the model does not know'),
        ("sentence\tlabel\nthe order\t-1", "row 1 has no label"),
        ("sentence\tlabel\nthe order", "row 1 has no label"),
        ("label\tsentence\n1\t2", "row 1 has no text in its column sentence"),
        ("words\tlabel\nthe order\t1", "none of the columns sentence, text, content, review: it has words, label"),
        ("sentence\tkind\nthe order\t1", "none of the columns label, .*: it has sentence, kind"),
    ],
)
def test_bad_rows_are_named(classifier: Classifier, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(PermpruneError, match=message):
        load_labelled_text(tmp_path / "a.tsv", *classifier, Selection("evaluation", 1), 20)


def test_missing_parts_are_named(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nthe order\t1")
    model, tokenizer = classifier
    with pytest.raises(PermpruneError, match="the model has none"):
        load_labelled_text(tmp_path / "a.tsv", model, None, Selection("evaluation", 1), 20)
    with pytest.raises(PermpruneError, match="no labelled text at"):
        load_labelled_text(tmp_path / "b.tsv", model, tokenizer, Selection("evaluation", 1), 20)
    tokenizer.pad_token = None
    with pytest.raises(PermpruneError, match="no pad_token"):
        load_labelled_text(tmp_path / "a.tsv", model, tokenizer, Selection("evaluation", 1), 20)


def test_a_data_set_names_its_classes(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*names: str) -> datasets.IterableDataset:
        kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
        return datasets.Dataset.from_dict({"text": ["the order"], "label": [0]}, kinds).to_iterable_dataset()

    def label() -> list[int]:
        return load_labelled_text("name@test", *classifier, Selection("evaluation", 1), 20)["labels"].tolist()

    for names, number in ((("yes", "no"), 2), (("good", "bad"), 0)):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_args, names=names, **_options: rows(*names))
        assert label() == [number]


def test_a_folder_has_splits(classifier: Classifier, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, text, label in (("train", "the order", "yes"), ("test", "a text", "no")):
        (folder / f"{split}.csv").write_text(f"sentence,label\n{text},{label}\n")
    for part, number in (("calibration", 2), ("evaluation", 0)):
        for source, shared in ((folder, True), (f"{folder}@{'train' if number else 'test'}", False)):
            chosen = Selection(part, 5, shared=shared)  # type: ignore[arg-type]
            found = load_labelled_text(source, *classifier, chosen, 20)
            assert found["labels"].tolist() == [number]


def test_names_come_before_numbers() -> None:
    config = BertConfig(id2label={0: "7", 1: "0", 2: "true"})
    labels = Labels(config)
    assert [labels.read(label, "row 1") for label in ("7", 0, True, "2", 1.0)] == [0, 1, 2, 2, 1]
    assert Labels(BertConfig()).tensor([True, False], ["a", "b"]).tolist() == [1, 0]
