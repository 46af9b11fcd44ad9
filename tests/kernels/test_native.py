"""Loading the library, doing without it, and how it is built."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.kernels import native
from tests.kernels.test_linear import call
from tests.kernels.weights import packed


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for again, here and after the test."""
    native._library.cache_clear()
    native._kernels.cache_clear()
    yield
    native._library.cache_clear()
    native._kernels.cache_clear()


def test_without_the_library_one_warning_and_the_same_result(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight, x = packed(8, 64), torch.randn(3, 64)
    expected = call(weight, x)
    native._library.cache_clear()
    native._kernels.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libpermprune.so")
    with pytest.warns(UserWarning, match="native kernels do not load") as warned:
        found = [call(weight, x), call(weight, x)]
    assert len(warned) == 1
    assert torch.allclose(found[0], expected, atol=1e-5) and torch.equal(found[0], found[1])
    assert native.names() == []


def test_a_library_that_lacks_functions_is_not_used(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library were older than the Python code."""
    monkeypatch.setattr(native, "LIBRARY", Path(torch._C.__file__))
    with pytest.warns(UserWarning, match="permprune_kernels.*install permprune again"):
        assert not native.available()


def test_kernels_can_be_chosen_by_the_environment(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed(8, 64), torch.randn(3, 64)
    for name in [*native.names(), "torch"]:
        native._kernels.cache_clear()
        monkeypatch.setenv(native.FORCED, name)
        assert native.available() == (name != "torch")
        assert torch.allclose(call(weight, x), x @ weight.unpack().T, atol=1e-5)
    native._kernels.cache_clear()
    monkeypatch.setenv(native.FORCED, "vax")
    with pytest.raises(PermpruneError, match="PERMPRUNE_KERNELS asks for kernels 'vax'"):
        call(weight, x)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may have another OpenMP runtime")
def test_the_threads_of_torch_are_found() -> None:
    assert native._parallel_region() is not None


@pytest.fixture
def hook() -> ModuleType:
    """The build hook of the checkout."""
    path = Path(__file__).parents[2] / "hatch_build.py"
    spec = importlib.util.spec_from_file_location("hatch_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_compiler_is_a_package_unless_one_is_named(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(hook.sys, "platform", "linux")
    monkeypatch.setattr(hook.platform, "machine", lambda: "aarch64")
    assert hook.compiler()[1:5] == ["-m", "ziglang", "cc", "-target"]
    assert hook.compiler()[5] == "aarch64-linux-gnu.2.17"
    assert hook.wheel_platform() == "manylinux_2_17_aarch64"
    monkeypatch.setenv("CC", "ccache gcc")
    assert hook.compiler() == ["ccache", "gcc"]
    assert hook.wheel_platform() == "linux_aarch64"


def test_systems_without_kernels_get_a_plain_wheel(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook.sys, "platform", "linux")
    monkeypatch.setattr(hook.platform, "machine", lambda: "x86_64")
    assert hook.supported()
    monkeypatch.setenv("PERMPRUNE_NATIVE", "0")
    assert not hook.supported()
    monkeypatch.delenv("PERMPRUNE_NATIVE")
    monkeypatch.setattr(hook.platform, "machine", lambda: "riscv64")
    assert not hook.supported()


def test_a_compiler_that_fails_is_named(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / hook.FOLDER / native.LIBRARY.name
    library.parent.mkdir(parents=True)
    library.write_text("the old one")
    monkeypatch.setattr(hook, "ROOT", tmp_path)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(SystemExit, match="set CC to another compiler"):
        hook.build()
    assert library.read_text() == "the old one"
