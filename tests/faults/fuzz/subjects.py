"""The folders that are damaged: a checkpoint, what prune, pack and finetune make of it, and a pruned cache."""

from __future__ import annotations

import random
from pathlib import Path

from torch import Tensor

PRUNED = [f"{kind}-{mode}" for kind in ("pruned", "trained") for mode in ("fold", "gather")]
PACKED = [f"{dtype}-{mode}" for dtype in ("bf16", "int8", "int4") for mode in ("fold", "gather")]
SUBJECTS = ["checkpoint", *PRUNED, *PACKED, "cache"]
TEXTS = ("one.txt", "two.txt")
"""The files of texts beside the subjects: for calibration and training, and for evaluation."""


def make_subjects(folder: Path) -> tuple[dict[str, Path], Tensor]:
    """Make the `SUBJECTS`, and the `TEXTS` beside them; also returns the tokens on which they are evaluated."""
    from transformers.utils.logging import disable_progress_bar  # in no process that only runs commands

    import permprune
    from permprune.jobs.finetune import FineTuning
    from permprune.kv.config import KVConfig

    from ...fixtures import SENTENCES, make_tiny_llama, make_tiny_tokenizer

    folder.mkdir(parents=True)
    words = [word for sentence in SENTENCES for word in sentence.split()]
    for name in TEXTS:
        generator = random.Random(Path(name).stem)
        (folder / name).write_text(" ".join(generator.choice(words) for _ in range(1500)))
    disable_progress_bar()
    one, two = (str(folder / name) for name in TEXTS)
    subjects = {name: folder / name for name in SUBJECTS}
    checkpoint, evaluation = str(subjects["checkpoint"]), permprune.Evaluation(two, 4, 16)
    make_tiny_llama().save_pretrained(checkpoint)
    make_tiny_tokenizer().save_pretrained(checkpoint)
    for mode in ("fold", "gather"):
        config = permprune.PruneConfig(order="random", mode=mode, calibration=one, samples=24, length=16)
        pruned = subjects[f"pruned-{mode}"]
        permprune.prune_to_folder(checkpoint, pruned, config, evaluation=evaluation)
        options = FineTuning(one, epochs=1, rows=16, length=16, lr=1e-3)
        permprune.finetune(str(pruned), subjects[f"trained-{mode}"], options)
        for dtype in ("bf16", "int8", "int4"):
            permprune.pack_folder(pruned, subjects[f"{dtype}-{mode}"], dtype=dtype)
    config, search = KVConfig(window=0, sinks=2), permprune.KVSearch(calibration=one, samples=4, length=16)
    permprune.calibrate_kv(checkpoint, subjects["cache"], config, search=search, evaluation=evaluation)
    model, processor, _ = permprune.read_model(checkpoint)
    return subjects, evaluation.examples(model, processor)["input_ids"]
