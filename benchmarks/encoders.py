"""Packed encoders and image models beside ONNX Runtime and OpenVINO: a Markdown table of MB, quality and items/s.

--dense is a classifier that PyTorch, ONNX Runtime and OpenVINO run, in fp32 and in int8 as these engines quantize it.
--packed are folders of the same model pruned and packed. All of them classify the same examples of --data, one at a
time, so that none is padded. OpenVINO's int8 is calibrated on examples of the calibration part, which have one length.
The models take turns in one process, and the fastest of all turns counts.

Needs `pip install nncf onnx onnxruntime onnxscript openvino`.

python benchmarks/encoders.py --dense minilm-sst2 --packed packed-fp32 packed-int8 --data other.tsv \
    --rows docs/results/speed.jsonl
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from other_engines import Engine, build
from rows import add
from torch import Tensor

from permprune import Examples, load, read_model
from permprune.data.load import load_examples
from permprune.evaluation.size import stored_bytes
from permprune.evaluation.speed import cells, measure_speed

ENGINES = ("ONNX Runtime fp32", "ONNX Runtime int8", "OpenVINO fp32", "OpenVINO int8")
DENSE = "PyTorch fp32, dense"

Logits = Callable[[Tensor], Any]
Seconds = Callable[[int, int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--packed", nargs="*", default=[])
    parser.add_argument("--engines", nargs="*", default=ENGINES)
    parser.add_argument("--data", help="labelled data that the models have not seen (default: the default data)")
    parser.add_argument("--calibration", help="examples for OpenVINO's int8 (default: the default data)")
    parser.add_argument("--examples", type=int, default=1024, help="examples to classify; 0: speed alone is measured")
    parser.add_argument("--calibrated", type=int, default=32, help="examples for OpenVINO's int8")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the texts that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="file of figures, one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense, processor, _ = read_model(options.dense)
    dense = dense.float().eval()
    draw = {"model": dense, "processor": processor, "length": 128, "seed": 0}
    drawn = load_examples(options.calibration, part="calibration", count=16 * options.calibrated, **draw)
    calibration = of_one_size(drawn, options.calibrated)
    with tempfile.TemporaryDirectory() as folder:
        models = {DENSE: torch_model(dense)}
        models |= {f"permprune {Path(path).name}": torch_model(load(path).eval()) for path in options.packed}
        for name in options.engines:
            own = Path(folder) / name.replace(" ", "-")
            own.mkdir()
            engine = build(dense, name, calibration, threads=options.threads, folder=own)
            models[f"{name}, dense"] = engine_model(engine, dense)
        quality = dict.fromkeys(models, float("nan"))
        if options.examples:
            examples = load_examples(options.data, part="evaluation", count=options.examples, **draw)
            quality = qualities({name: logits for name, (_, logits, _) in models.items()}, examples)
        measured = cells(dense, options.batches, [options.tokens])
        times = {name: seconds for name, (_, _, seconds) in models.items()}
        best = fastest(times, measured, options.turns)
    heads = " | ".join(f"items/s, batch {batch}" for batch, _ in measured)
    print(f"| model | MB | accuracy | {heads} |\n|---{'|---' * (2 + len(measured))}|")
    for name, (size, _, _) in models.items():
        items = [cell[0] / best[name, cell] for cell in measured]
        print(f"| {name} | {size / 1e6:.1f} | {quality[name]:.1%} | {' | '.join(f'{one:.2f}' for one in items)} |")
        cell = {"table": "encoders", "dense": Path(options.dense).name, "model": name, "threads": options.threads}
        figures = {f"items at {batch}": rate for (batch, _), rate in zip(measured, items, strict=True)}
        if options.examples:
            figures |= {"accuracy": quality[name], "examples": options.examples}
        add(options.rows, cell | {"context": measured[0][1]}, {"bytes": size} | figures)


def of_one_size(examples: Examples, most: int) -> Examples:
    """Examples with the input alone, without padding: of texts, the most that have one length."""
    ((argument, given),) = [(name, examples[name]) for name in ("input_ids", "pixel_values") if name in examples]
    if argument == "input_ids":
        lengths = examples["attention_mask"].sum(1)
        ((length, _),) = Counter(lengths.tolist()).most_common(1)
        given = given[lengths == length, :length]
    return Examples({argument: given[:most]})


def torch_model(model: Any) -> tuple[int, Logits, Seconds]:
    @torch.inference_mode()
    def logits(given: Tensor) -> Tensor:
        return model(given).logits

    def seconds(batch: int, context: int) -> float:
        return measure_speed(model, batch=batch, context=context).seconds

    return stored_bytes(model), logits, seconds


def engine_model(engine: Engine, dense: Any) -> tuple[int, Logits, Seconds]:
    def seconds(batch: int, context: int) -> float:
        return engine.measure(dense, batch, context).seconds

    return engine.nbytes, lambda given: engine.run(given)[0], seconds


def qualities(models: dict[str, Logits], examples: Examples) -> dict[str, float]:
    """The accuracy of each model; an engine in fp32 has that of PyTorch, whose logits it must give."""
    given = [inputs(examples[at : at + 1]) for at in range(len(examples))]
    found: dict[str, float] = {}
    for name, logits in models.items():
        if name.endswith("fp32, dense") and found:
            torch.testing.assert_close(torch.as_tensor(logits(given[0])), models[DENSE](given[0]), atol=1e-3, rtol=1e-3)
            found[name] = found[DENSE]
        else:
            classes = torch.cat([torch.as_tensor(logits(one)).argmax(-1) for one in given])
            found[name] = (classes == examples["labels"]).float().mean().item()
    return found


def inputs(example: Examples) -> Tensor:
    """The input of one example, without padding."""
    if "attention_mask" in example:
        return example["input_ids"][:, : int(example["attention_mask"].sum())]
    return example["input_ids" if "input_ids" in example else "pixel_values"]


def fastest(
    times: dict[str, Seconds], measured: list[tuple[int, int]], turns: int
) -> dict[tuple[str, tuple[int, int]], float]:
    """The shortest time of each model in each cell; the models take turns."""
    best: dict[tuple[str, tuple[int, int]], float] = {}
    for cell in measured:
        for _ in range(turns):
            for name, seconds in times.items():
                best[name, cell] = min(seconds(*cell), best.get((name, cell), float("inf")))
    return best


if __name__ == "__main__":
    main()
