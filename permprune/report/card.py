"""The model card of a folder: README.md, with the metadata that the hub reads."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData

from permprune.checkpoints.companions import CARD
from permprune.checkpoints.record import PACKED
from permprune.models.modality import POOLING
from permprune.report.page import fill
from permprune.report.run import decision, dense_sentence, measured_rows, mix_sentences
from permprune.report.showcase import answers, plain, table_note, titles
from permprune.report.words import kept_weights, overlap_note
from permprune.system.files import write_whole
from permprune.zoo.models import MODELS

NAMED = re.compile(r'(?:from_pretrained|permprune\.load|SentenceTransformer)\(("(?:[^"\\]|\\.)*")')
"""The folder in the loading code of a card, quoted."""

TRAINED_LATER = "The table and the examples are those of the model before it was trained."

FACTS = (
    "pattern",
    "keep",
    "bytes",
    "max_loss",
    "mode",
    "order",
    "saliency",
    "update",
    "train",
    "calibration",
    "samples",
    "length",
    "seed",
)
"""Settings on the card; those that an older record lacks are left out."""


def render_card(record: Mapping[str, Any], config: Mapping[str, Any], source: str, *, on_hub: bool = False) -> str:
    """Return the card for the contents of a permprune.json and a config.json; `source` is the folder or the hub id.

    Licence and base model are named where the record has them. Values of the record are escaped.
    """
    settings, measured, shown = record["settings"], record["measured"], record.get("showcase")
    kind = next(iter(config.get("architectures") or ()), "Transformer")
    on = f"Measured on {measured['count']:,} {measured['unit']} of {_name(measured['data'])}." if measured else ""
    body = fill(
        "card.md",
        record=record,
        title=f"{source if on_hub else _name(record['model'])}, {settings['pattern']}",
        base=record.get("base_model") or (kind if on_hub and record["model"] not in MODELS else _name(record["model"])),
        decision=decision(record),
        kept=kept_weights(record),
        overlap=overlap_note((measured or {}).get("overlap")),
        source=json.dumps(source, ensure_ascii=False),
        packed=PACKED in record,
        loading=loading_code(record, config, source, on_hub=on_hub),
        continues_text=kind.endswith("ForCausalLM"),
        encodes=bool(config.get(POOLING)) and not record["gathers"],
        generates=kind.endswith("ForConditionalGeneration"),
        facts=[(name, _fact(name, settings[name])) for name in FACTS if settings.get(name) is not None],
        dense=dense_sentence(record.get("dense")),
        mix=mix_sentences(record),
        table=measured_rows(record),
        measured=" ".join(filter(None, (on, table_note(record), TRAINED_LATER if record.get("optimised") else ""))),
        titles=titles(settings["pattern"]),
        shown=shown,
        examples=[(one, map(plain, answers(shown, one))) for one in shown["examples"]] if shown else [],
    )
    metadata = ModelCardData(
        base_model=record.get("base_model"),
        license=record.get("license"),
        library_name="permprune" if record["gathers"] else "transformers",
        tags=["permprune", "pruning", "sparsity", settings["pattern"]],
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def loading_code(record: Mapping[str, Any], config: Mapping[str, Any], source: str, *, on_hub: bool = False) -> str:
    """Return Python code that loads the model of a permprune.json and a config.json from `source`.

    `source` is the folder or, if the model is `on_hub`, its id there. A packed model whose speed was measured in bf16
    is loaded in it.
    """
    name = json.dumps(source, ensure_ascii=False)
    if record["gathers"]:
        lines = ["import permprune"]
        if on_hub:
            lines.append("from huggingface_hub import snapshot_download")
            name = f"snapshot_download({name})"
        return "\n".join([*lines, "", f"model = permprune.load({name})"])
    own_classes = [one for one in config.get("auto_map") or () if one.startswith("AutoModel")]
    loader = next(iter([*own_classes, *(config.get("architectures") or ())]), "AutoModel")
    trusted = ", trust_remote_code=True" if own_classes else ""
    lines = ["import permprune  # with it, Transformers loads packed weights"] if PACKED in record else []
    measured = ((record.get("showcase") or {}).get("sides") or {}).get("pruned") or {}
    in_bf16 = str(measured.get("dtype")).endswith("run in bf16")
    if config.get(POOLING):
        dtype = ', model_kwargs={"dtype": "bfloat16"}' if in_bf16 else ""
        lines += ["from sentence_transformers import SentenceTransformer", ""]
        return "\n".join([*lines, f"model = SentenceTransformer({name}{dtype}{trusted})"])
    dtype = ', dtype="bfloat16"' if in_bf16 else ""
    lines += [f"from transformers import {loader}", "", f"model = {loader}.from_pretrained({name}{dtype}{trusted})"]
    return "\n".join(lines)


def next_steps(record: Mapping[str, Any], folder: Path) -> str:
    """Return what to do with a folder that was just written: commands, and the code that loads it."""
    code, quoted = loading_code(record, _config(folder), str(folder)).replace("\n\n", "\n"), shlex.quote(str(folder))
    return (
        f"permprune verify {quoted}  # N:M in stored order, and the outputs of the masked model\n"
        f"permprune bench {quoted}   # speed, size and memory beside the dense model\n\n{code}"
    )


def write_card(record: Mapping[str, Any], folder: Path) -> None:
    """Write the card of a folder that has its config.json; loading code names the folder."""
    card = render_card(record, _config(folder), folder.name)
    write_whole(folder / CARD, lambda temporary: temporary.write_text(card, encoding="utf-8"))


def hub_card(record: Mapping[str, Any], folder: Path, hub_id: str) -> str | None:
    """Return the card of a folder for the hub; None if the folder's own card is not as `write_card` wrote it."""
    path, config = folder / CARD, _config(folder)
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    named = NAMED.search(card)
    if card and (named is None or card != render_card(record, config, json.loads(named[1]))):
        return None
    return render_card(record, config, hub_id, on_hub=True)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _fact(name: str, value: Any) -> str:
    if name != "calibration":
        return str(value)
    return ", ".join(map(_name, [value] if isinstance(value, str) else value))


def _name(path: str) -> str:
    """The last part of a path, which tells nothing of the machine that it was on; a hub id as it is."""
    return path if path.count("/") < 2 and not path.startswith((".", "/", "~")) else PurePath(path).name
