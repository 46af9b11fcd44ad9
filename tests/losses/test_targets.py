"""What a model is asked, against direct computations; and that padding counts in nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
)

from permprune.calibration.statistics import Statistics, calibrate
from permprune.config import PruneConfig
from permprune.engine.held import prepare
from permprune.errors import PermpruneError
from permprune.examples import Examples
from permprune.losses.objective import Objective
from permprune.losses.targets import (
    Embeddings,
    Features,
    Imitation,
    Predictions,
    Task,
    choose_task,
    labelled,
    next_token,
    scored,
)
from permprune.models.forward import Padding, padding_of, run_model
from permprune.models.layers import prunable_layers
from permprune.pattern import Pattern

from ..conversations import padded_answers
from ..fixtures import make_tiny_llama
from ..modalities import EXAMPLES, draw, images, make, scorer, sentences, speech


def alone(examples: Examples, number: int) -> Examples:
    """One sentence without its padding."""
    one = examples[number : number + 1]
    length = int(one["attention_mask"].sum())
    return Examples({name: one[name][:, :length] if one[name].dim() == 2 else one[name] for name in one})


def statistics(model: nn.Module, examples: Examples, task: Task, **settings: int) -> Statistics:
    layers = prunable_layers(model, Pattern(2, 4))
    sites = {layer.name: layer.name for layer in layers}
    return calibrate(model, layers, sites, examples, task, dtype=torch.float32, **settings)


@pytest.mark.parametrize(
    ("data", "task"), [("vit", labelled), ("bert", labelled), ("whisper", labelled), ("headless", Imitation)]
)
def test_the_task_follows_from_the_examples_and_the_model(data: str, task: type | Task) -> None:
    chosen = choose_task(make(data), EXAMPLES[data](), 4)
    assert isinstance(chosen, task) if isinstance(task, type) else chosen is task


def test_text_without_labels_is_for_models_that_write_it(tiny_llama: LlamaForCausalLM) -> None:
    ids = draw(64, 3, 8)
    assert choose_task(tiny_llama, Examples.of(ids), 4) is next_token
    assert choose_task(tiny_llama, Examples({"input_ids": ids, "labels": ids}), 4) is next_token
    assert choose_task(make("bert"), sentences(labels=False), 4) == Imitation()
    headless = choose_task(LlamaModel(tiny_llama.config).eval(), Examples.of(ids), 4)
    assert isinstance(headless, Imitation) and headless.variances and list(headless.variances) == ["last_hidden_state"]


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        ("vit", torch.zeros(12), "not classes"),
        ("vit", torch.full((12,), -100), "all labels"),
        ("whisper", None, "needs text: give the examples labels"),
    ],
)
def test_examples_that_cannot_be_asked_about_are_refused(data: str, labels: torch.Tensor | None, message: str) -> None:
    examples = EXAMPLES[data]()
    tensors = {name: examples[name] for name in examples if name != "labels"}
    examples = Examples(tensors if labels is None else {**tensors, "labels": labels})
    with pytest.raises(PermpruneError, match=message):
        choose_task(make(data), examples, 4)


@pytest.mark.slow
def test_scores_cost_their_squared_error_and_have_a_gaussian_fisher_information() -> None:
    model, labels = scorer(), torch.rand(12, generator=torch.Generator().manual_seed(0))
    data = Examples({**sentences(labels=False), "labels": labels})
    assert choose_task(model, data, 4) is scored
    said = scored(model, data)
    logits = model(**sentences(labels=False)).logits[:, 0]
    assert said.loss().item() == pytest.approx((logits - labels).square().sum().item(), rel=1e-5)
    assert said.distance(said.target()).item() == 0
    drawn = [torch.autograd.grad(scored(model, data).fisher_loss(torch.Generator().manual_seed(n)),
             model.classifier.bias)[0].item() ** 2 for n in range(400)]  # fmt: skip
    assert sum(drawn) / 400 == pytest.approx(2 * 12, rel=0.2)  # twice the squared slope of each score
    found = choose_task(model, sentences(labels=False), 4)
    assert isinstance(found, Imitation) and list(found.variances or {}) == ["logits"]


@torch.no_grad()
def test_scores_may_stand_in_a_column_and_are_not_rounded() -> None:
    model, data = scorer(), sentences(labels=False)
    labels = torch.rand(12, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        said, column = (scored(model, Examples({**data, "labels": given})) for given in (labels, labels[:, None]))
    assert float(said.loss()) == float(column.loss())
    for found in (said, column):
        assert found.labels is not None and torch.equal(found.labels[:, 0], labels)
    with pytest.raises(PermpruneError, match=r"labels of shape \(1, 2\) that are not classes"):
        choose_task(model, Examples({**data, "labels": labels[:, None].expand(12, 2)}), 4)


@pytest.mark.parametrize("labels", [torch.full((12,), 5), torch.zeros(12, 4, dtype=torch.long)])
def test_labels_of_another_shape_or_beyond_the_classes_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(PermpruneError, match="do not fit logits"):
        labelled(make("vit"), Examples({"pixel_values": images()["pixel_values"], "labels": labels}))


@pytest.mark.parametrize("data", ["vit", "bert", "whisper"])
@torch.no_grad()
def test_labels_cost_what_the_model_itself_says(data: str) -> None:
    model, examples = make(data), EXAMPLES[data]()
    said = labelled(model, examples)
    assert said.terms == int(examples["labels"].ne(-100).sum())
    assert float(said.loss()) / said.terms == pytest.approx(float(model(**examples).loss), rel=1e-5)


def bart_config() -> BartConfig:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartConfig(vocab_size=64, d_model=32, max_position_embeddings=32, num_labels=3, **layers, **heads)


@torch.no_grad()
def test_a_classifier_with_a_decoder_reads_its_own_input() -> None:
    model = BartForSequenceClassification(config := bart_config()).eval()
    ids = draw(50, 4, 9) + 5
    ids[:, -1] = config.eos_token_id
    examples = Examples({"input_ids": ids, "labels": draw(3, 4)})
    assert choose_task(model, examples, 2) is labelled
    assert float(labelled(model, examples).loss()) / 4 == pytest.approx(float(model(**examples).loss), rel=1e-5)


@torch.no_grad()
def test_next_tokens_behind_padding_do_not_count(tiny_llama: LlamaForCausalLM) -> None:
    examples = sentences(labels=False)
    said = next_token(tiny_llama, examples)
    apart = [next_token(tiny_llama, alone(examples, number)) for number in range(len(examples))]
    assert said.terms == sum(one.terms for one in apart) == int(examples["attention_mask"].sum()) - len(examples)
    assert float(said.loss()) == pytest.approx(sum(float(one.loss()) for one in apart), rel=1e-5)
    labels = examples["input_ids"].masked_fill(torch.arange(9) < 2, -100)
    fewer = next_token(tiny_llama, Examples({**examples, "labels": labels}))
    assert fewer.terms == said.terms - len(examples)


@torch.no_grad()
def test_tokens_of_answers_alone_count(tiny_llama: LlamaForCausalLM) -> None:
    examples, texts = padded_answers()
    other = make_tiny_llama()
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    loss, distance = 0.0, 0.0
    for text, first, last in texts:
        shares, target = (
            model(text[None]).logits[0, first - 1 : last - 1].log_softmax(1) for model in (tiny_llama, other)
        )
        loss -= float(shares[torch.arange(last - first), text[first:last]].sum())
        distance += float((target.exp() * (target - shares)).sum())
    said = next_token(tiny_llama, examples)
    assert said.terms == sum(last - first for _, first, last in texts)
    assert float(said.loss()) == pytest.approx(loss, rel=1e-5)
    assert float(said.distance(next_token(other, examples).target().float())) == pytest.approx(distance, rel=1e-2)


def test_statistics_of_answers_are_those_of_the_texts_without_padding(tiny_llama: LlamaForCausalLM) -> None:
    examples, texts = padded_answers()
    found = statistics(tiny_llama, examples, next_token, batch=2)
    apart = [statistics(tiny_llama, alone(examples, number), next_token) for number in range(len(examples))]
    lengths = [len(text) for text, *_ in texts]
    assert found.terms == sum(one.terms for one in apart) == sum(last - first for _, first, last in texts)
    for name, moments in found.moments.items():  # prompts are read, too
        expected = sum(n * one.moments[name] for n, one in zip(lengths, apart, strict=True)) / sum(lengths)
        torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-6)
    for name, fisher in found.fisher.items():
        expected = sum(one.terms * one.fisher[name] for one in apart) / found.terms
        torch.testing.assert_close(fisher, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("imitate", [False, True])
def test_statistics_are_those_of_the_sentences_without_padding(imitate: bool) -> None:
    model, examples = make("bert"), sentences(labels=not imitate)
    task: Task = labelled
    if imitate:
        task = Imitation({"last_hidden_state": 2.0})
        model = model.bert
    found = statistics(model, examples, task)
    apart = [statistics(model, alone(examples, number), task) for number in range(len(examples))]
    lengths = examples["attention_mask"].sum(1).tolist()
    for name, moments in found.moments.items():
        if ".self." in name:  # the pooled position of the last block has its own statistics elsewhere
            expected = sum(n * one.moments[name] for n, one in zip(lengths, apart, strict=True)) / sum(lengths)
            torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-6)
        if not imitate:
            mean = sum(one.fisher[name] for one in apart) / len(apart)
            torch.testing.assert_close(found.fisher[name], mean, rtol=1e-3, atol=1e-9)
    assert found.terms == len(examples)


def test_padding_counts_in_no_objective() -> None:
    every = Objective(1.0, 1.0, 1e-2, 0.0)
    losses = []
    for filler in (0, 7):
        examples = sentences()
        ids = examples["input_ids"].masked_fill(examples["attention_mask"] == 0, filler)
        examples = Examples({**examples, "input_ids": ids})
        prepared = prepare(make("bert"), None, PruneConfig(precision="fp32", measured=4, held_out=2), examples=examples)
        losses.append(prepared.network.loss(prepared.run.train, every))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@torch.no_grad()
def test_a_decoder_whose_text_is_as_long_as_its_encoders_keeps_the_two_apart() -> None:
    model, examples = make("whisper"), speech()
    short = Examples({**examples, "attention_mask": torch.ones(12, 7, dtype=torch.long)})
    seen: list[torch.Tensor | None] = []
    padding = padding_of(model, short)
    decoder = model.model.decoder.layers[0].fc1
    decoder.register_forward_hook(lambda _, args, __: seen.append(padding.mask_of(args[0])))
    model.forward = lambda attention_mask, use_cache, **inputs: type(model).forward(model, **inputs)  # takes no mask
    run_model(model, short)
    assert seen[0] is not None and int(seen[0].sum()) == int(examples["labels"].ne(-100).sum())
    assert labelled(model, short).terms == labelled(make("whisper"), examples).terms


@torch.no_grad()
@pytest.mark.parametrize("names", [("ids", "labels"), ("ids", "mask"), ("ids", "mask", "labels"), ("ids",)])
def test_texts_of_one_length_have_the_padding_of_the_encoder_and_of_the_decoder(names: tuple[str, ...]) -> None:
    model = BartForConditionalGeneration(bart_config()).eval()
    lengths = {"encoder": torch.tensor([7, 5, 3]), "decoder": torch.tensor([2, 7, 4] if len(names) > 1 else [7, 7, 7])}
    encoder, decoder = (torch.arange(7) < length[:, None] for length in lengths.values())
    ids = draw(50, 3, 7) + 5
    texts = {"ids": ids, "mask": decoder.long(), "labels": ids.masked_fill(~decoder, -100)}
    arguments = {"ids": "decoder_input_ids", "mask": "decoder_attention_mask", "labels": "labels"}
    given = {arguments[name]: texts[name] for name in names}
    batch = Examples({"input_ids": ids, "attention_mask": encoder.long(), **given})
    padding, seen = padding_of(model, batch), {}
    for part in lengths:
        layer = model.get_submodule(f"model.{part}.layers.0.fc1")
        layer.register_forward_hook(lambda _, args, __, part=part: seen.update({part: padding.mask_of(args[0])}))
    seen["logits"] = padding.mask_of(run_model(model, batch).logits)
    for part, expected in (("encoder", encoder), ("decoder", decoder), ("logits", decoder)):
        assert seen[part].sum(1).tolist() == expected.sum(1).tolist(), part


def test_masks_are_told_by_their_shapes() -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert Padding().mask_of(x) is None and Padding().real(x) is x
    padding = Padding.of(mask, None)
    assert torch.equal(padding.real(x), torch.stack([x[0, 0], x[0, 1], x[1, 0]]))
    assert torch.equal(padding.real(x.flatten(0, 1)), padding.real(x))
    assert padding.mask_of(torch.randn(3, 2, 4)) is None


@pytest.mark.slow
def test_labels_drawn_from_the_predictions_give_their_fisher_information() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 0.5]], requires_grad=True)
    squares, draws = torch.zeros(4), 4000
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        (slope,) = torch.autograd.grad(Predictions(logits).fisher_loss(generator), logits)
        squares += slope[0].square()
    p = logits.detach().softmax(-1)[0]
    torch.testing.assert_close(squares / draws, p * (1 - p), rtol=0.1, atol=0.005)


def test_random_signs_give_the_curvature_of_the_distance() -> None:
    x, weight = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True), draw(5, 6, 3).float()
    squares, draws = torch.zeros(3), 3000
    generator = torch.Generator().manual_seed(1)
    for _ in range(draws):
        (slope,) = torch.autograd.grad(Features((weight @ x)[None]).fisher_loss(generator), x)
        squares += slope.square()
    second = 2 * weight.square().sum(0)  # of |weight (x - dense)|^2
    torch.testing.assert_close(squares / draws, second, rtol=0.1, atol=0)


@pytest.mark.parametrize("data", ["bert", "headless"])
def test_statistics_without_labels_repeat_for_a_seed(data: str) -> None:
    model = make(data)
    examples = sentences(labels=False) if data == "bert" else images(labels=False)
    task = choose_task(model, examples, 4)
    one, same, other = (statistics(model, examples, task, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one.fisher[name], same.fisher[name]) for name in one.fisher)
    assert any(not torch.equal(one.fisher[name], other.fisher[name]) for name in one.fisher)
    assert all(torch.equal(one.moments[name], other.moments[name]) for name in one.moments)


@torch.no_grad()
def test_features_are_told_apart_by_their_variance() -> None:
    """A model that says the mean of all for each image is 1 away for each kind of feature."""
    model, examples = make("headless"), images(labels=False)
    task = choose_task(model, examples, 5)
    assert isinstance(task, Imitation) and task.variances is not None and len(task.variances) == 2
    said = task(model, examples).target()
    assert Features(said).distance(said) == 0
    pooled = said[:, :32]  # the first of the two kinds
    away = Features(pooled.mean(0).expand_as(pooled)).distance(pooled) / len(pooled)
    assert float(away) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("kind", [Predictions, Features, Embeddings])
def test_without_labels_the_distance_is_computed_once(
    kind: type[Predictions] | type[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, dense = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    losses, calls, distance = [], [], kind.distance
    own.requires_grad_(True)
    monkeypatch.setattr(kind, "distance", lambda *given: calls.append(1) or distance(*given))
    for weights in ({"task": 1.0, "divergence": 1.0}, {"task": 1.0, "divergence": 0.0}):
        loss = kind(own).weighted_loss(dense, **weights)
        losses.append((loss, *torch.autograd.grad(loss, own)))
    assert len(calls) == 2 and all(torch.equal(both, 2 * one) for both, one in zip(*losses, strict=True))


@torch.no_grad()
def test_predictions_are_compared_by_divergence() -> None:
    own, dense = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = F.kl_div(own.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True)
    assert float(Predictions(own).loss(Predictions(dense).target())) == pytest.approx(float(expected), rel=1e-2)
