"""Perplexity of a causal language model on windows of text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permprune import parallel
from permprune.calibrate import frozen
from permprune.errors import PermpruneError
from permprune.evaluate.result import Result
from permprune.progress import track
from permprune.resources import compute_device

CHUNK = 256
"""Tokens whose logits are held in fp32 at a time."""


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, batch: int = 4) -> Result:
    """exp of the mean negative log-likelihood of each window's tokens after the first.

    `windows` is int64 (count, length), length >= 2; each is predicted apart from the others, and all tokens
    weigh the same. The loss is taken in fp32. The standard error is the windows' by the delta method, ppl *
    std(window NLL) / sqrt(count), absent for one window. The model's mode is as before afterwards. Raises
    `PermpruneError` when a loss is not finite.
    """
    count, length = windows.shape
    device = compute_device(model)
    nll = torch.zeros(count, dtype=torch.float64)
    with frozen(model):
        for at in track(parallel.share(torch.arange(count).split(batch)), "perplexity"):
            ids = windows[at].to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            losses = [_loss(own[:-1], tokens[1:]) for own, tokens in zip(logits, ids, strict=True)]
            nll[at] = torch.tensor(losses, dtype=torch.float64)
    parallel.add_([nll])
    value = float(nll.mean().exp())
    if not torch.isfinite(torch.tensor(value)):
        window = int((~nll.isfinite()).int().argmax())
        raise PermpruneError(
            f"the loss on window {window} of the text is not finite: the weights or activations overflow"
        )
    stderr = value * float(nll.std()) / count**0.5 if count > 1 else None
    return Result("language modelling", "perplexity", value, count * (length - 1), stderr)


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy of (tokens, vocabulary) logits, summed in fp64 over chunks."""
    chunks = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    return sum(F.cross_entropy(own.float(), tokens, reduction="sum").item() for own, tokens in chunks) / len(targets)
