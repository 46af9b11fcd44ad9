"""Sentence encoders are pruned, trained and measured by their embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import permprune
from permprune.data.load import load_examples
from permprune.data.overlap import overlap
from permprune.evaluation.agreement import embedding_agreement
from permprune.losses.objective import Objective
from permprune.losses.targets import Embedding, Embeddings, Imitation, choose_task
from permprune.models.modality import POOLING, embeddings, kind_of

from .cli.running import run
from .fixtures import BLOCK, SENTENCES

NEIGHBOURS = [
    "nearest neighbour agreement", "ten nearest neighbours agreement", "Spearman correlation of similarities",
]  # fmt: skip

FLAGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}


def write_plain(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random encoder that has a head for masked tokens, as many published ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(BertConfig(**BLOCK, vocab_size=128)).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", pad_token="</s>", model_max_length=64
    ).save_pretrained(folder)
    return folder


def write_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast, pooling: dict[str, object]) -> Path:
    """A folder of Sentence-Transformers with a random encoder."""
    write_plain(folder, tokenizer)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return folder


@pytest.fixture
def encoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_encoder(tmp_path / "encoder", tiny_tokenizer, {FLAGS["mean"]: True})


@pytest.fixture
def plain(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_plain(tmp_path / "plain", tiny_tokenizer)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    generator = np.random.default_rng(0)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(" ".join(generator.choice(words, generator.integers(3, 12))) for _ in range(200)))
    return path


@pytest.fixture
def pairs(tmp_path: Path, texts: Path) -> Path:
    lines = texts.read_text().splitlines()
    path = tmp_path / "pairs.tsv"
    rows = [
        f"{one}\t{two}\t{number % 6}.5" for number, (one, two) in enumerate(zip(lines[:40], lines[40:80], strict=True))
    ]
    path.write_text("\n".join(["sentence1\tsentence2\tscore", *rows]))
    return path


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_poolings_are_those_of_the_formulas(pooling: str) -> None:
    states = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    for row, kept, found in zip(states, mask.bool(), embeddings(states, mask, pooling), strict=True):
        real = row[kept]
        pooled = {"mean": real.mean(0), "cls": real[0], "max": real.amax(0), "lasttoken": real[-1]}[pooling]
        torch.testing.assert_close(found, pooled / pooled.norm())


@pytest.mark.parametrize(
    ("config", "pooling"),
    [*(({flag: True, "pooling_mode_mean_sqrt_len_tokens": False}, mode) for mode, flag in FLAGS.items()),
     ({"pooling_mode": "lasttoken"}, "lasttoken")],
)  # fmt: skip
def test_the_pooling_is_read_from_the_folder(
    config: dict[str, object], pooling: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, _, _ = permprune.read_model(str(write_encoder(tmp_path / "encoder", tiny_tokenizer, config)))
    assert kind_of(model) == "embeddings" and getattr(model.config, POOLING) == pooling


@pytest.mark.parametrize("config", [{"pooling_mode": "magic"}, {"pooling_mode_weightedmean_tokens": True}, {}])
def test_an_unknown_pooling_is_one_line(
    config: dict[str, object], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = write_encoder(tmp_path / "encoder", tiny_tokenizer, config)
    status, _, error = run("evaluate", str(folder))
    assert status == 2 and "pools tokens in a way that is not known" in error and error.count("\n") == 1


def refused(*arguments: object) -> str:
    """The line with which a command is refused, after any warnings."""
    status, _, error = run(*map(str, arguments))
    *_, line = error.splitlines()
    assert status == 2 and line.startswith("permprune: ")
    return line


def test_what_cannot_be_embedded_or_measured_is_one_line(
    encoder: Path, plain: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERMPRUNE_CACHE", str(tmp_path))  # which is not damaged
    line = refused("evaluate", plain, "--task", "embedding", "--data", texts)
    assert "embedding:pooling=cls" in line and "damaged" not in line
    assert "by mean" in refused("evaluate", encoder, "--task", "embedding:pooling=max", "--data", texts)
    assert "mean" in refused("prune", encoder, "--set", "task=embedding:pooling=man", "--out", tmp_path / "out")
    assert "translation" in refused("finetune", encoder, "--task", "translation", "--out", tmp_path / "out")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("sentence1\tsentence2\n" + "the text\tis short\n" * 4)
    assert "scores" in refused("evaluate", encoder, "--data", pairs)


def test_an_encoder_is_compared_with_the_dense_one(encoder: Path, texts: Path, pairs: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    for data, first in ((texts, []), (pairs, ["Spearman correlation", "Pearson correlation"])):
        options = ["--dense", str(encoder), "--data", str(data), "--windows", "1", "--json", str(figures)]
        status, printed, error = run("evaluate", str(encoder), *options)
        assert status == 0, error
        written = json.loads(figures.read_text())
        names = [written["metric"], *(other["metric"] for other in written["others"])]
        assert names == [*first, "cosine similarity", *NEIGHBOURS]
        assert len(printed.splitlines()) == len(names)


def test_another_size_of_embeddings_is_refused() -> None:
    with pytest.raises(permprune.PermpruneError, match="4 channels"):
        embedding_agreement(torch.ones(3, 8), torch.ones(3, 4))


@pytest.mark.slow
def test_a_plain_encoder_that_is_asked_for_is_written_for_sentence_transformers(
    plain: Path, texts: Path, tmp_path: Path
) -> None:
    data = ["--calibration", str(texts), "--data", str(texts), "--samples", "4", "--windows", "1", "--length", "16"]
    task = ["--set", "task=embedding:pooling=cls", "--order", "ria"]
    status, _, error = run("prune", str(plain), *data, *task, "--out", str(tmp_path / "out"))
    assert status == 0, error
    assert run("pack", str(tmp_path / "out"), "--dtype", "fp32", "--out", str(tmp_path / "packed"))[0] == 0
    for folder in (tmp_path / "out", tmp_path / "packed"):
        paths = [module["path"] for module in json.loads((folder / "modules.json").read_text())]
        assert paths == ["", "1_Pooling", "2_Normalize"]
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
        assert pooling["pooling_mode_cls_token"] and not pooling["pooling_mode_mean_tokens"]
        assert pooling["word_embedding_dimension"] == 32
        assert kind_of(permprune.read_model(str(folder))[0]) == "embeddings"


def test_the_loss_compares_cosines_and_similarities() -> None:
    generator = torch.Generator().manual_seed(0)
    own, dense = (F.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2))
    cosines = 2 * (1 - (own * dense).sum(1)).sum()
    similarities = (own @ own.T - dense @ dense.T).square().sum() / 6
    torch.testing.assert_close(Embeddings(own).distance(dense), cosines + similarities)
    assert Embeddings(own).distance(own) == 0


def test_metrics_are_those_of_the_definitions() -> None:
    generator = torch.Generator().manual_seed(1)
    dense = F.normalize(torch.randn(40, 8, generator=generator), dim=1)
    own = F.normalize(dense + 0.2 * torch.randn(40, 8, generator=generator), dim=1)
    found = {result.metric.name: result.value for result in embedding_agreement(own, dense)}
    one, other = (x.double().numpy() for x in (own, dense))
    assert found["cosine similarity"] == pytest.approx((one * other).sum(1).mean())
    nearest = [
        [sorted((j for j in range(40) if j != i), key=lambda j: -(x[i] @ x[j])) for i in range(40)]
        for x in (one, other)
    ]
    agree = np.mean([mine[0] == theirs[0] for mine, theirs in zip(*nearest, strict=True)])
    assert found["nearest neighbour agreement"] == pytest.approx(agree)
    shared = np.mean([len({*mine[:10]} & {*theirs[:10]}) / 10 for mine, theirs in zip(*nearest, strict=True)])
    assert found["ten nearest neighbours agreement"] == pytest.approx(shared)
    upper = np.triu_indices(40, 1)
    ranks = stats.spearmanr((one @ one.T)[upper], (other @ other.T)[upper]).statistic
    assert found["Spearman correlation of similarities"] == pytest.approx(ranks, abs=1e-4)
    assert all(result.value == pytest.approx(1.0) for result in embedding_agreement(dense, dense))


def test_pairs_with_scores_are_correlated(encoder: Path, pairs: Path) -> None:
    result = permprune.evaluate(str(encoder), permprune.Evaluation(str(pairs)))
    assert result.metric.name == "Spearman correlation" and result.count == 40
    model, tokenizer, _ = permprune.read_model(str(encoder))
    rows = [line.split("\t") for line in pairs.read_text().splitlines()[1:]]

    def embed(column: int) -> torch.Tensor:
        batch = tokenizer([row[column] for row in rows], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            return embeddings(model(**batch).last_hidden_state, batch["attention_mask"], "mean")

    similarities = (embed(0) * embed(1)).sum(1)
    expected = stats.spearmanr(similarities, [float(row[2]) for row in rows]).statistic
    assert result.value == pytest.approx(expected, abs=1e-3)
    with pytest.raises(permprune.PermpruneError, match="choose spearman, or pearson"):
        permprune.evaluate(str(encoder), permprune.Evaluation(str(pairs), metric="f1"))


def test_calibration_has_no_text_of_the_pairs_that_are_evaluated(encoder: Path, pairs: Path) -> None:
    with pairs.open("a") as file:  # texts of several pairs
        file.write("".join(f"\nthe order\tthe text {'of ' * number}\t1" for number in range(9)))
    model, tokenizer, _ = permprune.read_model(str(encoder))
    calibration, evaluation = (
        load_examples(str(pairs), model, tokenizer, part=part, count=200, shared=True)  # type: ignore[arg-type]
        for part in ("calibration", "evaluation")
    )
    assert overlap([calibration], evaluation) == 0 < min(len(calibration), len(evaluation))
    assert "labels" in evaluation and "labels" not in calibration


def test_a_score_that_is_no_number_is_named(encoder: Path, pairs: Path) -> None:
    pairs.write_text(pairs.read_text().replace("0.5", "similar", 1))
    with pytest.raises(permprune.PermpruneError, match=r"row 1 has 'similar'"):
        permprune.evaluate(str(encoder), permprune.Evaluation(str(pairs)))


def test_hidden_states_weigh_less_for_embeddings_than_for_images() -> None:
    assert 0 < Objective().for_training(Embedding()).hidden_states < Objective().for_training(Imitation()).hidden_states


def test_the_task_follows_from_the_model(encoder: Path) -> None:
    model, tokenizer, _ = permprune.read_model(str(encoder))
    batch = permprune.Examples({**tokenizer(SENTENCES[:4], padding=True, return_tensors="pt")})
    task = choose_task(model, batch, 2)
    assert isinstance(task, Embedding) and 0 < task.variance < 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_an_encoder_is_pruned_trained_packed_and_measured(
    mode: str, encoder: Path, texts: Path, pairs: Path, tmp_path: Path
) -> None:
    data = ["--calibration", str(texts), "--data", str(texts), "--samples", "4", "--windows", "2", "--length", "16"]
    pruned, trained, packed = (tmp_path / name for name in ("pruned", "trained", "packed"))
    method = ["--order", "newton:rounds=2", "--mode", mode]
    status, printed, error = run("prune", str(encoder), *data, *method, "--out", str(pruned))
    assert status == 0, error
    assert "cosine similarity" in printed
    measured = json.loads((pruned / "permprune.json").read_text())["measured"]
    assert measured["dense"] == pytest.approx(1.0) and measured["pruned"] < 1 - 1e-6
    assert [other["metric"] for other in measured["others"]] == NEIGHBOURS
    assert all(name in printed for name in NEIGHBOURS)
    assert all(other["dense"] == pytest.approx(1.0) for other in measured["others"])
    assert (pruned / "modules.json").exists() and (pruned / "1_Pooling" / "config.json").exists()
    options = ["--teacher", str(encoder), "--data", str(texts), "--epochs", "3", "--lr", "1e-4", "--length", "16"]
    status, printed, error = run("finetune", str(pruned), *options, "--out", str(trained))
    assert status == 0, error
    optimised = json.loads((trained / "permprune.json").read_text())["optimised"]
    assert optimised["metric"] == "cosine similarity" and optimised["after"] > optimised["before"]
    assert run("pack", str(trained), "--dtype", "fp32", "--out", str(packed))[0] == 0
    values = [permprune.evaluate(str(folder), permprune.Evaluation(str(pairs))).value for folder in (trained, packed)]
    assert values[0] == pytest.approx(values[1], abs=1e-3)
