"""Discovery on real architectures: what it finds may be permuted, and every member of it is needed."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch

from permprune.coupling.discovery import discover
from permprune.coupling.fold import fold, fold_all, verify_space
from permprune.coupling.space import ChannelSpace

from .coupling_models import FAMILIES, randomised
from .supported import PAGE, SHOWN, census, difference, families, frozen, movable, outputs, random_tables

pytestmark = pytest.mark.slow

SPACES = {
    # d_ff, head channels, heads, residual
    "llama": (2, 2, 4, 1),
    "llama, tied embeddings": (2, 2, 4, 1),
    "llama, multi-head": (2, 2, 2, 1),
    "llama, multi-query": (2, 2, 2, 1),
    "llama, biases": (2, 2, 4, 1),
    "llama, eager attention": (2, 2, 4, 1),
    "mistral": (2, 2, 4, 1),
    "qwen2": (2, 2, 4, 1),
    "qwen3": (2, 2, 4, 1),
    "gemma3": (2, 2, 4, 1),
    "phi3": (2, 2, 4, 1),
    "gpt2": (2, 2, 2, 1),
    "gpt-neox": (2, 2, 2, 1),
    "opt": (2, 2, 2, 1),
    "falcon, multi-query": (2, 2, 2, 1),
    "falcon, grouped": (2, 2, 4, 1),
    "bloom": (2, 2, 0, 1),  # each head has its own slope
    "mixtral": (2, 2, 4, 1),
    "qwen3-moe": (2, 2, 4, 1),
    "gpt-oss": (2, 2, 4, 1),
    "deepseek-v3": (7, 2, 2, 1),  # the latents of queries and of keys and values; the shared expert
    "qwen2.5-vl, text alone": (2, 2, 4, 1),
    "bert": (2, 2, 2, 0),  # the hidden states are its output
    "bert, classifier": (3, 2, 2, 1),  # the pooler's width too
    "roberta": (2, 2, 2, 1),
    "distilbert": (2, 2, 2, 1),
    "mpnet": (2, 2, 1, 1),  # one position bias for the heads of all layers
    "albert": (1, 1, 1, 2),  # one layer for all; the embeddings have a width of their own
    "deberta-v2": (3, 2, 2, 1),
    "modernbert": (2, 2, 2, 1),
    "t5": (2, 3, 3, 1),
    "bart": (2, 3, 3, 1),
    "marian": (2, 3, 3, 0),  # the sinusoids are not stored
    "vit": (2, 2, 2, 1),
    "deit": (2, 2, 2, 1),
    "dinov2": (2, 2, 2, 1),
    "dinov2, swiglu": (2, 2, 2, 1),
    "swin": (4, 4, 4, 2),  # a stream for each stage
    "segformer": (3, 2, 2, 2),
    "clip": (4, 4, 4, 2),
    "siglip": (5, 5, 5, 2),  # a head that pools by attention
    "llava": (5, 4, 6, 2),  # the projector's width too
    "paligemma": (4, 4, 6, 2),
    "llava-onevision, images of two sizes": (5, 4, 6, 2),
    "qwen2.5-vl, images of two sizes": (5, 4, 6, 2),
    "qwen3-vl, images of two sizes": (6, 4, 6, 2),  # a second merger, into the first layer of the language model
    "idefics3, images of two sizes": (4, 4, 6, 2),
    "smolvlm, images of two sizes": (4, 4, 6, 2),
    "whisper": (2, 3, 3, 2),
    "wav2vec2": (3, 2, 2, 2),  # the ears' width too; the stream moves by groups and within them
    "wav2vec2, pre-norm": (3, 2, 2, 2),
    "timm vit": (2, 2, 2, 1),
}

FROZEN = {
    "bloom": ["transformer.h.heads: input or constant read by pow"],
    "bert": ["residual: the model returns it"],
    "marian": ["model.residual: checkpoints do not store model.decoder.embed_positions.weight"],
    "siglip": ["vision_model.head.mlp.fc1.input: the model returns it"],
    # the places of the patches that are merged into one
    "qwen2.5-vl, images of two sizes": ["model.visual.merger.mlp.heads: input or constant read by mul"],
    "qwen3-vl, images of two sizes": ["model.visual.heads: input or constant read by mul"],
    "idefics3, images of two sizes": [
        "model.connector.modality_projection.heads: order matters to conv2d",
        "model.connector.modality_projection.heads.*: order matters to conv2d",
    ],
    "smolvlm, images of two sizes": [
        "model.connector.modality_projection.heads: order matters to conv2d",
        "model.connector.modality_projection.heads.*: order matters to conv2d",
    ],
}


@pytest.fixture(scope="module", params=FAMILIES)
def found(request):
    family = FAMILIES[request.param]
    model = randomised(family.build())
    return family, model, discover(model, family.example())


def test_the_spaces_that_exist_are_found_and_the_rest_is_frozen_for_a_reason(request, found):
    _, model, coupling = found
    name = request.node.callspec.params["found"]
    assert tuple(census(model, coupling).values()) == SPACES[name]
    reasons, expected = frozen(coupling), FROZEN.get(name, [])
    assert len(reasons) == len(expected)
    assert all(map(str.startswith, reasons, expected))


def test_every_space_keeps_the_outputs_and_the_weights_come_back(found):
    family, model, coupling = found
    before = copy.deepcopy(model.state_dict())
    for space in movable(coupling):
        verify_space(model, space, family.example(), family.tolerance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_spaces_together_keep_the_outputs(found):
    family, model, coupling = found
    permuted = copy.deepcopy(model)
    tables = random_tables(coupling)
    fold_all(permuted, tables, coupling)
    before, after = (outputs(net, family.example()) for net in (model, permuted))
    assert difference(before, after) <= family.tolerance
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), permuted.parameters(), strict=True))
    for space in reversed(movable(coupling)):
        fold(permuted, space, tables[space.name].argsort(dim=-1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), permuted.parameters(), strict=True))


def test_a_space_without_one_of_its_members_changes_the_outputs(found):
    family, model, coupling = found
    example = family.example()
    before = outputs(model, example)
    kinds = {re.sub(r"\d+", "*", space.name): space for space in movable(coupling)}
    for space in kinds.values():
        table = torch.arange(space.size).roll(1).repeat(space.blocks, 1)
        for left_out in space.members:
            rest = tuple(member for member in space.members if member is not left_out)
            if changes_nothing(space, left_out.parameter):
                continue
            partial = dataclasses.replace(space, members=rest)
            fold(model, partial, table)
            after = outputs(model, example)
            fold(model, partial, table.argsort(dim=-1))
            assert difference(before, after) > family.tolerance, left_out.parameter


def changes_nothing(space: ChannelSpace, parameter: str) -> bool:
    """A key's bias adds the same amount to all scores of a query, which softmax forgets; the language model reads what
    is before the vision tower's last norm.
    """
    if parameter.startswith("model.vision_tower.post_layernorm"):
        return True
    return space.name.endswith("heads") and parameter.endswith(
        ("key.bias", "k_proj.bias", "attn.k.bias", "k_lin.bias", "key_proj.bias")
    )


def test_frozen_spaces_say_why_and_free_ones_do_not(found):
    _, model, coupling = found
    for space in coupling.spaces:
        assert bool(space.reason) == (space.freedom == "frozen")
        assert space.readers
        assert (space.blocks > 1) == (space.freedom == "blocks")
        for member in space.members:
            assert member.positions.shape[::2] == (space.blocks, space.size)
            assert member.positions.dtype == torch.int64
            assert model.get_parameter(member.parameter) is not None


def test_names_are_unique_and_sites_fit_the_weights(found):
    _, model, coupling = found
    sites = {site.name: site for site in coupling.sites}
    assert len({space.name for space in coupling.spaces}) == len(coupling.spaces)
    assert len(sites) == len(coupling.sites)
    for site in coupling.sites:
        for reader in site.readers:
            assert site.size in model.get_parameter(reader).shape
        if site.gather[0] == "output":
            model.get_submodule(site.gather[1])
        else:
            assert site.gather == ("input",)
    for space in coupling.spaces:
        for reader in space.readers:
            assert reader.parameter in sites[reader.site].readers


def test_the_page_lists_the_families_that_the_tests_run():
    assert families(PAGE.read_text(encoding="utf-8")) == SHOWN
