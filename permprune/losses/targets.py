"""Tasks: what a model predicts for a batch, the targets of its predictions, and the choice of the task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permprune.errors import PermpruneError
from permprune.examples import IGNORED, Examples, batches, by_length
from permprune.losses.cross_entropy import (
    Logits,
    Projected,
    compute_logits,
    cross_entropy,
    distilled_cross_entropy,
    divergence,
)
from permprune.models.forward import Padding, is_causal_lm, is_ctc, is_encoder_decoder, padding_of, run_model
from permprune.models.modality import embeddings, pooling_of
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import track

FEATURES = ("image_embeds", "text_embeds", "pooler_output", "last_hidden_state")
"""Outputs that serve as the features of a model without a head, as far as it returns them."""

SCORES = "logits"
"""The output of a regression model: one score for each example."""


class Outputs(ABC):
    """A model's outputs for a batch, with their graph. Without labels the dense model's outputs are the targets.

    Losses are summed over the terms. `dense` is what `target` or `lazy_target` returned for the dense model's outputs.
    """

    labels: Tensor | None

    @property
    @abstractmethod
    def terms(self) -> int:
        """The number of terms of the loss."""

    @abstractmethod
    def loss(self, dense: Logits | None = None) -> Tensor:
        """The loss of the labels, or without labels the distance to `dense`."""

    @abstractmethod
    def distance(self, dense: Logits | None) -> Tensor:
        """The distance to the dense model's outputs."""

    @abstractmethod
    def target(self) -> Tensor:
        """The target for `distance`, if these are the dense model's outputs, on the CPU."""

    def lazy_target(self) -> Logits:
        """As `target`, but valid only as long as the dense model's output layer does not change."""
        return self.target()

    def weighted_loss(self, dense: Logits | None, *, task: float, divergence: float) -> Tensor:
        """The sum of `loss` and `distance` with these weights, of which one may be 0."""
        if self.labels is None:
            return (task + divergence) * self.distance(dense)
        if not divergence:
            return task * self.loss(dense)
        distance = divergence * self.distance(dense)
        return task * self.loss(dense) + distance if task else distance

    @abstractmethod
    def fisher_loss(self, generator: torch.Generator) -> Tensor:
        """A loss whose expected squared gradient is the diagonal of the Fisher information."""


@dataclass(frozen=True)
class Predictions(Outputs):
    """Class predictions: logits (terms, classes), and the target `labels` (terms,).

    `given` are the logits, or what they are projected from. The loss is the cross-entropy with the labels, the distance
    the KL divergence from the dense model's predictions.
    """

    given: Logits
    labels: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The logits (terms, classes)."""
        return self.given.whole() if isinstance(self.given, Projected) else self.given

    @property
    def terms(self) -> int:
        return len(self.given)

    def loss(self, dense: Logits | None = None) -> Tensor:
        return self.distance(dense) if self.labels is None else cross_entropy(self.given, self.labels)

    def distance(self, dense: Logits | None) -> Tensor:
        assert dense is not None
        return divergence(self.given, dense.to(self._device))

    def target(self) -> Tensor:
        """The logits if they have 16 bits, else the log-probabilities in fp16, (terms, classes)."""
        logits = self.logits.detach()
        return (logits if logits.dtype.itemsize == 2 else logits.float().log_softmax(-1).half()).cpu()

    def lazy_target(self) -> Logits:
        """Of projected logits what they are projected from, which is valid as long as the output layer is the same."""
        return self.given.detach().to(torch.device("cpu")) if isinstance(self.given, Projected) else self.target()

    def weighted_loss(self, dense: Logits | None, *, task: float, divergence: float) -> Tensor:
        if self.labels is None or dense is None or not (task and divergence):
            return super().weighted_loss(dense, task=task, divergence=divergence)
        weights = {"label_weight": task, "divergence_weight": divergence}
        return distilled_cross_entropy(self.given, self.labels, dense.to(self._device), **weights)

    def fisher_loss(self, generator: torch.Generator) -> Tensor:
        """The cross-entropy with the labels, or without labels with labels drawn from the predicted distribution."""
        if self.labels is not None:
            return self.loss()
        bounds = self.logits.detach().float().softmax(-1).cumsum(-1)
        drawn = torch.rand(self.terms, 1, generator=generator).to(bounds) * bounds[:, -1:]
        labels = (bounds < drawn).sum(-1).clamp_max(bounds.shape[-1] - 1)
        return cross_entropy(self.given, labels)

    @property
    def _device(self) -> torch.device:
        return (self.given.hidden if isinstance(self.given, Projected) else self.given).device


@dataclass(frozen=True)
class Features(Outputs):
    """The features of a model without a head, or the scores of a regression model.

    `values` is (terms, numbers); a term is an example. Features are scaled so that the squares of an example's numbers
    sum to about 1 for each kind of feature. `labels`, (terms, 1), are the target scores. The loss and the distance are
    squared distances.
    """

    values: Tensor
    labels: Tensor | None = None

    @property
    def terms(self) -> int:
        return len(self.values)

    def loss(self, dense: Logits | None = None) -> Tensor:
        return self.distance(dense if self.labels is None else self.labels)

    def distance(self, dense: Logits | None) -> Tensor:
        assert isinstance(dense, Tensor)
        return (self.values - dense.to(self.values)).square().sum()

    def target(self) -> Tensor:
        """The values (terms, numbers), fp32."""
        return self.values.float().cpu()

    def fisher_loss(self, generator: torch.Generator) -> Tensor:
        """A random projection whose expected squared gradient is the Gauss-Newton diagonal of the distance."""
        signs = torch.randint(2, self.values.shape, generator=generator).to(self.values) * 2 - 1
        return 2**0.5 * (signs * self.values).sum()


Task = Callable[[nn.Module, Examples], Outputs]
"""(model, batch) -> the model's predictions or features for the batch."""


