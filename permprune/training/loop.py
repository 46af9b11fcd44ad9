"""The training loop: epochs over examples, with an evaluation after each; the best epoch is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from permprune.checkpoints.record import Epoch
from permprune.errors import PermpruneError
from permprune.evaluation.result import Result
from permprune.examples import Examples, batches, by_length
from permprune.losses.objective import Loss
from permprune.losses.targets import Task
from permprune.models.autocast import autocast
from permprune.models.forward import frozen, requiring_gradients
from permprune.options import Count, NonNegative, Positive, Seed, Share, require_fields
from permprune.system.device import fast_dtype, random_states, set_random_states
from permprune.system.progress import bar, log
from permprune.system.search_state import Checkpoint, Resumable, State

STATE, BEST = "training", "training.best"
"""The names of the saved states: of training, and of the weights of its best epoch."""

RANDOM = "random"
"""The kind of the tensors of a state that hold random states, by type of device."""


@dataclass(frozen=True)
class Training:
    """Hyperparameters of training with AdamW.

    The learning rate rises linearly to `rate` over the share `warmup` of the steps, and then falls linearly to 0. A
    step takes `batch` examples. `decay` is the weight decay of parameters of two or more dimensions, `clip` the largest
    norm of a step's gradient. The same `seed` gives the same weights. Raises `PermpruneError` for numbers out of range.
    """

    epochs: Count = 3
    rate: Positive = 5e-5
    batch: Count = 32
    warmup: Share = 0.1
    decay: NonNegative = 0.01
    clip: Positive = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_fields(self)

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of step number `step`, counted from 0, of `steps` steps."""
        rising = max(1, round(self.warmup * steps))
        return self.rate * min((step + 1) / rising, (steps - step) / max(1, steps - rising))


