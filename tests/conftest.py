"""Settings of the test run; the fixtures are in `tests/fixtures.py`."""

import atexit
import gc

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures where tests run: pytest-xdist's controller starts sooner without torch and Transformers."""
    if config.getoption("dist", "no") == "no":
        gc.disable()  # imports leave little garbage, but so many objects that a collection takes seconds
        from . import fixtures

        config.pluginmanager.register(fixtures)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need the real model: they are slow, and the first downloads it."""
    for item in items:
        if "smollm_folder" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.network)
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Exclude the objects of the imports from garbage collection until the process ends."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # extension modules report at exit what was not freed
