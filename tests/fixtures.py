"""Fixtures that many tests share: tiny random models, their data, and what runs around every test."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Transformers imports Triton: its own functions are interpreted, too

from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from .shapes import check_shapes

check_shapes()  # before the package's other modules import the functions

from permprune.checkpoints.origin import origin_of  # noqa: E402
from permprune.checkpoints.record import read_record  # noqa: E402
from permprune.config import PruneConfig  # noqa: E402
from permprune.coupling.discovery import discover  # noqa: E402
from permprune.coupling.space import Coupling  # noqa: E402
from permprune.forecasts.activations import Activations  # noqa: E402
from permprune.forecasts.passes import batch_pass, example_pass  # noqa: E402
from permprune.jobs.speeds import add_speeds  # noqa: E402
from permprune.kernels import library  # noqa: E402
from permprune.pruning.problem import Outline  # noqa: E402
from permprune.report import run  # noqa: E402
from permprune.showcase.base import NotShown  # noqa: E402
from permprune.showcase.kinds import showing_of  # noqa: E402
from permprune.zoo.models import resolve_model  # noqa: E402

logging.getLogger("torch.__trace").propagate = True  # else pytest attaches a handler, and torch describes each trace

torch.fx.config.do_not_emit_stack_traces = True  # they take a third of the time of a trace; messages name lines by them

settings.register_profile("untimed", deadline=None)  # on a loaded machine an example may take as long as it likes
settings.load_profile("untimed")

SENTENCES = [
    "the order of the channels decides which weights survive",
    "a permutation of the channels changes nothing in the dense model",
    "two of every four weights are kept and the other two are dropped",
    "the text is short but it has enough words for a few small windows",
]


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run of a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=[*library.names(), "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The native kernels of each instruction set of this processor in turn, then PyTorch instead of them."""
    library.chosen.cache_clear()
    monkeypatch.setenv(library.FORCED, request.param)
    yield request.param
    library.chosen.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed in blocks is so in blocks that are as small beside tiny models as beside real ones."""
    for module in ("permuters.bundles", "permuters.reconstruction", "forecasts.costs"):
        monkeypatch.setattr(f"permprune.{module}.BLOCK", 2**12)
    monkeypatch.setattr("permprune.permuters.kept.READ", 2**10)
    monkeypatch.setattr("permprune.calibration.symmetric.STRIP", 2**5)
    monkeypatch.setattr("permprune.kernels.adam.rounding.CHUNK", 2**10)
    monkeypatch.setattr("permprune.pruning.masked.SPAN", 2**12)


PICTURES = run._pictures


@pytest.fixture(scope="session", autouse=True)
def pictureless() -> Iterator[None]:
    """Reports of runs without pictures, which take longer to draw than such small models to prune."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_pictures", lambda _: {})
        yield


@pytest.fixture(scope="module")
def with_pictures() -> Iterator[None]:
    """Reports of runs with their pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_pictures", PICTURES)
        yield


@pytest.fixture(scope="session", autouse=True)
def unshown() -> Iterator[None]:
    """Runs without examples and speeds, which take longer than to prune such small models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permprune.showcase.shown.showing_of", _nothing_shown)
        patch.setattr("permprune.jobs.prune.add_speeds", lambda folder, *_, **__: read_record(folder))
        yield


