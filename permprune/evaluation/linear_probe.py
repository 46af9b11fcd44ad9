"""A linear probe: a classifier on frozen features, which measures the information they contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from permprune.checkpoints.origin import carry_over
from permprune.errors import PermpruneError
from permprune.evaluation.result import TOP_1_ACCURACY, Result, share
from permprune.examples import Examples
from permprune.models.forward import argument_names, frozen, run_model
from permprune.models.hooks import attached
from permprune.options import Count, Seed, require
from permprune.system.device import compute_device
from permprune.system.progress import log, track

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the L2 penalty that are tried; the mean cross-entropy has weight 1, and features are standardised."""

NEVER = -1e4
"""The logit of a class without examples; finite, so that the checkpoint has no infinities, and in the range of fp16."""

HELD_OUT = 0.2
"""The share of the examples that is held out to choose the penalty."""


@dataclass(frozen=True)
class LinearProbe:
    """A model with a fitted classifier, and the penalty; `result` is the held-out accuracy before the final fit."""

    model: PreTrainedModel
    result: Result
    penalty: float


def fit_probe(
    model: PreTrainedModel, examples: Examples, *, classes: int = 1, batch: int = 32, seed: int = 0
) -> LinearProbe:
    """Fit the linear layer that computes a model's logits, by multinomial logistic regression with an L2 penalty.

    `examples` have "labels" (count,), classes from 0 on; the layer gets `classes` rows, or more if there are larger
    labels. If the model has such a layer, that layer is changed in place. A model without a head gets the head of
    Transformers for images or sentences, and shares its weights with the model that is returned. `seed` determines
    which examples are held out to choose the penalty; the final fit uses all examples. Raises `PermpruneError` if there
    is no such head, or if the labels are not classes of single examples.
    """
    require("classes", classes, Count)
    require("batch", batch, Count)
    require("seed", seed, Seed)
    labels = examples.get("labels")
    if labels is None or labels.dim() != 1 or labels.is_floating_point() or int(labels.min()) < 0:
        raise PermpruneError("a probe needs one class number, 0 or higher, for each example: give such labels")
    classes = max(classes, int(labels.max()) + 1)
    if "labels" not in argument_names(model):
        model = with_head(model, [str(number) for number in range(classes)])
    name, inputs = _head_inputs(model, examples, batch)
    head = _resized(model, name, classes)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order.tensor_split([max(1, round(HELD_OUT * len(order)))])
    x, y = inputs.double(), labels.cpu()
    right: dict[float, int] = {}
    for penalty in track(PENALTIES, "fitting"):
        weight, bias = logistic_regression(x[rest], y[rest], classes, penalty)
        right[penalty] = int(((x[held_out] @ weight.T + bias).argmax(1) == y[held_out]).sum())
    best = max(right, key=lambda penalty: (right[penalty], penalty))
    weight, bias = logistic_regression(x, y, classes, best)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    log.info(
        "probe: %d of %d held-out examples are classified correctly with penalty %g", right[best], len(held_out), best
    )
    return LinearProbe(model, share("linear probe", TOP_1_ACCURACY, right=right[best], count=len(held_out)), best)


def logistic_regression(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Return the weight (classes, features) and bias (classes,) of least mean cross-entropy + penalty / 2 * |weight|^2.

    `x` is fp64 (count, features), `y` is int64 (count,). The penalty applies to the weight for standardised features;
    the returned weight is for `x` itself. A class without examples is never predicted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standard = scaler.fit_transform(x.numpy())
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype)
    bias = torch.full((classes,), NEVER, dtype=x.dtype)
    present = y.unique()
    if len(present) > 1:
        two = len(present) == 2  # scikit-learn fits the rows' difference, whose squared norm is twice that of both
        solver = LogisticRegression(C=(1 + two) / (penalty * len(y)), tol=1e-8, max_iter=10_000)
        solver.fit(standard, y.numpy())
        rows, offsets = torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_)
        weight[present] = torch.cat([-rows, rows]) / 2 if two else rows
        bias[present] = torch.cat([-offsets, offsets]) / 2 if two else offsets
    else:
        bias[present] = 0.0
    weight /= torch.from_numpy(scaler.scale_)
    bias -= weight @ torch.from_numpy(scaler.mean_)
    return weight, bias


