"""permprune learns channel permutations so that N:M pruning of a Transformer loses less.

The public names are listed in `__init__.pyi` and imported when they are first used, so that the command line's help
takes no torch. Importing the package makes Transformers know packed checkpoints, now or when it is imported itself.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from permprune.system.imports import after_import

_exported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    return _exported(name)


after_import("transformers.modeling_utils", "permprune.inference.quantizer")
