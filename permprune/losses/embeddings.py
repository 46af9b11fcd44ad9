"""The task of a sentence encoder: the dense model's embeddings, and the similarities between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permprune.examples import Examples, batches, by_length
from permprune.losses.cross_entropy import Logits
from permprune.losses.targets import Features, Imitation, Sums
from permprune.models.forward import run_model
from permprune.models.modality import embeddings
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import track


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
