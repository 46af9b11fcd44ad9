"""Ways to train the weights that are kept, each for equal processor time: a Markdown table.

All start from the result of one search, --start, whose time does not count. "end to end" is the training of `newton`,
and each of the others differs from it as its function says. "blocks first" begins with the weights of "blocks" in half
of the time, if this run has them, and counts that time. The texts are those of protocol.py, on the first --windows of
2048 tokens of each; shares are of the gap between the dense model and no permutation.

python benchmarks/trainings.py --calibration c4.jsonl --wikitext wiki.test.raw --start none --seconds 300 600 1200
"""

import argparse
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from protocol import HELD_BACK, scorer
from rows import add
from torch import Tensor
from torch.overrides import TorchFunctionMode

from permprune import Examples, PruneConfig, read_model
from permprune.data.text import load_documents, tokenize
from permprune.engine.held import Held, prepare
from permprune.evaluation.lm_tasks import WIKITEXT
from permprune.evaluation.result import gap_closed
from permprune.kernels.adam.step import BETAS
from permprune.kernels.product.masked import MaskedWeight
from permprune.kernels.search.masks import pack_mask, write_mask
from permprune.losses.objective import Loss
from permprune.models.processors import tokenizer_of
from permprune.permuters.base import Run
from permprune.permuters.block_tuning import trained_blocks
from permprune.permuters.iterate import Landscape
from permprune.permuters.registry import permuter
from permprune.permuters.trust_region import Newton
from permprune.permuters.tuning import KeptWeights, Schedule, train_weights
from permprune.pruning.network import PrunedNetwork
from permprune.system.progress import log
from permprune.system.search_state import Checkpoint, Resumable
from permprune.system.shelf import Shelf

TEXTS = {HELD_BACK: "c4", WIKITEXT: "wikitext2"}
"""Names in rows, by text."""

METHOD = Newton()
"""The search whose training is the default."""

AVERAGED = 0.75
"""The place of the schedule from which the average of the weights is taken."""

MOVED, SETTLED, HYSTERESIS = 5, 0.6, 1.1
"""Masks are chosen again every so many steps until this place of the schedule, in favour of the weights they keep."""

TRIAL = 4
"""Steps of each block that tell how long others take."""

REPEATED = 3
"""Passes over the windows whose dense outputs are computed once."""

by_seconds: dict[float, dict[str, Tensor]] = {}
"""What block-by-block training led to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--start", default="none", help="the search whose result is trained")
    parser.add_argument("--seconds", nargs="+", type=int, default=[300, 600, 1200], help="of the processor")
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--mode", default="fold")
    parser.add_argument("--calibration", required=True, help="documents, the last 100 of which are held back")
    parser.add_argument("--wikitext", type=Path, help="file of WikiText-2's raw test text (default: the hub)")
    parser.add_argument("--windows", type=int, default=12, help="windows of 2048 tokens of each text to measure on")
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--measured", type=int, default=64, help="windows of the calibration")
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    held, score = prepared(options)
    network, run = held.plan.network, held.plan.run
    with held.dense():
        dense = score()
    permuter("none").solve(network, run)
    none = score()
    log.info("dense %s, no permutation %s", dense, none)
    print("| training | core-seconds | " + " | ".join(TEXTS) + " |\n" + "|---" * (2 + len(TEXTS)) + "|")
    asked = {"none": [0], **dict.fromkeys(options.trainings, options.seconds)}
    permuter(options.start).solve(network, run)
    weights, bits = copied(network.weights), copied(network.bits)
    for seconds, how in sorted((budget, how) for how, budgets in asked.items() for budget in budgets):
        network.set_bits(bits)
        network.set_weights(weights)
        began = time.process_time()
        reused = TRAININGS.get(how, untrained)(network, run, seconds) or 0.0
        spent, found = time.process_time() - began + reused, score()
        shares = {text: gap_closed(found[text], dense[text], none[text]) or 0.0 for text in TEXTS}
        print(f"| {how} | {spent:.0f} | " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |", flush=True)
        cell = {"table": "trainings", "model": options.model, "mode": options.mode, "start": options.start}
        figures = {f"gap_{name}": shares[text] for text, name in TEXTS.items()}
        figures |= {f"perplexity_{name}": found[text] for text, name in TEXTS.items()}
        add(options.rows, cell | {"training": how, "seconds": seconds}, {"core_seconds": round(spent)} | figures)


def prepared(options: argparse.Namespace) -> tuple[Held, Callable[[], dict[str, float]]]:
    """The calibrated model, and a function that returns its perplexities by text."""
    config = PruneConfig(mode=options.mode, length=512, samples=options.samples, measured=options.measured)
    model, processor, _ = read_model(options.model)
    tokenizer = tokenizer_of(processor)
    documents = load_documents(options.calibration, "calibration")
    asked = argparse.Namespace(**vars(options), tasks=[], limit=None, bf16=True)
    measured = scorer(asked, model, tokenizer, documents[-100:])
    *others, _ = config.shares(config.samples)
    length, samples, seed = config.length, config.samples, config.seed
    windows = tokenize(documents[:-100], tokenizer, length, samples, seed, fewer=True, apart=sum(others))
    held = Held(prepare(model, processor, config, examples=Examples.of(windows)), processor)

    def score() -> dict[str, float]:
        with held.plan.network.autocast():
            found = measured(texts_only=True)["texts"]
        return {text: found[text]["value"] for text in TEXTS}

    return held, score


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def clocked(seconds: float) -> Schedule:
    """The schedule of so many seconds of processor time from now."""
    began = time.process_time()

    def place(done: int, _: float) -> float | None:
        spent = time.process_time() - began
        each = spent / max(1, done)
        return (spent + each / 2) / seconds if spent + each < seconds else None

    return place


def untrained(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Leave the weights as they are."""


