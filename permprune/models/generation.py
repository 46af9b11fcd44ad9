"""Decoder inputs for examples that have no text: the text that the dense model generates for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from permprune.examples import Examples
from permprune.models.forward import frozen, is_encoder_decoder, typed_inputs
from permprune.system import distributed
from permprune.system.device import compute_device
from permprune.system.progress import track
from permprune.system.search_state import Journal

LENGTH = 128
"""Maximum number of generated tokens; 30 seconds of speech have about 100."""

SOUNDS = 8
"""Examples whose texts are generated together: each step reads the decoder's weights once for all of them."""

BEGUN = 11
"""Tokens of `with_begun_text`."""

PROMPT = 4
"""Positions reserved for the tokens with which a decoder starts."""

POSITIONS = ("max_target_positions", "max_decoder_position_embeddings", "max_position_embeddings")
"""Entries of configs with the number of a decoder's positions."""


def needs_decoder_inputs(model: nn.Module, examples: Examples) -> bool:
    """Whether the model is a generative encoder-decoder model and the examples have no input for its decoder."""
    generates = is_encoder_decoder(model) and getattr(model, "can_generate", bool)()
    return generates and not {"labels", "decoder_input_ids"} & set(examples)


def with_begun_text(model: nn.Module, examples: Examples) -> Examples:
    """Return examples whose decoder, if they have no input for it, reads start tokens: enough to trace a model."""
    if not needs_decoder_inputs(model, examples):
        return examples
    config: Any = model.config
    ids = torch.full((len(examples), BEGUN), config.decoder_start_token_id)
    return examples.with_tensors({"decoder_input_ids": ids})


@torch.no_grad()
def with_decoder_inputs(
    model: nn.Module, examples: Examples, journal: Journal | None = None, name: str = ""
) -> Examples:
    """Add the text that the model generates (greedy search) for each example as its decoder input.

    Returns the examples with "decoder_input_ids" (count, length) and "decoder_attention_mask", which is 0 after the end
    of a text. The work is shared between the processes. Texts in the `journal`, by `name` and place, are not generated
    again, and others are added to it.
    """
    device, texts = compute_device(model), {} if journal is None else dict(journal.tensors)
    made: dict[str, Tensor] = {}
    with frozen(model):
        places = distributed.share(torch.arange(len(examples)).split(SOUNDS))
        for batch in track(places, "transcribing"):
            keys = [f"{name}{place}" for place in batch.tolist()]
            if not texts.keys() >= set(keys):
                written = generate(model, examples[batch].to(device), LENGTH).cpu()
                texts |= (new := dict(zip(keys, written, strict=True)))
                if journal is not None:
                    journal.add(new)
            made |= {key: texts[key] for key in keys}
    merged = distributed.merge(made)
    config: Any = model.config
    generation: Any = model.generation_config
    padded = torch.nn.utils.rnn.pad_sequence(
        [merged[f"{name}{place}"] for place in range(len(examples))], True, config.pad_token_id or 0
    )
    start = torch.full((len(padded), 1), config.decoder_start_token_id)
    ids = padded if torch.equal(padded[:, :1], start) else torch.cat([start, padded], 1)
    ends = [] if generation.eos_token_id is None else generation.eos_token_id
    ended = torch.isin(ids[:, 1:], torch.tensor(ends, dtype=ids.dtype)).cumsum(1).bool()
    mask = torch.cat([torch.ones_like(start), (~ended).long()], 1)
    return examples.with_tensors({"decoder_input_ids": ids, "decoder_attention_mask": mask})


def decoder_positions(model: nn.Module) -> int | None:
    """Return the number of positions of a model's decoder; None without a decoder, or if the config does not tell."""
    if not is_encoder_decoder(model):
        return None
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    return next((getattr(decoder, name) for name in POSITIONS if hasattr(decoder, name)), None)


def generate(model: Any, batch: Examples, length: int, *, at_least: int = 0) -> Tensor:
    """Generate `at_least` to `length` tokens for a batch with an encoder-decoder model and greedy search.

    The number of the decoder's positions bounds both. Returns padded token ids, int64 (batch, length).
    """
    room = (decoder_positions(model) or length + PROMPT) - PROMPT
    inputs = {name: batch[name] for name in batch if name != "labels" and not name.startswith("decoder_")}
    least = {"min_new_tokens": min(at_least, room)} if at_least else {}
    ids: Tensor = model.generate(
        **typed_inputs(model, inputs), max_new_tokens=min(length, room), do_sample=False, num_beams=1, **least
    )
    return ids
