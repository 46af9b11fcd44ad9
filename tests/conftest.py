"""Models that many tests share."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from permprune.zoo.models import resolve_model

SENTENCES = [
    "the order of the channels decides which weights survive",
    "a permutation of the channels changes nothing in the dense model",
    "two of every four weights are kept and the other two are dropped",
    "the text is short but it has enough words for a few small windows",
]


def make_tiny_llama() -> LlamaForCausalLM:
    """A random LLaMA in fp32 with grouped query attention and tied embeddings; always the same weights."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return make_tiny_llama()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most 128 tokens that knows the letters of `SENTENCES`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=16
    )


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with the tiny LLaMA and its tokenizer."""
    folder = tmp_path / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_text(tmp_path: Path) -> Path:
    """A text file of a few thousand words."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(SENTENCES[i % 4] for i in range(200)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def smollm_folder() -> Path:
    """The zoo's SmolLM2-135M, fetched and converted where the cache does not hold it."""
    return Path(resolve_model("smollm2-135m"))


@pytest.fixture(scope="session")
def smollm(smollm_folder: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """Model and tokenizer; shared by the session, so leave the weights as they were."""
    return AutoModelForCausalLM.from_pretrained(smollm_folder), AutoTokenizer.from_pretrained(smollm_folder)