@dataclass(frozen=True)
class Position:
    """A place within an epoch: the steps so far, the sum of their losses, its number of terms, and their seconds."""

    step: int = 0
    loss: float = 0.0
    terms: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Trainer:
    """Trains `weights` of a model on the `loss` of `task`, and leaves the model at its best epoch.

    `teacher` is the dense model, if the loss needs its outputs; dropout is then off, as the teacher's outputs are
    computed without it. `measure` evaluates the model before training and after each epoch. The best epoch is the one
    with the best measured value or, with `held_out` examples, with the lowest loss on them; of equal ones, the last.
    `checkpoint` saves the state after each epoch and within it, so that an interrupted run can be resumed.
    """

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    task: Task
    loss: Loss
    measure: Callable[[], Result]
    training: Training
    checkpoint: Checkpoint
    teacher: nn.Module | None = None
    held_out: Examples | None = None
    curve: list[Epoch] = field(default_factory=list)

    def fit(self, examples: Examples) -> list[Epoch]:
        """Train for the remaining epochs and return the curve. Raises `PermpruneError` if a loss is not finite."""
        self.optimizer = self._optimizer()
        self.best: dict[str, Tensor] = {}
        self.best_value = 0.0
        self.position = Position()
        self.saved = Resumable(self.checkpoint, STATE)
        random = self._restore(*state) if (state := self.saved.take()) else {}
        del state
        if not self.curve:
            self._add(0, None, 0.0)
        steps = -(-len(examples) // self.training.batch)
        begun = steps * (len(self.curve) - 1) + self.position.step
        with bar("training", steps * self.training.epochs, begun) as advance:
            for number in range(len(self.curve), self.training.epochs + 1):
                with self._training():
                    self._epoch(examples, number, random, advance)
                done, self.position, random = self.position, Position(), {}
                self._add(number, done.loss / done.terms, self.curve[-1].seconds + done.seconds)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.best[name])
        return self.curve

    def _epoch(
        self, examples: Examples, number: int, random: dict[str, Tensor], advance: Callable[[int, str], None]
    ) -> None:
        """Train for the rest of a pass over the examples, from `position` and its `random` states.

        `advance` is called with the steps of all passes so far.
        """
        seed = (self.training.seed * 2**20 + number) % 2**63
        torch.manual_seed(seed)
        runs = by_length(examples, self.training.batch, torch.Generator().manual_seed(seed))
        if self.position.step:
            set_random_states(random)
            log.info("epoch %d resumes after step %d of %d", number, self.position.step, len(runs))
        began = time.monotonic() - self.position.seconds
        for batch in runs[self.position.step :]:
            done = self.position
            step = (number - 1) * len(runs) + done.step
            for group in self.optimizer.param_groups:
                group["lr"] = self.training.rate_at(step, self.training.epochs * len(runs))
            loss, terms = self._loss(examples[batch].trimmed())
            if not torch.isfinite(loss):
                raise PermpruneError(f"the loss is not finite in epoch {number}: give a smaller --lr")
            (loss / terms).backward()
            torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.training.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total, count = done.loss + float(loss.detach()), done.terms + terms
            self.position = Position(done.step + 1, total, count, time.monotonic() - began)
            self.saved.offer(self._state)
            advance(step + 1, f"epoch {number}: loss {total / count:.4g}")

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(iter(self.weights.values())).device

    def _loss(self, examples: Examples) -> tuple[Tensor, int]:
        """Return (summed loss with its graph, number of terms) of a batch."""
        device = self.device
        examples, dtype = examples.to(device), fast_dtype(device)
        with autocast(device, dtype):
            teacher_outputs = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_outputs = self.loss.compute_teacher_outputs(self.teacher, examples, self.task)
            return self.loss(self.model, examples, self.task, teacher_outputs)

    @torch.no_grad()
    def _held_out_loss(self) -> float | None:
        """The mean loss on the held-out examples; None if there are none."""
        if self.held_out is None:
            return None
        losses = [self._loss(examples) for examples in batches(self.held_out, self.training.batch)]
        return sum(float(loss) for loss, _ in losses) / sum(terms for _, terms in losses)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """A context for training: only the trained weights require gradients, and dropout is on without a teacher.

        Random states, and the mode of each module, are restored afterwards.
        """
        with frozen(self.model), requiring_gradients(self.weights.values()), torch.random.fork_rng():
            self.model.train(self.teacher is None)
            try:
                yield
            finally:
                self.model.eval()

    def _optimizer(self) -> torch.optim.Optimizer:
        flat = [weight for weight in self.weights.values() if weight.dim() < 2]
        rest = [weight for weight in self.weights.values() if weight.dim() > 1]
        groups = [{"params": rest, "weight_decay": self.training.decay}, {"params": flat, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)

    def _add(self, number: int, loss: float | None, seconds: float) -> None:
        """Evaluate the model, keep its weights if they are the best so far, and save the state."""
        result, held_out = self.measure(), self._held_out_loss()
        sign = 1 if result.metric.higher_is_better else -1
        value = sign * result.value if held_out is None else -held_out
        if not self.best or value >= self.best_value:
            self.best_value = value
            self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}
            self.checkpoint.save(BEST, self.best, {})  # before the state that needs it
        self.curve.append(Epoch(number, loss, result.value, seconds, held_out))
        log.info("epoch %d: %s %.4g after %.0f s", number, result.metric, result.value, seconds)
        self.saved.save(self._state)

    def _state(self) -> State:
        """Return the state from which training resumes: weights, moments, the random state, and where it is."""
        state = {f"now {name}": weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            state |= {f"{key} {name}": value for key, value in self.optimizer.state[weight].items()}
        curve = [asdict(epoch) for epoch in self.curve]
        values = {"curve": curve, "best": self.best_value, "position": asdict(self.position)}
        return state | {f"{RANDOM} {key}": value for key, value in random_states(self.device).items()}, values

    def _restore(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> dict[str, Tensor]:
        """Restore the state of an interrupted run; returns the random states.

        Raises `PermpruneError` if the weights of its best epoch are missing.
        """
        self.curve, self.best_value = [Epoch(**epoch) for epoch in values["curve"]], values["best"]
        self.position = Position(**values["position"])
        if (best := self.checkpoint.load(BEST)) is None:
            raise PermpruneError(f"{self.checkpoint.folder} lacks {BEST}.safetensors: remove it and start again")
        self.best = {name: tensor.to(self.device) for name, tensor in best[0].items()}
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(" ")
            kinds.setdefault(kind, {})[name] = tensor
        random, now = kinds.pop(RANDOM), kinds.pop("now")
        with torch.no_grad():
            for name, tensor in now.items():
                self.weights[name].copy_(tensor)
        for kind, moments in kinds.items():
            for name, tensor in moments.items():
                self.optimizer.state[self.weights[name]][kind] = tensor.to(self.device)
        return random
