"""The digest of the C sources: the library holds that of the sources from which it was built."""

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """Return the digest of the sources in the folder of the kernels; hatch_build.py runs this file on its own."""
    paths = sorted([*folder.glob("*.[ch]"), *folder.glob("*/*.[ch]")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
