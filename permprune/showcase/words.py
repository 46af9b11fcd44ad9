"""Words that a masked language model fills in."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permprune.examples import Examples
from permprune.models.forward import frozen, run_model
from permprune.showcase.base import NotShown, Showing, shortened, spread
from permprune.system.device import compute_device

CONTEXT = 12
"""The tokens on either side of a masked one that are shown and read."""


class Words(Showing):
    """The likeliest token in the place of a masked one of each of several windows of text, int64 (windows, tokens)."""

    kind = "words"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, count: int) -> None:
        mask = tokenizer.mask_token_id
        if mask is None:
            raise NotShown("the tokenizer has no token that stands for a masked one")
        places = spread(len(windows), count)
        middle = windows.shape[1] // 2
        start, end = max(0, middle - CONTEXT), min(windows.shape[1], middle + CONTEXT + 1)
        self.model, self.tokenizer, self.place = model, tokenizer, middle - start
        cut = windows[places, start:end].clone()
        expected = [self._word(ids) for ids in cut[:, self.place]]
        cut[:, self.place] = mask
        given = [shortened(" ".join(str(tokenizer.decode(part)) for part in (ids[: self.place], ids[self.place :])))
                 for ids in cut]  # fmt: skip
        super().__init__(given, f"The likeliest token in the place of {tokenizer.mask_token}.", expected)
        self.ids = cut

    @torch.inference_mode()
    def __call__(self) -> list[str]:
        device = compute_device(self.model)
        with frozen(self.model):
            logits: Tensor = run_model(self.model, Examples({"input_ids": self.ids}).to(device)).logits
        return [self._word(ids) for ids in logits[:, self.place].argmax(-1)]

    def _word(self, token: Tensor) -> str:
        return str(self.tokenizer.decode([int(token)])).strip()