def with_head(model: PreTrainedModel, classes: Sequence[str]) -> PreTrainedModel:
    """Return a classifier of these classes with the weights of a model without a head; a model with a head as it is.

    The classifier shares the model's weights, and its gathers in gather mode; its head is that of Transformers for
    images or sentences. In both cases the configuration gets the names of the classes. Raises `PermpruneError` if
    Transformers has no head for such a model.
    """
    names = dict(enumerate(classes))
    if "labels" not in argument_names(model):
        model = _headed(model, len(names))
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    return model


def _headed(model: PreTrainedModel, classes: int) -> PreTrainedModel:
    images = model.main_input_name == "pixel_values"
    kind: Any = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    config = _mapped(model.config, kind)
    config.num_labels = classes
    headed: PreTrainedModel = kind.from_config(config, dtype=model.dtype, trust_remote_code=False)
    keys, weights = headed.state_dict().keys(), model.state_dict(keep_vars=True)
    prefixes = ["", *(f"{name}." for name, _ in headed.named_children())]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in keys for name in weights))
    shared = {prefix + name: weight for name, weight in weights.items() if prefix + name in keys}
    missing = {key.partition(".")[0] for key in keys - shared.keys()}
    if len(missing) != 1:
        raise PermpruneError(
            f"a {type(headed).__name__} has {len(missing)} parts that the model does not have: give a model with a head"
        )
    headed.load_state_dict(shared, strict=False, assign=True)
    headed.to(compute_device(model)).eval()  # type: ignore[arg-type]
    carry_over(model, headed, lambda name: prefix + name)
    return headed


def _mapped(config: PreTrainedConfig, kind: Any) -> PreTrainedConfig:
    """Return a config that models of this kind accept: a copy of `config`, or one of a model with it as a part."""
    known = kind._model_mapping.keys()
    if type(config) in known:
        return type(config).from_dict(config.to_dict())
    for whole in known:
        for name, nested in whole.sub_configs.items():
            if nested is type(config):
                mapped: PreTrainedConfig = whole(**{name: config.to_dict()})
                return mapped
    raise PermpruneError(
        f"Transformers has no {kind.__name__} with a {type(config).__name__}: give a model with a head"
    )


@torch.no_grad()
def _head_inputs(model: PreTrainedModel, examples: Examples, batch: int) -> tuple[str, Tensor]:
    """Return the name of the linear layer that computes the logits, and its inputs, fp32 (count, features) on CPU."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: calls.append((name, args[0], output)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    features: list[tuple[str, Tensor]] = []
    with attached(hooks), frozen(model):
        for inputs in track(examples.split(batch), "features"):
            calls.clear()
            logits = run_model(model, inputs.to(compute_device(model))).logits
            features += [(name, x) for name, x, y in calls if y is logits or y.data_ptr() == logits.data_ptr()]
    names = {name for name, _ in features}
    if len(names) != 1 or any(x.dim() != 2 for _, x in features):
        raise PermpruneError(
            "no linear layer gives the logits of an example: give a classifier, or a model without a head"
        )
    return names.pop(), torch.cat([x.float().cpu() for _, x in features])


def _resized(model: PreTrainedModel, name: str, classes: int) -> nn.Linear:
    """Replace the layer `name` by one with `classes` rows, update the model's configuration, and return the layer."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    head: nn.Linear = nn.utils.skip_init(nn.Linear, old.in_features, classes, **place)
    model.set_submodule(name, head)
    model.config.num_labels = classes
    vars(model)["num_labels"] = classes  # read by the loss of Transformers' heads
    return head
