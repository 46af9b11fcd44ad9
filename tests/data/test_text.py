import logging
from random import Random

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from permprune.data.text import load_documents, tokenize
from permprune.errors import PermpruneError

from .tables import SUFFIXES, write_table


def test_file_is_one_document_unchanged(tmp_path):
    file = tmp_path / "wiki.tokens"
    file.write_bytes(" \n = Ärger = \r\n\n text \n".encode())
    assert load_documents(file, "evaluation") == [" \n = Ärger = \r\n\n text \n"]


def test_default_text_has_two_parts():
    calibration, evaluation = load_documents(None, "calibration"), load_documents(None, "evaluation")
    assert not set(calibration) & set(evaluation)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".CSV"])
def test_a_table_is_a_document_a_row(suffix, tmp_path, caplog):
    file, texts = tmp_path / f"a{suffix}", ["one\u2028still one", "", 'a "quoted" one']
    write_table(file, [{"number": number, "text": text} for number, text in enumerate(texts)])
    assert load_documents(str(file), "calibration") == [texts[0], texts[2]] and not caplog.records
    write_table(file, [{"text": "one", "label": "yes"}])
    assert load_documents(file, "calibration") == ["one"]
    assert 'has labels, but the model takes none: only its column "text" is read' in caplog.text
    write_table(file, [{"sentence": "one", "label": "yes"}])
    with pytest.raises(PermpruneError, match='has no column "text": name one so among its columns, which are sentence'):
        load_documents(file, "calibration")
    write_table(file, [{"text": 1}])
    with pytest.raises(PermpruneError, match=f'a{suffix}, row 1 has no text in its column "text"'):
        load_documents(file, "calibration")


def test_null_is_no_text_and_a_row_without_the_column_is_an_error(tmp_path):
    file = write_table(tmp_path / "a.json", [{"text": "one"}, {"text": None}])
    assert load_documents(file, "calibration") == ["one"]
    write_table(file, [{"text": "one"}, {"txt": "two"}])
    with pytest.raises(PermpruneError, match='row 2 has no text in its column "text"'):
        load_documents(file, "calibration")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_text(tmp_path, name):
    (tmp_path / name).write_text(" \n")
    with pytest.raises(PermpruneError, match=f"{name} holds no text"):
        load_documents(tmp_path / name, "evaluation")


def test_not_utf8(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc\xff")
    with pytest.raises(PermpruneError, match=r"not UTF-8 text \(byte 3\)"):
        load_documents(file, "evaluation")


@pytest.mark.parametrize("name", ["./none", "/no/file", "a/b/c", "words.txt", "a\\b"])
def test_missing_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PermpruneError, match="no text file"):
        load_documents(name, "evaluation")


def test_dataset_splits(tmp_path):
    write_table(tmp_path / "train.jsonl", [{"text": "to learn"}, {"text": "more"}])
    write_table(tmp_path / "test.jsonl", [{"text": "to test"}])
    assert load_documents(str(tmp_path), "calibration") == ["to learn", "more"]
    assert load_documents(str(tmp_path), "evaluation") == ["to test"]
    assert load_documents(f"{tmp_path}@test", "calibration") == ["to test"]
    write_table(tmp_path / "train.jsonl", [{"sentence": "x"}])
    with pytest.raises(PermpruneError, match='has no column "text"'):
        load_documents(str(tmp_path), "calibration")


