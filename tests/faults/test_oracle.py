"""The oracle of the fuzz run reads folders as permprune does."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import permprune
from permprune.kernels.product.packed import PackedWeight
from permprune.pattern import Pattern

from .fuzz.oracle import Llama, decode_blocks, read_tensors, same_tensors
from .pruned import WINDOWS, logits, write_pruned, write_source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("pattern", "width"), [("2:4", 40), ("1:4", 128), ("3:6", 66), ("4:8", 200)])
def test_packed_blocks_are_decoded(pattern: str, width: int, dtype: torch.dtype) -> None:
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    packed = PackedWeight.pack(weight * Pattern.parse(pattern).mask(weight.abs()), Pattern.parse(pattern), dtype)
    assert torch.equal(decode_blocks(packed.blocks, pattern, dtype, width).float(), packed.unpack())


@pytest.mark.parametrize("mode", ["fold", "gather"])
def test_folders_have_the_logits_of_the_models(
    mode: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source", tiny_tokenizer)
    dense = Llama(source)
    torch.testing.assert_close(dense.logits(WINDOWS).float(), logits(permprune.read_model(str(source))[0]))
    write_pruned(source, tmp_path / "pruned", mode)
    permprune.pack_folder(tmp_path / "pruned", tmp_path / "packed", dtype="fp32")
    for name in ("pruned", "packed"):
        own = Llama(tmp_path / name)
        torch.testing.assert_close(own.logits(WINDOWS).float(), logits(permprune.load(tmp_path / name)))
        assert not own.off_pattern(dict.fromkeys(own.layers, "2:4"))
    assert dense.off_pattern(dict.fromkeys(dense.layers, "2:4")) == list(dense.layers)


def test_a_single_bit_makes_other_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_checkpoint / "model.safetensors", tmp_path))
    before = read_tensors(path)
    assert same_tensors(before, read_tensors(path))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not same_tensors(before, read_tensors(path))
