"""What a model is asked about a batch, chosen by the names of the examples and by what the model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples
from permprune.losses.cross_entropy import cross_entropy
from permprune.models.forward import decodes, padding_of, run_model, writes
from permprune.models.padding import Padding
from permprune.system import distributed
from permprune.system.device import compute_device

FEATURES = ("image_embeds", "text_embeds", "pooler_output", "last_hidden_state")
"""What a model without a head is known by, of whatever it returns."""

SCORES = "logits"
"""What a model of scores returns, one for each example."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of a batch: `logits` (terms, classes) with their graph, and the right `labels` (terms,).

    Without labels the dense model's predictions are right.
    """

    logits: Tensor
    labels: Tensor | None = None

    @property
    def terms(self) -> int:
        return len(self.logits)

    def loss(self, dense: Tensor | None = None) -> Tensor:
        """Cross-entropy, or without labels the distance to what `kept` gave of the dense model; summed over terms."""
        if self.labels is not None:
            return cross_entropy(self.logits, self.labels)
        return self.distance(dense)

    def kept(self) -> Tensor:
        """What `distance` needs of the dense model: log-probabilities (terms, classes), fp16 on the CPU."""
        return self.logits.float().log_softmax(-1).half().cpu()

    def distance(self, dense: Tensor | None) -> Tensor:
        """KL divergence from the dense model's predictions, summed over the terms."""
        assert dense is not None
        target = dense.to(self.logits.device).float().log_softmax(-1)  # mends the rounding
        return F.kl_div(self.logits.float().log_softmax(-1), target, reduction="sum", log_target=True)

    def fisher_loss(self, generator: torch.Generator) -> Tensor:
        """A loss whose squared gradients are in the mean the diagonal of the Fisher information, summed over terms.

        That is the cross-entropy of the labels, or without them of labels drawn from the predictions themselves.
        """
        if self.labels is not None:
            return self.loss()
        bounds = self.logits.detach().float().softmax(-1).cumsum(-1)
        drawn = torch.rand(self.terms, 1, generator=generator).to(bounds) * bounds[:, -1:]
        labels = (bounds < drawn).sum(-1).clamp_max(bounds.shape[-1] - 1)
        return cross_entropy(self.logits, labels)


@dataclass(frozen=True)
class Features:
    """What a model without a head, or one of scores, says of a batch: `values` (terms, numbers) with their graph.

    A term is an example. Features are scaled so that the squares of an example's numbers add up to about 1 for each
    kind of feature. Scores have the right ones as `labels` (terms, 1); without labels the dense model is right.
    """

    values: Tensor
    labels: Tensor | None = None

    @property
    def terms(self) -> int:
        return len(self.values)

    def loss(self, dense: Tensor | None = None) -> Tensor:
        """The squared distance to the labels, or without them to what `kept` gave of the dense model."""
        return self.distance(dense if self.labels is None else self.labels)

    def kept(self) -> Tensor:
        """What `distance` needs of the dense model: the values (terms, numbers), fp32 on the CPU."""
        return self.values.float().cpu()

    def distance(self, dense: Tensor | None) -> Tensor:
        """Squared distance to the dense model's values, summed over the terms."""
        assert dense is not None
        return (self.values - dense.to(self.values)).square().sum()

    def fisher_loss(self, generator: torch.Generator) -> Tensor:
        """A random projection whose squared gradients are in the mean the Gauss-Newton diagonal of the distance."""
        signs = torch.randint(2, self.values.shape, generator=generator).to(self.values) * 2 - 1
        return 2**0.5 * (signs * self.values).sum()


Task = Callable[[nn.Module, Examples], Predictions | Features]
"""(model, batch) -> what it says of it."""


def next_token(model: nn.Module, batch: Examples) -> Predictions:
    """Each next token of "input_ids" (batch, length), or of "labels" where only some count; padding does not."""
    labels = next_labels(batch)
    logits = run_model(model, batch).logits[:, :-1]
    if batch.keys() == ["input_ids"]:
        return Predictions(logits.flatten(0, 1), labels.flatten())
    counted = labels != IGNORED
    return Predictions(logits[counted], labels[counted])


def next_labels(batch: Examples) -> Tensor:
    """The tokens that follow each but the last, (batch, length - 1); `IGNORED` where one does not count."""
    labels = (batch["labels"] if "labels" in batch else batch["input_ids"])[:, 1:]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), IGNORED)


