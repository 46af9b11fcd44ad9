"""Send written folders to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, errors

from permprune.checkpoints.record import RECORD, read_record
from permprune.errors import PermpruneError
from permprune.report.card import CARD, hub_card
from permprune.report.run import REPORT, render
from permprune.system.files import json_text

MESSAGE = "Upload a model pruned by permprune"


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
    message: str = MESSAGE,
) -> str:
    """Upload a folder that permprune wrote, the whole of it, as one commit; return the address of the repository.

    The card that is uploaded shows how to load the model from the hub; one that you have edited is uploaded as it is.
    If the record has absolute paths, the record and the report that are uploaded have only their last parts.
    The repository is created if it does not exist: `private` or public, or by the organisation's default if None.
    `token` and `endpoint` are those that huggingface_hub is set up with if None (`hf auth login`, `HF_TOKEN`,
    `HF_ENDPOINT`). `revision` is a branch that exists, main by default; `message` is that of the commit. Raises
    `PermpruneError` if the folder is none of permprune's, or if the hub cannot be reached or refuses.
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
        api.create_commit(repo.repo_id, adding, revision=revision, commit_message=message)
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
