"""The time of a search's accept tests with products that leave out what is pruned, beside dense ones: a Markdown table.

Every loss on held-out examples is computed with both, which take turns; the search goes on with the first. "same
decisions" counts the losses that are below the least one so far with both or with neither.

python benchmarks/accept_test.py smollm2-135m --precision fp32 bf16 --rounds 2 --threads 1
"""

import argparse
import time
from unittest.mock import patch

import torch

import permprune
from permprune.kernels.product.masked import MaskedWeight
from permprune.permuters.iterate import Landscape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=32, help="windows; an eighth are held out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| precision | tests | dense, s | leaving out, s | times | largest difference | same decisions |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for precision in options.precision:
        model, tokenizer, _ = permprune.read_model(options.model)
        tests = Tests()
        with patch.object(Landscape, "held_out_loss", lambda landscape, tests=tests: tests.run(landscape)):
            permprune.prune(
                model,
                tokenizer,
                order=f"newton:rounds={options.rounds}",
                precision=precision,
                length=options.length,
                samples=options.samples,
            )
        print(f"| {precision} | {tests.row()} |", flush=True)


class Tests:
    """The losses of a search, each computed twice: (leaving out, dense), and the seconds of processor time of both."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []
        self.seconds: list[tuple[float, float]] = []
        self._loss = Landscape.held_out_loss

    def run(self, landscape: Landscape) -> float:
        """Compute a loss in both ways, and return that of the kernels."""
        losses, seconds = [], []
        for fits in (MaskedWeight.fits, lambda *_: False):
            began = time.process_time()
            with patch.object(MaskedWeight, "fits", fits):
                losses.append(self._loss(landscape))
            seconds.append(time.process_time() - began)
        self.losses.append((losses[0], losses[1]))
        self.seconds.append((seconds[0], seconds[1]))
        return losses[0]

    def row(self) -> str:
        """The cells of the table."""
        leaving_out, dense = (min(seconds) for seconds in zip(*self.seconds, strict=True))
        difference = max(abs(first - second) for first, second in self.losses)
        same, least = 0, (float("inf"), float("inf"))
        for pair in self.losses:
            below = [loss < best for loss, best in zip(pair, least, strict=True)]
            same += below[0] == below[1]
            least = pair if below[0] else least
        cells = f"{len(self.losses)} | {dense:.2f} | {leaving_out:.2f} | {dense / leaving_out:.2f} | {difference:.5f}"
        return f"{cells} | {same} of {len(self.losses)}"


if __name__ == "__main__":
    main()
