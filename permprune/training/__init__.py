"""Training weights: whole models, heads, or the weights that pruning kept."""

from permprune.training.loop import Epoch, Trainer, Training
from permprune.training.weights import TRAINED, masked, trained_weights

__all__ = ["TRAINED", "Epoch", "Trainer", "Training", "masked", "trained_weights"]