def end_to_end(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Train all weights on the loss and the dense model's predictions, as `newton` does."""
    loss, saved = loss_of(network, run), Resumable(Checkpoint(None, {}), "training")
    examples, rate = METHOD.step_examples, METHOD.rate
    weights = train_weights(network, run, loss, clocked(seconds), first=0, examples=examples, rate=rate, saved=saved)
    network.set_weights(weights)


def block_by_block(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Train one block after the other, for as many steps as the time allows."""
    began = time.process_time()
    trained_blocks(network, run, TRIAL, Resumable(Checkpoint(None, {}), "blocks"))
    each = (time.process_time() - began) / TRIAL
    steps = max(TRIAL, round(seconds / each) - TRIAL)
    network.set_weights(trained_blocks(network, run, steps, Resumable(Checkpoint(None, {}), "blocks")))
    by_seconds[seconds] = copied(network.weights)


def blocks_first(network: PrunedNetwork, run: Run, seconds: float) -> float:
    """Train one block after the other in half of the time, and then end to end; returns the time of an earlier run."""
    known = by_seconds.get(seconds / 2)
    if known:
        network.set_weights(known)
    else:
        block_by_block(network, run, seconds / 2)
    end_to_end(network, run, seconds / 2)
    return seconds / 2 if known else 0.0


def averaged(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Keep the average of the weights of the last steps."""
    sums, steps = dict[str, Tensor](), 0

    def add_up(kept: KeptWeights, place: float) -> None:
        nonlocal steps
        if place < AVERAGED:
            return
        steps += 1
        for name in kept.weights:
            weight = kept.weights[name].float()
            sums[name] = sums[name].add_(weight) if name in sums else weight.clone()

    kept = steps_of(network, run, seconds, after=add_up)
    for name, total in sums.items():
        kept.weights[name] = (total / steps).to(kept.weights[name].dtype)
    network.set_weights(kept.with_pruned())


def moving_masks(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Train all weights, pruned ones as well, and choose the masks again by their scores (SR-STE, CAST)."""
    moving = MovingMasks(network, run.generator(0), None)
    steps_of(network, run, seconds, kept=moving, after=MovingMasks.choose)
    network.set_weights(moving.with_pruned())


def taught_once(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Repeat fewer windows, whose dense outputs are computed once."""
    compute, known = network.compute_teacher_outputs, dict[str, Any]()

    def cached(examples: Examples, *others: Any) -> Any:
        if examples.digest not in known:
            known[examples.digest] = compute(examples, *others)
        return known[examples.digest]

    each, began, size = METHOD.step_examples, time.process_time(), len(run.train)

    def windows(place: float, taken: int) -> Examples:
        nonlocal size
        if taken == 4 * each:  # the first steps tell how many there will be
            steps = seconds / (time.process_time() - began) * 4
            size = min(size, each * max(5, round(steps / REPEATED)))
        return run.train[torch.arange(taken, taken + each) % size]

    network.compute_teacher_outputs = cached  # type: ignore[method-assign]
    try:
        network.set_weights(steps_of(network, run, seconds, windows=windows).with_pruned())
    finally:
        del network.compute_teacher_outputs  # type: ignore[method-assign]


def growing_steps(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Take half as many windows a step at first, and twice as many in the second half."""
    each = METHOD.step_examples

    def windows(place: float, taken: int) -> Examples:
        size = each // 2 if place < 0.5 else each * 2
        return run.train[torch.arange(taken, taken + size) % len(run.train)]

    network.set_weights(steps_of(network, run, seconds, windows=windows).with_pruned())


def short_texts_first(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Read halves of windows in the first half, twice as many a step."""
    tokens, each = run.train["input_ids"], METHOD.step_examples
    halves = tokens.reshape(2 * len(tokens), -1)

    def windows(place: float, taken: int) -> Examples:
        if place < 0.5:
            return Examples.of(halves[torch.arange(taken, taken + 2 * each) % len(halves)])
        return run.train[torch.arange(taken // 2, taken // 2 + each) % len(tokens)]

    network.set_weights(steps_of(network, run, seconds, windows=windows).with_pruned())


def packed_forward(network: PrunedNetwork, run: Run, seconds: float) -> None:
    """Run forward passes with the kernels for many rows, which leave out what is pruned; weights are packed each time.

    Backward passes multiply by weights with their zeros.
    """
    stored, running, columns, bits = network._stored, [""], network.stored_columns(), network.bits

    def remember(layers: list[Any], *others: Any) -> Tensor:
        running[0] = layers[0].name
        return stored(layers, *others)

    class Packed(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, running[0] = (running[0], "") if func is F.linear else ("", running[0])
            if not name or not torch.is_grad_enabled():
                return func(*args, **(kwargs or {}))
            bias = args[2] if len(args) > 2 else None
            return _PackedProduct.apply(args[0].bfloat16(), args[1], bias, bits[name], columns[name])

    network._stored = remember  # type: ignore[method-assign]
    try:
        with Packed():
            kept = steps_of(network, run, seconds)
    finally:
        del network._stored  # type: ignore[method-assign]
    network.set_weights(kept.with_pruned())


class _PackedProduct(torch.autograd.Function):
    """A linear layer in bf16 with a masked weight, whose forward pass is that of `MaskedWeight`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, MaskedWeight.of(weight.detach(), bits, columns), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ weight.to(gradient.dtype), flat.T @ x.flatten(0, -2), bias, None, None


TRAININGS = {
    "end to end": end_to_end,
    "blocks": block_by_block,
    "blocks first": blocks_first,
    "averaged": averaged,
    "moving masks": moving_masks,
    "taught once": taught_once,
    "growing steps": growing_steps,
    "short texts first": short_texts_first,
    "packed forward": packed_forward,
}


def loss_of(network: PrunedNetwork, run: Run) -> Loss:
    """The loss of training."""
    return Landscape.of(network, run, METHOD.objective).loss.for_training(network.task)


def steps_of(
    network: PrunedNetwork,
    run: Run,
    seconds: float,
    *,
    kept: KeptWeights | None = None,
    windows: Callable[[float, int], Examples] | None = None,
    after: Callable[[Any, float], None] = lambda kept, place: None,
) -> KeptWeights:
    """Take steps as `train_weights` does, on the windows at a place of the schedule after so many were taken."""
    kept, loss, schedule = kept or KeptWeights(network, run.generator(0), None), loss_of(network, run), clocked(seconds)
    taken, each = 0, METHOD.step_examples
    while (place := schedule(kept.progress.steps, 0.0)) is not None:
        batch = windows(place, taken) if windows else run.batch(taken // each, each)
        taken += len(batch)
        found = kept.step(batch, loss, METHOD.rate * kept.progress.rate(place))
        log.info("step %d, %.0f %%: loss %.4f", kept.progress.steps, 100 * place, found)
        after(kept, place)
    return kept


class MovingMasks(KeptWeights):
    """All weights of a network in training with Adam, of which it shows those that its masks keep, in fp32."""

    def __init__(self, network: PrunedNetwork, *others: Any) -> None:
        super().__init__(network, *others)
        self.whole = {name: network.weights[name].float().clone() for name in network.layers}
        self.masks = {name: network.masks[name] for name in network.layers}
        self.moments = {name: (torch.zeros_like(one), torch.zeros_like(one)) for name, one in self.whole.items()}

    def step(self, examples: Examples, loss: Loss, rate: float) -> float:
        """Take a step with the gradients of all weights, at those that are kept."""
        self.progress = replace(self.progress, steps=(step := self.progress.steps + 1))

        def take(name: str, gradient: Tensor) -> None:
            mean, square = self.moments[name]
            mean.lerp_(gradient.float(), 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient.float(), gradient.float(), value=1 - BETAS[1])
            root = (square / (1 - BETAS[1] ** step)).sqrt_().add_(1e-8)
            self.whole[name].addcdiv_(mean, root, value=-rate * self._scales[name] / (1 - BETAS[0] ** step))

        self._network.show({name: weight * self.masks[name] for name, weight in self.whole.items()})
        return self._network.take_gradients(examples, loss, take)

    def choose(self, place: float) -> None:
        """Keep the weights of the largest scores, every so many steps; those that are kept count as larger."""
        if place > SETTLED or self.progress.steps % MOVED:
            return
        columns = self._network.stored_columns()
        for name, weight in self.whole.items():
            score = self._network.scales[name].score(weight)
            score = torch.where(self.masks[name], HYSTERESIS * score, score)
            self.masks[name] = self.masks[name].clone()
            write_mask(self.masks[name], score, columns[name], self._network.patterns[name])

    def with_pruned(self) -> Shelf:
        """Set the masks; returns all weights."""
        self._network.set_bits({name: pack_mask(mask) for name, mask in self.masks.items()})
        found = self._network.shelf.another()
        found.update((name, weight.to(self._network.layers[name].stored.dtype)) for name, weight in self.whole.items())
        return found


if __name__ == "__main__":
    main()