def labelled(model: nn.Module, batch: Examples) -> Predictions:
    """The class of each example, "labels" (batch,), or of each position, (batch, length), such as a decoder's tokens.

    Raises `PermpruneError` where the logits are of another shape, or of fewer classes.
    """
    labels = batch["labels"]
    logits = run_model(model, batch).logits
    if decodes(model) and labels.dim() == 2:
        logits = logits[:, : labels.shape[1]]
    if logits.shape[:-1] != labels.shape or int(labels.max()) >= logits.shape[-1]:
        raise PermpruneError(
            f"labels up to {int(labels.max())} of shape {tuple(labels.shape)} do not go with logits of shape "
            f"{tuple(logits.shape)}: give labels that the model knows, or none"
        )
    counted = labels != IGNORED
    return Predictions(logits[counted], labels[counted])


def scored(model: nn.Module, batch: Examples) -> Features:
    """The score of each example, whose right ones are "labels" (batch,), real numbers.

    Raises `PermpruneError` where the model gives classes.
    """
    labels = batch["labels"]
    logits = run_model(model, batch).logits
    if logits.shape != (len(labels), 1):
        raise PermpruneError(
            f"labels that are no classes, and logits of shape {tuple(logits.shape)}: give class numbers, or no labels"
        )
    return Features(logits.float(), labels[:, None].to(logits))


@dataclass(frozen=True)
class Imitation:
    """What the dense model says is right: its logits, or, of a model without a head or of scores, its features.

    `variances`, of such a model, are those of the features that are imitated, by name, each summed over the
    channels: how far apart the dense model's features of the calibration examples are.
    """

    variances: Mapping[str, float] | None = None

    def __call__(self, model: nn.Module, batch: Examples) -> Predictions | Features:
        """Logits of every example or position that is no padding; or features of every example."""
        output, padding = run_model(model, batch), padding_of(model, batch)
        if self.variances is None:
            return Predictions(padding.real(output.logits).flatten(0, -2))
        return Features(torch.cat([_scaled(output[name], v, padding) for name, v in self.variances.items()], 1))

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, examples: Examples, batch: int) -> Imitation:
        """The imitation that suits what a dense model returns for these examples, `batch` at a time.

        Raises `PermpruneError` where it returns neither logits nor features.
        """
        device = compute_device(model)
        first = run_model(model, examples[:1].to(device))
        logits = getattr(first, "logits", None)
        if logits is not None and logits.dim() in (2, 3) and logits.shape[-1] > 1:
            return cls()
        known = FEATURES if logits is None else (SCORES,) if logits.shape[-1] == 1 else ()
        names = [name for name in known if getattr(first, name, None) is not None]
        if not names:
            raise PermpruneError("the model returns neither logits of classes nor features: give examples with labels")
        sums = {name: _Sums(first[name].shape[-1]) for name in names}
        for part in distributed.share(examples.split(batch)):
            own = part.to(device)
            output, padding = run_model(model, own), padding_of(model, own)
            for name in names:
                sums[name].add(padding.real(output[name]))
        return cls({name: found.variance() for name, found in sums.items()})


class _Sums:
    """Sums over the positions of features, from which their variance comes."""

    def __init__(self, channels: int) -> None:
        self.count, self.square, self.total = 0.0, 0.0, torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        rows = x.flatten(0, -2).double()
        self.count += len(rows)
        self.square += float(rows.square().sum())
        self.total += rows.sum(0).cpu()

    def variance(self) -> float:
        """Summed over the channels; the mean square where the features are all alike, as those of one example are."""
        distributed.add_([self.total])
        count, square = distributed.total(self.count, self.square)
        energy = square / count
        variance = energy - float((self.total / count).square().sum())
        return variance if variance > 1e-6 * energy else energy


def _scaled(x: Tensor, variance: float, padding: Padding) -> Tensor:
    """Features (batch, channels) or (batch, positions, channels), an example a row, by variance and positions.

    Padding is 0.
    """
    mask = padding.mask_of(x)
    values = x.float().flatten(1, -2) if x.dim() > 2 else x.float()[:, None]
    weight = values.new_ones(values.shape[:2]) if mask is None else mask.to(values)
    scale = (weight / weight.sum(1, keepdim=True) / max(variance, 1e-30)).sqrt()
    return (values * scale[..., None]).flatten(1)


def choose_task(model: nn.Module, examples: Examples, batch: int) -> Task:
    """What a dense model is to be asked about such examples, `batch` at a time.

    Labels are right where there are any, classes or scores; the next token in a text for a model that writes text; and
    otherwise what the dense model says itself. Raises `PermpruneError` for examples that the model cannot be asked
    about.
    """
    labels = examples.get("labels")
    if labels is None:
        return next_token if writes(model) and "input_ids" in examples else Imitation.of(model, examples, batch)
    if labels.is_floating_point():
        scored(model, examples[:1].to(compute_device(model)))
        return scored
    if not labels.ne(IGNORED).any():
        raise PermpruneError(f"all labels of the measured examples are {IGNORED}: give some that count, or none")
    return next_token if writes(model) and labels.dim() == 2 else labelled
