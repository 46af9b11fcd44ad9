"""The model card of a folder: README.md, with the metadata that the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData

from permprune.checkpoints.record import PACKED
from permprune.report.page import fill
from permprune.report.run import decision, dense_sentence, measured_rows
from permprune.report.words import overlap_note
from permprune.system.files import write_whole
from permprune.zoo.models import MODELS

CARD = "README.md"

NAMED = re.compile(r'(?:from_pretrained|permprune\.load)\(("(?:[^"\\]|\\.)*")')
"""The folder in the loading code of a card, quoted."""

FACTS = ("pattern", "mode", "permute", "saliency", "update", "calibration", "samples", "length", "seed")
"""Settings on the card; those that an older record lacks are left out."""


def render_card(record: Mapping[str, Any], config: Mapping[str, Any], source: str, *, on_hub: bool = False) -> str:
    """Return the card for the contents of a permprune.json and a config.json; `source` is the folder or the hub id.

    Licence and base model are named where the record has them. Values of the record are escaped.
    """
    settings, measured = record["settings"], record["measured"]
    architectures = config.get("architectures") or ()
    kind = next(iter(architectures), "Transformer")
    own_classes = [name for name in config.get("auto_map") or () if name.startswith("AutoModel")]
    on = f"Measured on {measured['count']:,} {measured['unit']} of {_name(measured['data'])}." if measured else ""
    body = fill(
        "card.md",
        record=record,
        title=f"{source if on_hub else _name(record['model'])}, {settings['pattern']}",
        base=record.get("base_model") or (kind if on_hub and record["model"] not in MODELS else _name(record["model"])),
        decision=decision(record),
        overlap=overlap_note((measured or {}).get("overlap")),
        on_hub=on_hub,
        source=json.dumps(source, ensure_ascii=False),
        packed=PACKED in record,
        loader=next(iter([*own_classes, *architectures]), "AutoModel"),
        has_code=bool(own_classes),
        writes_text=kind.endswith("ForCausalLM"),
        facts=list(_facts(settings)),
        dense=dense_sentence(record.get("dense")),
        table=measured_rows(record),
        measured=on,
    )
    return f"---\n{_metadata(record).to_yaml()}\n---\n\n{body}"


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


def _metadata(record: Mapping[str, Any]) -> ModelCardData:
    return ModelCardData(
        base_model=record.get("base_model"),
        license=record.get("license"),
        library_name="permprune" if record["gathers"] else "transformers",
        tags=["permprune", "pruning", "sparsity", record["settings"]["pattern"]],
    )


def _facts(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in FACTS:
        if settings.get(name) is not None:
            yield name, str(settings[name]) if name != "calibration" else _names(settings[name])


def _names(sources: str | Sequence[str]) -> str:
    return ", ".join(_name(source) for source in ([sources] if isinstance(sources, str) else sources))


def _name(path: str) -> str:
    """The last part of a path, which tells nothing of the machine that it was on; a hub id as it is."""
    return path if path.count("/") < 2 and not path.startswith((".", "/", "~")) else PurePath(path).name