def test_dataset_name_and_configuration(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((*args, options["split"]))
        return [{"text": "words"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("name", "owner/name:config", "owner/name:config@validation"):
        load_documents(source, "evaluation")
    assert asked == [
        ("name", None, "test"),
        ("owner/name", "config", "test"),
        ("owner/name", "config", "validation"),
    ]


def test_dataset_of_lines_is_one_document(monkeypatch):
    rows = [{"text": text} for text in ("", " = Title = \n", "", " Text . \n")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: rows)
    assert load_documents("wikitext", "evaluation") == ["\n\n = Title = \n\n\n\n\n Text . \n"]


def test_dataset_is_read_only_so_far(monkeypatch):
    def endless():
        while True:
            yield {"text": "0123456789"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: endless())
    monkeypatch.setattr("permprune.data.text.MAX_CHARACTERS", 25)
    assert len(load_documents("name", "calibration")) == 3


def test_dataset_that_does_not_load(monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("not on the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(PermpruneError, match=r'"owner/name".* does not load as a data set: not on the hub$'):
        load_documents("owner/name", "calibration")


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_windows_are_the_text_in_order(tiny_tokenizer, tiny_text):
    text = tiny_text.read_text()
    windows = tokenize([text], tiny_tokenizer, 12, 5)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == _ids(tiny_tokenizer, text)[:60]


def test_a_token_that_begins_every_text_begins_every_window(tiny_tokenizer, tiny_text):
    text = tiny_text.read_text()
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tiny_tokenizer.bos_token_id)])
    beginning = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    windows = tokenize([text], beginning, 13, 5)
    assert windows[:, 0].tolist() == [tiny_tokenizer.bos_token_id] * 5
    assert torch.equal(windows[:, 1:], tokenize([text], tiny_tokenizer, 12, 5))


def test_end_of_sequence_between_documents(tiny_tokenizer):
    first, second = _ids(tiny_tokenizer, "the order"), _ids(tiny_tokenizer, "a text")
    expected = [*first, tiny_tokenizer.eos_token_id, *second]
    windows = tokenize(["the order", "a text"], tiny_tokenizer, len(expected), 1)
    assert windows[0].tolist() == expected


def test_no_separator_where_the_tokenizer_has_none(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(type(tiny_tokenizer), "eos_token_id", None, raising=False)
    expected = _ids(tiny_tokenizer, "the order") + _ids(tiny_tokenizer, "a text")
    assert tokenize(["the order", "a text"], tiny_tokenizer, len(expected), 1)[0].tolist() == expected


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spaces=st.integers(1, 40), length=st.integers(2, 30), count=st.integers(1, 20))
def test_reading_no_more_than_needed_changes_no_token(tiny_tokenizer, spaces, length, count):
    text = "the channels of a permutation are kept ".replace(" ", " " * spaces) * 400
    windows = tokenize([text], tiny_tokenizer, length, count)
    assert windows.flatten().tolist() == _ids(tiny_tokenizer, text)[: length * count]


def test_a_long_text_is_not_tokenised_whole(tiny_tokenizer):
    seen = []

    def spy(text, **options):
        seen.append(len(text))
        return tiny_tokenizer(text, **options)

    spy.eos_token_id, spy.bos_token_id = tiny_tokenizer.eos_token_id, tiny_tokenizer.bos_token_id
    text = "the order of the channels " * 10_000
    for seed in (None, 0):
        tokenize([text] * 3, spy, 8, 2, seed)
    assert sum(seen) < 20_000


def test_seed_draws_distinct_windows(tiny_tokenizer):
    alphabet = "abdehinortuw"
    documents = [a + b + c for a in alphabet for b in alphabet for c in alphabet[:4]]
    windows = tokenize(documents, tiny_tokenizer, 8, 40, seed=1)
    assert windows.shape == (40, 8)
    assert len(windows.unique(dim=0)) == 40
    assert torch.equal(windows, tokenize(documents, tiny_tokenizer, 8, 40, seed=1))
    assert not torch.equal(windows, tokenize(documents, tiny_tokenizer, 8, 40, seed=2))
    assert not torch.equal(windows, tokenize(documents, tiny_tokenizer, 8, 40))


def test_every_window_of_the_text_can_be_drawn(tiny_tokenizer, tiny_text):
    ids = _ids(tiny_tokenizer, tiny_text.read_text())
    count = len(ids) // 16
    windows = tokenize([tiny_text.read_text()], tiny_tokenizer, 16, count, seed=0)
    inorder = torch.tensor(ids[: count * 16]).view(count, 16)
    assert sorted(windows.tolist()) == sorted(inorder.tolist())
    assert not torch.equal(windows, inorder)


@pytest.mark.parametrize("apart", [0, 5, 12, 40, 50])
def test_the_first_windows_precede_the_rest_in_the_text(tiny_tokenizer, apart):
    text = [" ".join(Random(0).choices("abdehinortuw", k=2000))]
    places = {tuple(row): place for place, row in enumerate(tokenize(text, tiny_tokenizer, 8, 160).tolist())}
    drawn, found = (
        [places[tuple(row)] for row in tokenize(text, tiny_tokenizer, 8, 40, 3, apart=count).tolist()]
        for count in (0, apart)
    )
    first = sorted(drawn)[:apart]
    assert len(places) == 160 and found == first + [place for place in drawn if place not in first]


@pytest.mark.parametrize("seed", [None, 0])
def test_too_short(tiny_tokenizer, seed):
    held = len(_ids(tiny_tokenizer, "the order of the channels"))
    with pytest.raises(PermpruneError, match=f"has {held} tokens, too few for a window of 500"):
        tokenize(["the order of the channels"], tiny_tokenizer, 500, 1, seed)
    assert len(tokenize(["the order of the channels"], tiny_tokenizer, 2, 100, seed)) == held // 2


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 0)])
def test_no_windows_asked(tiny_tokenizer, length, count):
    with pytest.raises(PermpruneError, match="at least 1 window of 2 tokens"):
        tokenize(["the order"], tiny_tokenizer, length, count)


def test_silent_about_long_sequences(tiny_tokenizer, tiny_text, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # commands that ran before have silenced it
    monkeypatch.setattr(tiny_tokenizer, "deprecation_warnings", {})
    tiny_tokenizer(tiny_text.read_text())
    assert "longer than the specified maximum" in caplog.text
    caplog.clear()
    monkeypatch.setattr(tiny_tokenizer, "deprecation_warnings", {})
    tokenize([tiny_text.read_text()], tiny_tokenizer, 64, 4)
    assert not caplog.records
