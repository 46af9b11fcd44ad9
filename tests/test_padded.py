"""Models of padded inputs, texts and images with texts, go through every stage of a run."""

from pathlib import Path
from typing import Any

import pytest

import permprune
from permprune.checkpoints.origin import held_patterns
from permprune.data.load import load_examples

from .modalities import EXAMPLES, make
from .vision_language import MODELS, write_pairs

CHANGED = {"order": "ria", "update": "admm", "train": "steps=1:blocks=true"}
"""A small run of what efforts do by default, in which blocks run twice."""


@pytest.mark.parametrize("settings", [CHANGED, {"order": "newton:rounds=1", "recompute": True}])
@pytest.mark.parametrize("family", MODELS)
def test_images_with_texts(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, processor = MODELS[family]()
    source = str(write_pairs(tmp_path / "pairs", 24))
    examples = load_examples(source, model, processor, part="calibration", count=16)
    pruned = permprune.prune(model, examples=examples, held_out=2, **settings)
    assert {str(pattern) for pattern in held_patterns(pruned.model).values()} == {"2:4"}


@pytest.mark.parametrize("kind", ["bert", "whisper"])
def test_recomputed_blocks_are_those_of_one_pass(kind: str) -> None:
    """Sums leave out padded positions in the first pass of a block alone, which must not change what autograd saves."""
    settings: dict[str, Any] = {"examples": EXAMPLES[kind](), "order": "newton:rounds=1", "held_out": 1}
    models = [
        permprune.prune(make(kind), **settings, precision="fp32", recompute=again).model for again in (False, True)
    ]
    first, second = (model.state_dict() for model in models)
    assert all((first[name] == second[name]).all() for name in first)
