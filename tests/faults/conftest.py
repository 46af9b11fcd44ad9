"""What the tests of faults share."""

from collections.abc import Iterator

import pytest
import transformers


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """The application silences Transformers; other tests listen to it."""
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)
    transformers.utils.logging.enable_progress_bar()
