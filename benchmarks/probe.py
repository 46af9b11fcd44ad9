"""An image classifier: a linear layer fitted to the features of a frozen model, by logistic regression.

python benchmarks/probe.py vit-s14 --data train --classes cat,dog,owl --out vit-s14-classifier

--data is a folder with a sub-folder for each class. A fifth of the images chooses the weight of the L2 penalty; the
final fit uses all of them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedModel
from zoo import folder_of

from permprune import Examples, read_model
from permprune.data.load import load_examples
from permprune.models.forward import frozen, run_model
from permprune.system.progress import track
from permprune.training.heads import with_head

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the penalty that are tried; the mean cross-entropy has weight 1."""

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of benchmarks/zoo.py or of the zoo, folder or hub id")
    parser.add_argument("--data", required=True)
    parser.add_argument("--classes", required=True, help="three names or more, separated by commas")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    share = probe(options.model, options.out, options.data, options.classes.split(","), options.images)
    print(f"{share:.1%} of the images held out")


def probe(name: str, out: Path, data: str, classes: Sequence[str], count: int) -> float:
    """Write a classifier on a model to `out`; returns the share of right classes of the images held out."""
    if len(classes) < 3:
        raise SystemExit("give three classes or more: two have one row of weights in scikit-learn")
    model, processor, _ = read_model(folder_of(name))
    model = with_head(model, classes)
    examples = load_examples(data, model, processor, part="calibration", count=count)
    scaler = StandardScaler()
    x, y = scaler.fit_transform(features(model, examples)), examples["labels"].numpy()
    held_out, rest = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tensor_split([len(y) // 5])
    scores = {
        penalty: fitted(x[rest], y[rest], penalty).score(x[held_out], y[held_out])
        for penalty in track(PENALTIES, "fitting")
    }
    best = fitted(x, y, max(PENALTIES, key=lambda penalty: (scores[penalty], penalty)))
    weight = torch.from_numpy(best.coef_ / scaler.scale_)
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(torch.from_numpy(best.intercept_) - weight @ torch.from_numpy(scaler.mean_))
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return float(max(scores.values()))


def fitted(x: Tensor, y: Tensor, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=1 / (penalty * len(y)), tol=1e-8, max_iter=10_000).fit(x, y)


@torch.inference_mode()
def features(model: PreTrainedModel, examples: Examples) -> Tensor:
    """The inputs of the model's classifier, fp64 (count, features)."""
    found: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with frozen(model):
        for inputs in track(examples.split(BATCH), "features"):
            run_model(model, inputs)
    hook.remove()
    return torch.cat(found).double()


if __name__ == "__main__":
    main()
