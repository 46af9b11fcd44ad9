"""Loading the library, doing without it, and how it is built."""

import ctypes
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from permprune.errors import PermpruneError
from permprune.kernels import library, sources
from permprune.kernels.product import native
from tests.kernels.product.test_linear import call
from tests.kernels.product.weights import packed


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for again, here and after the test."""
    library.load.cache_clear()
    library.chosen.cache_clear()
    yield
    library.load.cache_clear()
    library.chosen.cache_clear()


def test_without_the_library_one_warning_and_the_same_result(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight, x = packed(8, 64), torch.randn(3, 64)
    expected = call(weight, x)
    library.load.cache_clear()
    library.chosen.cache_clear()
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libpermprune.so")
    with pytest.warns(UserWarning, match="native kernels do not load") as warned:
        found = [call(weight, x), call(weight, x)]
    assert len(warned) == 1
    assert torch.allclose(found[0], expected, atol=1e-5) and torch.equal(found[0], found[1])
    assert library.names() == []


def test_a_library_that_lacks_functions_is_not_used(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library were older than the Python code."""
    monkeypatch.setattr(library, "LIBRARY", Path(torch._C.__file__))
    with pytest.warns(UserWarning, match="permprune_kernels.*install permprune again"):
        assert not library.available()


def test_kernels_can_be_chosen_by_the_environment(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed(8, 64), torch.randn(3, 64)
    for name in [*library.names(), "torch"]:
        library.chosen.cache_clear()
        monkeypatch.setenv(library.FORCED, name)
        assert library.available() == (name != "torch")
        assert torch.allclose(call(weight, x), x @ weight.unpack().T, atol=1e-5)
    library.chosen.cache_clear()
    monkeypatch.setenv(library.FORCED, "vax")
    with pytest.raises(PermpruneError, match="PERMPRUNE_KERNELS asks for kernels 'vax'"):
        call(weight, x)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may have another OpenMP runtime")
def test_the_threads_of_torch_are_found() -> None:
    assert library._parallel_region() is not None


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
    built = tmp_path / hook.FOLDER / library.LIBRARY.name
    built.parent.mkdir(parents=True)
    built.write_text("the old one")
    shutil.copy(Path(sources.__file__), built.parent)
    monkeypatch.setattr(hook, "ROOT", tmp_path)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(SystemExit, match="set CC to another compiler"):
        hook.build()
    assert built.read_text() == "the old one"


def test_kernels_that_do_not_run_here_can_be_left_out(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(sources.__file__).parent, tmp_path / hook.FOLDER, ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(hook, "ROOT", tmp_path)
    compiled: list[str] = []

    def compile_one(arguments: list[str], scratch: str) -> None:
        compiled.extend(Path(word).name for word in arguments if word.endswith(".c"))
        Path(arguments[-1]).touch()

    monkeypatch.setattr(hook, "run", compile_one)
    assert (tmp_path / hook.build(without_avx512=True)).exists()
    assert {"avx2.c", "without_avx512.c"} <= set(compiled) and not {"avx512.c", "avx512_bf16.c"} & set(compiled)


def test_a_library_built_without_kernels_that_run_here_says_so(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    built: Any = ctypes.CDLL(str(library.LIBRARY))
    built.permprune_left_out = lambda: 1
    monkeypatch.setattr(library.ctypes, "CDLL", lambda *_, **__: built)
    with pytest.warns(UserWarning, match="built on a machine without AVX-512"):
        assert library.available()


WRONG: dict[str, int | None] = {
    "rows": -1, "count": 3, "slots": 65, "number": 5, "kind": 3, "bias_number": 3, "blocks": None,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_contradict_themselves_are_refused(name: str) -> None:
    weight = packed(8, 64)
    weights = native.describe(weight.layout, weight.blocks, torch.zeros(8))
    setattr(weights, name, WRONG[name])
    with pytest.raises((PermpruneError, RuntimeError), match=r"contradict each other|negative dimension"):
        native.multiply(weights, torch.randn(2, 64))
    with pytest.raises(PermpruneError, match=r"contradict each other|cannot be unpacked"):
        native.unpack(weights, 0, torch.empty(8, 64))


def test_a_plain_weight_has_no_codes_to_unpack() -> None:
    weights = native.describe_plain(torch.randn(8, 64))
    with pytest.raises(PermpruneError, match="unpacking a weight failed"):
        native.unpack(weights, 0, torch.empty(8, 64))


def test_sums_of_no_channels_are_not_read() -> None:
    weights = native.describe_blocks(torch.empty(0, dtype=torch.uint8), None, rows=8, width=0)
    with pytest.raises(PermpruneError, match="contradict each other"):
        native.multiply(weights, torch.empty(256, 0), many=True)


@pytest.mark.parametrize("limit", ["width", "channels"])
def test_no_place_is_below_a_negative_limit(limit: str) -> None:
    tensors = {name: torch.zeros(4) for name in ("score", "weight", "pruned")}
    places, mask = torch.arange(4), torch.zeros(4, dtype=torch.uint8)
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        "width": ("mask", {"score": tensors["score"], "places": places, "mask": mask, "size": 4}),
        "channels": ("prune", {**tensors, "groups": places, "count": 1}),
    }
    name, members = jobs[limit]
    with pytest.raises(PermpruneError, match="channels that do not exist"):
        library.run(name, **PATTERN, **members, rows=1, **{limit: -1})


PATTERN = {"n": 2, "m": 4}
JOBS: list[tuple[str, dict[str, Any]]] = [
    ("place", {**PATTERN, "count": -1}),
    ("place", {**PATTERN, "count": 1 << 40}),
    ("place", {**PATTERN, "count": 1, "rows": 1}),
    ("place", {"n": 2}),
    ("mask", {**PATTERN, "rows": 1, "size": -4}),
    ("mask", {"rows": 1, "size": 4, "n": 2, "m": 0}),
    ("mask", {"rows": 1, "size": 4, "n": 4, "m": 4}),
    ("mask", {**PATTERN, "rows": 1, "size": 4, "width": 4}),
    ("keep", {"masking": {**PATTERN, "rows": 1, "size": 4, "width": 4}}),
    ("prune", {**PATTERN, "rows": -1, "count": 1}),
    ("apply", {"rows": 1, "width": -1}),
    ("apply", {"rows": 1, "width": 1, "number": 2}),
    ("step", {"rows": 1, "width": 8, "kept": 9}),
    ("step", {"rows": 1, "width": 8, "kept": 4}),
    ("attend", {"batch": 1, "heads": 1, "group": 1, "count": 1, "length": 1}),
    ("attend", {"batch": 1, "heads": -1}),
    ("unpack_states", {"batch": 1, "heads": 1, "count": 1}),
    ("unpack_states", {"states": {"width": 64, "kept": 64, "tokens": 1}, "batch": 1, "heads": 1, "count": 2}),
    ("unpack_states", {"states": {"width": 64, "kept": 33, "kind": 3}, "batch": 1, "heads": 1}),
    ("unpack_states", {"states": {"width": 64, "kept": 0, "kind": 1}, "batch": 1, "heads": 1}),
]


@pytest.mark.parametrize(("name", "members"), JOBS, ids=lambda value: value if isinstance(value, str) else "")
def test_jobs_that_contradict_themselves_are_refused(name: str, members: dict[str, Any]) -> None:
    with pytest.raises(PermpruneError, match="contradict each other"):
        library.run(name, **members)


def test_structures_are_those_of_the_library() -> None:
    order = torch.arange(4), torch.arange(8)
    job = library.structure(
        "attend", packed=({"width": 4}, {"width": 8}), order=order, query_stride=(1, 2, 3), scaling=0.5
    )
    assert [states.width for states in job.packed] == [4, 8] and list(job.query_stride) == [1, 2, 3]
    assert [pointer.value for pointer in job.order] == [tensor.data_ptr() for tensor in order]
    assert (job.scaling, job.softcap, job.mask.value) == (0.5, 0.0, None)
    assert ctypes.sizeof(job) == 4 * 96 + 8 * (2 + 6 + 9 + 8) + 2 * 4 + 2 * 4 + 8
    with pytest.raises(TypeError, match="struct mask of the native library has no colour"):
        library.structure("mask", colour=1)
    for tensor in (torch.empty(4, dtype=torch.bfloat16), torch.empty(4, device="meta")):
        with pytest.raises(TypeError, match=f"does not read {tensor.dtype} on {tensor.device}"):
            library.structure("attend", partial=tensor)


def test_devices_without_kernels_are_named_once() -> None:
    library.runs_triton.cache_clear()
    with pytest.warns(UserWarning, match="no kernels for mps here.*move the model to"):
        assert not library.runs_triton("mps")
    assert not library.runs_triton("mps") and not library.runs_triton("cpu")


def test_a_library_of_older_sources_is_not_used(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "digest", lambda folder: "new")
    with pytest.warns(UserWarning, match="older than their sources.*hatch_build"):
        assert not library.available()
