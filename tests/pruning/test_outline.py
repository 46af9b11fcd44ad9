"""The outline of a model from its first blocks, repeated for the blocks that equal them."""

from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

from permprune.config import PruneConfig
from permprune.models.shallow import repetitions, shortened
from permprune.plan import outline_model
from permprune.pruning.problem import Outline

from ..coupling.coupling_models import ENCODER_DECODER, EXPERTS, SHORT

LATENT = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
ROUTED = {"first_k_dense_replace": 1, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}

MODELS: dict[str, tuple[type[PreTrainedModel], tf.PreTrainedConfig, list[int]]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**{**EXPERTS, "num_hidden_layers": 5}), [2]),
    "mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**{**EXPERTS, "num_local_experts": 3, "num_hidden_layers": 4}),
        [2],
    ),
    "deepseek-v3": (
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config(**{**EXPERTS, "num_key_value_heads": 4, "num_hidden_layers": 5}, **LATENT, **ROUTED),
        [3],  # one dense block and two of experts
    ),
    "bert": (tf.BertForMaskedLM, tf.BertConfig(**{**SHORT, "num_hidden_layers": 4}), [2]),
    "bart": (
        tf.BartForConditionalGeneration,
        tf.BartConfig(**{**ENCODER_DECODER, "encoder_layers": 3, "decoder_layers": 4}),
        [2, 2],
    ),
}


def on_meta(name: str) -> PreTrainedModel:
    kind, config, _ = MODELS[name]
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config)
    return model.to("meta").eval()


def problems(outline: Outline) -> dict[str, Any]:
    """The problems by name, with their parts in no particular order."""
    return {
        problem.name: (
            *(problem.size, problem.space, problem.block, problem.site),
            sorted((part.layer, part.site, part.columns.tolist()) for part in problem.parts),
        )
        for problem in outline.problems
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fold", "gather"])
@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_left_out_are_searched_like_their_equals(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = on_meta(name), PruneConfig(mode=mode)
    found = outline_model(model, config)
    assert [one.kept for one in found.repeated] == MODELS[name][2]
    monkeypatch.setattr("permprune.plan.repetitions", lambda _: [])
    whole = outline_model(model, config)
    assert not whole.repeated and found.sites == whole.sites
    assert problems(found) == problems(whole) and len(whole.problems) > 2
    assert [layer.name for layer in found.layers] == [layer.name for layer in whole.layers]


def test_excluded_layers_take_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = on_meta("llama"), PruneConfig(exclude=("*.layers.4.*", "*.0.mlp.down_proj"))
    found = outline_model(model, config)
    monkeypatch.setattr("permprune.plan.repetitions", lambda _: [])
    whole = outline_model(model, config)
    assert problems(found) == problems(whole)
    assert len(found.layers) == 27 and not any("layers.4." in name for name in found.sites)


def test_a_model_is_whole_again_after_it_was_shortened() -> None:
    model = on_meta("deepseek-v3")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ZeroDivisionError), shortened(model, repetitions(model)):
        assert len(model.model.layers) == 3
        raise ZeroDivisionError
    assert [name for name, _ in model.named_parameters()] == names


def test_sizes_are_those_of_the_layers() -> None:
    outline = outline_model(on_meta("llama"), PruneConfig())
    assert outline.weights == 5 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert sum(outline.widths.values()) == 5 * (3 * 32 + 48)
    assert outline.moments() == 5 * (3 * 32**2 + 48**2)
    (residual,) = outline.largest(1)
    assert residual.name == "residual"
    assert outline.largest_weights(1) == 5 * 32 * (32 + 2 * 16 + 2 * 48)


def test_blocks_are_told_apart_by_their_numbers() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**EXPERTS, "num_hidden_layers": 12})).to("meta")
    outline = outline_model(model, PruneConfig())
    assert [len(block) for block in outline.blocks] == [7] * 12
    assert outline.block_sums == 3 * 32**2 + 48**2