def _nothing_shown(*_: Any) -> NoReturn:
    raise NotShown("the tests leave them out")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with examples and speeds."""
    monkeypatch.setattr("permprune.showcase.shown.showing_of", showing_of)
    monkeypatch.setattr("permprune.jobs.prune.add_speeds", add_speeds)


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """The application silences Transformers; other tests listen to it."""
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Pruning traces an architecture once a session: hundreds of tests prune the same few.

    The tests of coupling trace by themselves; those that change what a model computes use `retraced`.
    """
    traced: dict[tuple[Any, ...], Coupling] = {}

    def discover_once(model: PreTrainedModel, example: dict[str, torch.Tensor]) -> Coupling:
        config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
        tensors = [(name, t.shape, t.dtype) for name, t in [*model.named_parameters(), *example.items()]]
        attention, gathers = model.config._attn_implementation, origin_of(model).gathers
        key = (type(model), attention, *map(repr, (config, tensors, gathers)))
        if key not in traced:
            traced[key] = discover(model, example)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permprune.plan.discover", discover_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def counted_once() -> Iterator[None]:
    """Forecasts count the passes of a model once a session: every run makes some, with a memory limit dozens."""
    counted: dict[str, Activations] = {}

    def read(value: Any) -> Any:
        """What a count reads of an argument."""
        if isinstance(value, PruneConfig):
            return value.length, value.batch, value.recompute
        return (value.repeated, value.dtype) if isinstance(value, Outline) else value

    def once(count: Callable[..., Activations]) -> Callable[..., Activations]:
        def count_once(model: PreTrainedModel, *arguments: Any, **settings: Any) -> Activations:
            values = [*map(read, arguments), *((name, read(value)) for name, value in settings.items())]
            key = repr((count, type(model), model.config, values))
            if key not in counted:
                counted[key] = count(model, *arguments, **settings)
            return counted[key]

        return count_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permprune.forecasts.run.batch_pass", once(batch_pass))
        for module in ("efforts", "run"):
            patch.setattr(f"permprune.forecasts.{module}.example_pass", once(example_pass))
        yield


@pytest.fixture
def retraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning traces every model anew."""
    monkeypatch.setattr("permprune.plan.discover", discover)


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


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most 128 tokens that knows the letters of `SENTENCES`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=16
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with the tiny LLaMA and its tokenizer."""
    folder = tmp_path / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def small_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, **shape: Any) -> Path:
    """Write a random LLaMA of 64 channels and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, **shape}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


BLOCK: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture
def tiny_bert(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random classifier of texts (no, Maybe, yes) and its tokenizer."""
    folder = tmp_path / "tiny-bert"
    labels = {0: "no", 1: "Maybe", 2: "yes"}
    config = BertConfig(**BLOCK, vocab_size=128, id2label=labels, label2id={name: n for n, name in labels.items()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, unk_token="<unk>", pad_token="</s>", model_max_length=64
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_vit(tmp_path: Path) -> Path:
    """A folder with a random classifier of 16 x 16 images (cat, dog, Owl) and its image processor."""
    folder = tmp_path / "tiny-vit"
    labels = {0: "cat", 1: "dog", 2: "Owl"}
    ViTForImageClassification(
        ViTConfig(
            **BLOCK, image_size=16, patch_size=4, id2label=labels, label2id={name: n for n, name in labels.items()}
        )
    ).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def tiny_ctc(tmp_path: Path) -> Path:
    """A folder with a random recogniser of speech that reads the wave and writes capitals, and its processor."""
    folder = tmp_path / "tiny-ctc"
    config = Wav2Vec2Config(
        **BLOCK,
        vocab_size=32,
        conv_dim=[16, 16],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    letters = ["<pad>", "<s>", "</s>", "<unk>", *"|ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    vocabulary = tmp_path / "letters.json"
    vocabulary.write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    Wav2Vec2Processor(
        feature_extractor=Wav2Vec2FeatureExtractor(return_attention_mask=True),
        tokenizer=Wav2Vec2CTCTokenizer(str(vocabulary)),
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_whisper(tmp_path: Path) -> Path:
    """A folder with a random recogniser that reads one second's spectrogram and writes bytes, and its processor."""
    folder = tmp_path / "tiny-whisper"
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>"]
    tokens = [*special, "<|startofprev|>", "<|startoflm|>", "<|nocaptions|>", "<|notimestamps|>"]
    tokens += sorted(pre_tokenizers.ByteLevel.alphabet())
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=len(tokens),
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperProcessor(
        feature_extractor=WhisperFeatureExtractor(feature_size=8, chunk_length=1),
        tokenizer=WhisperTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]),
    ).save_pretrained(folder)
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
