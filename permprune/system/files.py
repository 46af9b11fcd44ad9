"""Atomic writing of files and folders, and the work folders of runs."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from permprune.errors import FinalError, PermpruneError
from permprune.system.imports import on_first_use

with on_first_use(globals()):
    from filelock import FileLock, Timeout

    from permprune.system import distributed

MARKER, LOCK, SCRATCH = ".permprune", ".lock", "scratch"
"""Names in a work folder: the file that marks it as permprune's, the lock, and the subfolder of temporary files."""

PREFIX = ".permprune-"
"""The prefix of the names of temporary folders."""

ADVICE = "free space, or choose another place"


class WriteError(PermpruneError):
    """Raised if a path cannot be written; `reason` is that of the operating system."""

    def __init__(self, path: Path, reason: str, advice: str) -> None:
        super().__init__(f"cannot write {path}: {reason}; {advice}")
        self.reason = reason


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, and rename the result to `path`, so that readers see all of it or nothing.

    A symbolic link at `path` is replaced, not followed. Raises `PermpruneError` if it cannot be written (a full disk, a
    missing permission, a folder or device at `path`).
    """
    with reported(path):
        _require_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _new_folder(path.parent, "new") as folder:
            temporary = folder / path.name
            write(temporary)
            _follow_umask(folder)
            os.replace(temporary, path)


def json_text(value: object) -> str:
    """Return a value as indented JSON, infinities and NaN as null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write a value as `json_text`. Raises `PermpruneError` if it cannot be written."""
    write_whole(path, lambda temporary: temporary.write_text(json_text(value), encoding="utf-8"))


@contextmanager
def atomic_folder(out: Path, within: Path | None = None, advice: str = ADVICE) -> Iterator[Path]:
    """A context that yields a new folder to fill; it is renamed to `out` at the end, or removed if the context raises.

    Until then the folder is in `within`, which must be on the same disk, or by default beside `out`. Raises
    `PermpruneError` if `out` exists, or, with a message that ends in `advice`, if it cannot be written.
    """
    require_absent(out)
    with reported(out, advice), _new_folder(within or out.parent, out.name) as folder:
        yield folder
        _follow_umask(folder)
        os.rename(folder, out)


class WorkFolder:
    """The folder `OUT.partial`, in which a run that writes `out` saves its state, so that it can be resumed.

    `scratch` is a subfolder for temporary files, which a later run does not use.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f"{out.name}.partial"
        self.scratch = self.path / SCRATCH

    def holds_state(self) -> bool:
        """Whether the folder has a state from which `--resume` can continue."""
        entries = self._entries() if self.path.is_dir() else set()
        return any(name not in (MARKER, LOCK, SCRATCH) and not name.startswith(PREFIX) for name in entries)

    @contextmanager
    def held(self, job: str, resume: bool) -> Iterator[WorkFolder]:
        """A context that creates the folder, or takes over that of an interrupted run, and locks it.

        `job` is the name of the command, such as "prune". At the end the folder is removed; if the context raises, a
        folder with a state is kept, except for a `FinalError`. Under `torchrun` the first rank does all this for the
        others. Raises `PermpruneError` if another run has locked the folder; if it contains files that permprune did
        not write or the state of another job; if it contains the state of an interrupted run and `resume` is False; and
        in the cases of `require_new`.
        """
        lock = FileLock(self.path / LOCK, timeout=0)  # from here on `Timeout` is imported as well
        distributed.on_first(lambda: self._open(lock, job, resume))
        try:
            yield self
            distributed.wait()  # until no rank reads from it
        except BaseException as error:
            if not distributed.rank():
                self._close(lock, keep=self.holds_state() and not isinstance(error, FinalError))
            raise
        distributed.on_first(lambda: self._close(lock, keep=False))

    def _open(self, lock: FileLock, job: str, resume: bool) -> None:
        require_new(self.out)
        with reported(self.path):
            self._require_ours()
            self.path.mkdir(exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise PermpruneError(
                    f"another run is writing {self.out}: wait until it ends, or choose another --out"
                ) from None
            try:
                require_absent(self.out)  # the run that had the lock until now may have finished
                for left in (self.scratch, *self.path.rglob(f"{PREFIX}*")):  # by a run that was killed
                    _remove(left)
                self._mark(job)
                if self.holds_state() and not resume:
                    raise PermpruneError(
                        f"{self.path} holds the state of an interrupted run: continue with --resume, or remove it"
                    )
                self.scratch.mkdir()
            except BaseException:
                self._close(lock, keep=self.holds_state())
                raise

    def _require_ours(self) -> None:
        """Raise `PermpruneError` if the path exists and is not a work folder of permprune."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise PermpruneError(f"{self.path} is not a work folder of permprune: move it, or choose another --out")
        entries = self._entries() - {MARKER, LOCK} if self.path.exists() else set()
        # A folder is marked before anything else is written: until then it has at most what a killed `_mark` leaves.
        if not (self.path / MARKER).exists() and not all(name.startswith(PREFIX) for name in entries):
            raise PermpruneError(
                f"{self.path} holds files that permprune did not write: move them, or choose another --out"
            )

    def _mark(self, job: str) -> None:
        path, text = self.path / MARKER, f"permprune {job}\n"
        if not self.holds_state():
            write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        elif (marked := path.read_text(encoding="utf-8", errors="replace")) != text:
            raise PermpruneError(
                f"{self.path} belongs to an interrupted {marked.strip()}: finish or remove it, or choose another --out"
            )

    def _close(self, lock: FileLock, keep: bool) -> None:
        """Release the lock, and remove the folder unless it is to be kept; marker and lock are removed last."""
        with reported(self.path):
            _remove(self.scratch)
            if not keep:
                for name in sorted(self._entries() - {MARKER, LOCK}):
                    _remove(self.path / name)
                _remove(self.path / MARKER)
            lock.release()
            if not keep:
                with suppress(OSError):  # another run may take the lock now; it will see that `out` exists
                    _remove(self.path / LOCK)
                    self.path.rmdir()

    def _entries(self) -> set[str]:
        return {entry.name for entry in self.path.iterdir()}


def gib(size: float, *, up: bool = False) -> str:
    """Format bytes as GiB with three digits, "0.712 GiB" or "1,410 GiB", rounded `up` where they have to suffice."""
    value = size / 2**30
    if up:
        digits = max(0, 2 - math.floor(math.log10(value)))
        value = (math.floor(value * 10**digits) + 1) / 10**digits
    return f"{value:,.0f} GiB" if value >= 100 else f"{value:.3g} GiB"


def require_absent(out: Path) -> None:
    """Raise `PermpruneError` if `out` exists, if its parent folder does not, or if the name is not possible."""
    if "\0" in str(out):
        raise PermpruneError("--out holds a NUL character: choose another name")
    if os.path.lexists(out):
        raise PermpruneError(f"{out} exists already: remove it, or choose another --out")
    if not os.path.lexists(out.absolute().parent):
        raise PermpruneError(f"there is no folder {out.absolute().parent} to write into: create it")


def require_new(out: Path) -> None:
    """Raise `PermpruneError` unless a new file or folder can be written at `out`."""
    require_absent(out)
    require_writable(out)


def require_writable(path: Path) -> None:
    """Raise `PermpruneError` unless `path` can be written; tests it with a temporary file of that name beside it."""
    with reported(path, "choose another place"):
        _require_file(path)
        existing = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=existing) as private:
            (Path(private) / path.name).touch()


def require_space(path: Path, needed: float) -> None:
    """Raise `PermpruneError` unless the disk of `path` has `needed` bytes free."""
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise PermpruneError(
            f"{path} takes about {gib(needed)}, and {gib(free)} are free there: free space, or choose another --out"
        )


def _require_file(path: Path) -> None:
    """Raise `PermpruneError` if there is something other than a file at `path`."""
    if path.exists() and not path.is_file():
        raise PermpruneError(f"{path} is not a file: choose another path")


@contextmanager
def _new_folder(parent: Path, name: str) -> Iterator[Path]:
    """A context that yields a new folder `name` in a temporary folder in `parent`, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent) as private:
        folder = Path(private) / name
        folder.mkdir()
        yield folder


def _follow_umask(folder: Path) -> None:
    """Give all files in a new folder the permissions that the umask leaves, whichever library wrote them."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextmanager
def reported(path: Path, advice: str = ADVICE) -> Iterator[None]:
    """A context that turns errors of the operating system into a `WriteError` of `path`."""
    try:
        yield
    except WriteError as error:
        raise WriteError(path, error.reason, advice) from error
    except (OSError, SafetensorError) as error:
        raise WriteError(path, getattr(error, "strerror", None) or str(error), advice) from error


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _finite(value: object) -> object:
    """Replace infinities and NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