def next_token(model: nn.Module, batch: Examples) -> Predictions:
    """Predict each next token of "input_ids" (batch, length), or of "labels" if there are any.

    Padding and labels of `IGNORED` are left out.
    """
    labels = next_labels(batch)
    logits = compute_logits(model, batch)[:, :-1]
    if batch.keys() == ["input_ids"]:
        return Predictions(logits.flatten(0, 1), labels.flatten())
    counted = labels != IGNORED
    return Predictions(logits[counted], labels[counted])


def next_labels(batch: Examples) -> Tensor:
    """Return the next token of every position but the last, (batch, length - 1); `IGNORED` if it is left out."""
    labels = (batch["labels"] if "labels" in batch else batch["input_ids"])[:, 1:]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), IGNORED)


def labelled(model: nn.Module, batch: Examples) -> Predictions:
    """Predict the class of each example, "labels" (batch,), or of each position, (batch, length).

    The positions are, for instance, a decoder's tokens. Raises `PermpruneError` if the logits have another shape than
    the labels, or fewer classes.
    """
    labels = batch["labels"]
    logits = run_model(model, batch).logits
    if is_encoder_decoder(model) and labels.dim() == 2:
        logits = logits[:, : labels.shape[1]]
    if logits.shape[:-1] != labels.shape or int(labels.max()) >= logits.shape[-1]:
        raise PermpruneError(
            f"labels up to {int(labels.max())} of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}: give labels that the model knows, or none"
        )
    counted = labels != IGNORED
    return Predictions(logits[counted], labels[counted])


def scored(model: nn.Module, batch: Examples) -> Features:
    """Predict the score of each example; the target scores are "labels" (batch,) or (batch, 1), of a floating type.

    Raises `PermpruneError` unless there is one number for each example of both.
    """
    labels = batch["labels"]
    logits = run_model(model, batch).logits
    if logits.shape != (len(labels), 1) or labels.numel() != len(labels):
        raise PermpruneError(
            f"labels of shape {tuple(labels.shape)} that are not classes, but logits of shape {tuple(logits.shape)}: "
            "give a score for each example, class numbers, or no labels"
        )
    return Features(logits.float(), labels.reshape(-1, 1).to(logits.device, torch.float32))


@dataclass(frozen=True)
class Imitation:
    """The task of reproducing the dense model's outputs, for examples without labels.

    For a model of classes these are its logits, and `variances` is None. Otherwise they are the features of a model
    without a head, or the scores of a regression model. `variances` then maps the name of each output to its variance
    over the calibration examples in the dense model, summed over the channels, by which squared distances are divided.
    """

    variances: Mapping[str, float] | None = None

    def __call__(self, model: nn.Module, batch: Examples) -> Outputs:
        """Return the logits of every example or position that is not padding, or the features of every example."""
        output, padding = run_model(model, batch), padding_of(model, batch)
        if self.variances is None:
            return Predictions(padding.real(output.logits).flatten(0, -2))
        return Features(torch.cat([_scaled(output[name], v, padding) for name, v in self.variances.items()], 1))

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, examples: Examples, batch: int) -> Imitation:
        """Return the imitation for the outputs of a dense model, which runs on `batch` of the examples at a time.

        Raises `PermpruneError` if it returns neither logits of classes nor features.
        """
        device = compute_device(model)
        first = run_model(model, examples[:1].to(device))
        logits = getattr(first, "logits", None)
        if logits is not None and logits.dim() in (2, 3) and logits.shape[-1] > 1:
            return cls()
        outputs = FEATURES if logits is None else (SCORES,) if logits.shape[-1] == 1 else ()
        names = [name for name in outputs if getattr(first, name, None) is not None]
        if not names:
            raise PermpruneError("the model returns neither logits of classes nor features: give examples with labels")
        sums = {name: Sums(first[name].shape[-1]) for name in names}
        for share in distributed.share(examples.split(batch)):
            shown = share.to(device)
            output, padding = run_model(model, shown), padding_of(model, shown)
            for name in names:
                sums[name].add(padding.real(output[name]))
        return cls({name: total.variance() for name, total in sums.items()})


