"""Writing the folder of a pruned model, and sending it to the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, errors
from transformers import PreTrainedModel

from permprune.checkpoints.companions import CARD
from permprune.checkpoints.io import WRITTEN, load_written, write_weights
from permprune.checkpoints.origin import Origin, origin_of, recorded_patterns, require_patterns
from permprune.checkpoints.probe import PROBE, Probe, check_outputs, make_probe, weight_digests
from permprune.checkpoints.record import RECORD, Record, read_record
from permprune.errors import FinalError, PermpruneError
from permprune.models.forward import computed_in, stored_as
from permprune.models.layers import is_packed
from permprune.models.processors import Processor
from permprune.report.card import hub_card, write_card
from permprune.report.run import REPORT, render, write_report
from permprune.system.files import atomic_folder, json_text, write_json

MESSAGE = "Upload a model pruned by permprune"


def save(model: PreTrainedModel, folder: str | Path, processor: Processor | None = None) -> None:
    """Save a model that permprune pruned or loaded, in either mode, for `load` and `verify`.

    The weights may have been trained since then, if every pruned layer still holds its pattern; the outputs that are
    stored for verification are those of the current weights. `folder` must not exist; it is created atomically. Raises
    `PermpruneError` for a model that permprune did not prune or that was packed, and if a layer no longer holds its
    pattern.
    """
    record = origin_of(model).record
    if record is None:
        raise PermpruneError("permprune did not prune this model: write it with its own save_pretrained")
    if is_packed(model):
        raise PermpruneError("this model is packed: write it with its own save_pretrained, or unpack it first")
    with atomic_folder(Path(folder)) as filled:
        write_model(model, processor, filled)


def write_model(model: PreTrainedModel, processor: Processor | None, folder: Path, **changes: Any) -> None:
    """Write a model to a folder, in the type in which its checkpoint stores weights.

    A model that permprune pruned is written with its record, probe and report; `changes` replace fields of the record.
    Raises `PermpruneError` if a pruned layer does not hold its pattern.
    """
    origin = origin_of(model)
    weights = partial(write_weights, model, processor, origin.dtype)
    if origin.record is None:
        weights(folder)
        return
    require_patterns(model, recorded_patterns(model, origin.record.layers))
    record = dataclasses.replace(origin.record, **changes)
    inputs = require_probe(origin).inputs
    with stored_as(model, origin.dtype), computed_in(model, torch.float32):
        probe = make_probe(model, inputs)
    write_pruned(record, probe, weights, folder, load=partial(load_written, model))


def write_pruned(
    record: Record,
    probe: Probe,
    weights: Callable[[Path], object],
    folder: Path,
    *,
    load: Callable[[Path], PreTrainedModel],
) -> None:
    """Write a pruned model to a folder; `weights(folder)` writes its weights and processor.

    The record gets the digests of the written weights. Then `load(folder)` loads the model, as `load_written`. Raises
    `FinalError` if its outputs are not those of the probe, and `PermpruneError` if it cannot be loaded or run.
    """
    weights(folder)
    probe.write(folder)
    write_record(dataclasses.replace(record, digests=weight_digests(folder)), folder)
    try:
        check_outputs(
            load(folder), probe, f"{WRITTEN}, loaded again,", "it is discarded; report it, or try --mode gather"
        )
    except PermpruneError as error:
        if error.__cause__ is not None:  # such as memory that runs out: the search must not be lost with it
            raise
        raise FinalError(str(error)) from error


def write_record(record: Record, folder: Path) -> None:
    """Write the record of a folder that has its weights and its config, and the pages that show it.

    Raises `PermpruneError` if one of them cannot be written.
    """
    values = record.to_json()
    write_json(folder / RECORD, values)
    write_report(values, folder / REPORT)
    write_card(values, folder)


def require_probe(origin: Origin) -> Probe:
    """Return the probe of a pruned model. Raises `PermpruneError` if its folder does not have one."""
    if origin.probe is None:
        raise PermpruneError(f"{origin.name} lacks {PROBE}: copy the whole folder, or prune the model again")
    return origin.probe


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    message: str = MESSAGE,
) -> str:
    """Upload a folder that permprune wrote, the whole of it, as one commit; return the address of the repository.

    The card that is uploaded shows how to load the model from the hub; one that you have edited is uploaded as it is.
    If the record has absolute paths, the record and the report that are uploaded have only their last parts.
    The repository is created if it does not exist: `private` or public, or by the organisation's default if None.
    `token` and `endpoint` are those that huggingface_hub is set up with if None (`hf auth login`, `HF_TOKEN`,
    `HF_ENDPOINT`). `message` is that of the commit. Raises `PermpruneError` if the folder is none of permprune's, or if
    the hub cannot be reached or refuses.
    """
    folder = Path(folder)
    record = read_record(folder).to_json()
    card = hub_card(record, folder, repo_id)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    contents: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
    if card is not None:
        contents[CARD] = card.encode()
    if (published := _without_folders(record)) != record:
        contents |= {RECORD: json_text(published).encode(), REPORT: render(published).encode()}
    adding = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api = HfApi(endpoint=endpoint, token=token)
    with _reported(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo.repo_id, adding, commit_message=message)
    return str(repo)


def _without_folders(value: Any) -> Any:
    """Replace each absolute path in a value of JSON by its last part, which tells nothing of the machine."""
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


@contextmanager
def _reported(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    try:
        yield
    except (errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled, errors.HFValidationError) as error:
        raise PermpruneError(f"cannot upload to {repo_id}: {_line(error)}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in with `hf auth login`, or give a token that may write there" if status in (401, 403) else ""
        message = error.server_message or _line(error)
        raise PermpruneError(f"the hub refuses {repo_id} ({status}): {message}{advice and f'; {advice}'}") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined] # of httpx, in whichever release the hub's client has
        raise PermpruneError(f"cannot reach the hub for {repo_id}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