class Sums:
    """Accumulates the variance of features over positions."""

    def __init__(self, channels: int) -> None:
        self.count, self.square, self.total = 0.0, 0.0, torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add features (..., channels)."""
        rows = x.flatten(0, -2).double()
        self.count += len(rows)
        self.square += float(rows.square().sum())
        self.total += rows.sum(0).cpu()

    def variance(self) -> float:
        """The variance over all positions and ranks, summed over the channels.

        If the features are all equal, as those of a single example can be, this is their mean square.
        """
        distributed.add_([self.total])
        count, square = distributed.total(self.count, self.square)
        energy = square / count
        variance = energy - float((self.total / count).square().sum())
        return variance if variance > 1e-6 * energy else energy


def _scaled(x: Tensor, variance: float, padding: Padding) -> Tensor:
    """Flatten features (batch, channels) or (batch, positions, channels) to (batch, numbers), and scale them.

    Values are divided by the square roots of the variance and of the example's number of positions. Padding becomes 0.
    """
    mask = padding.mask_of(x)
    values = x.float().flatten(1, -2) if x.dim() > 2 else x.float()[:, None]
    weight = values.new_ones(values.shape[:2]) if mask is None else mask.to(values)
    scale = (weight / weight.sum(1, keepdim=True) / max(variance, 1e-30)).sqrt()
    return (values * scale[..., None]).flatten(1)


@dataclass(frozen=True)
class Embeddings(Features):
    """Embeddings of a batch of texts, (texts, channels), divided by the root of their variance.

    The distance of unit vectors is twice one minus their cosine, so that `distance` compares cosines with the dense
    model's embeddings. It also compares the similarities of all pairs of a batch (Reimers and Gurevych 2020, arXiv
    2004.09813, distil embeddings; relational distillation, Park et al. 2019, arXiv 1904.05068, their pairs).
    """

    def distance(self, dense: Logits | None) -> Tensor:
        """Squared distance to the dense embeddings and, for each text, of its similarities within the batch."""
        assert isinstance(dense, Tensor)
        target = dense.to(self.values)
        similarities = self.values @ self.values.T - target @ target.T
        return super().distance(dense) + similarities.square().sum() / len(target)


@dataclass(frozen=True)
class Embedding(Imitation):
    """The task of reproducing the dense model's embeddings of texts.

    `pooling` is that of the model (`POOLINGS`); `variance` that of the dense embeddings, summed over the channels.
    """

    pooling: str = "mean"
    variance: float = 1.0

    def __call__(self, model: nn.Module, batch: Examples) -> Embeddings:
        return Embeddings(self.embed(model, batch) / self.variance**0.5)

    def embed(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the embeddings of a batch, of length 1, fp32 (texts, channels)."""
        return embeddings(run_model(model, batch).last_hidden_state, batch.get("attention_mask"), self.pooling)

    @classmethod
    @torch.no_grad()
    def of_pooling(cls, pooling: str, model: nn.Module, examples: Examples, batch: int) -> Embedding:
        """Return the task for the embeddings of a dense model, which runs on `batch` of the examples at a time."""
        task, device = cls(pooling=pooling), compute_device(model)
        parts = [task.embed(model, part.to(device)) for part in distributed.share(batches(examples, batch))]
        sums = Sums(task.embed(model, examples[:1].to(device)).shape[1])
        for part in parts:
            sums.add(part)
        return cls(pooling=pooling, variance=sums.variance())


@torch.inference_mode()
def embed_all(model: nn.Module, examples: Examples, pooling: str, batch: int) -> Tensor:
    """Return the embeddings of all examples in their order, of length 1, fp32 (examples, channels) on the CPU."""
    task, device, order = Embedding(pooling=pooling), compute_device(model), by_length(examples, batch)
    parts = [task.embed(model, examples[places].trimmed().to(device)).cpu() for places in track(order, "embedding")]
    values = torch.empty(len(examples), parts[0].shape[1])
    values[torch.cat(order)] = torch.cat(parts)
    return values


def choose_task(model: nn.Module, examples: Examples, batch: int) -> Task:
    """Choose the task for examples; the dense model may run on `batch` of them at a time.

    A sentence encoder reproduces the dense model's embeddings. For other models labels, if there are any, are targets:
    classes or scores. Otherwise a causal language model predicts the next token of text, and any other model reproduces
    the dense model's outputs (`Imitation`), as do models of CTC, whose transcripts give no frame a label. Raises
    `PermpruneError` if the model and the examples do not fit any task.
    """
    labels = examples.get("labels")
    if pooling := pooling_of(model):  # type: ignore[arg-type]
        return Embedding.of_pooling(pooling, model, examples, batch)
    if labels is None or is_ctc(model):
        return next_token if is_causal_lm(model) and "input_ids" in examples else Imitation.of(model, examples, batch)
    if labels.is_floating_point():
        scored(model, examples[:1].to(compute_device(model)))
        return scored
    if not labels.ne(IGNORED).any():
        raise PermpruneError(f"all labels of the measured examples are {IGNORED}: give some that count, or none")
    return next_token if is_causal_lm(model) and labels.dim() == 2 else labelled
