"""What is shown of models of every kind: examples of the evaluation data, and what the models answer."""

import base64
import copy
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from permprune.checkpoints.io import read_model
from permprune.data.load import load_examples
from permprune.examples import IGNORED, Examples
from permprune.models.modality import POOLING
from permprune.showcase.base import LONGEST, NotShown, Showing
from permprune.showcase.kinds import PROMPT, STRIP, showing_of
from permprune.showcase.shown import Shown

from ..conversations import turns, with_template, write_rows
from ..fixtures import BLOCK, SENTENCES
from ..vision_language import qwen, write_pairs

WINDOWS = Examples({"input_ids": torch.randint(3, 90, (6, 40), generator=torch.Generator().manual_seed(0))})


def answered(showing: Showing) -> list[str]:
    answers = showing()
    assert len(answers) == len(showing.given) == len(showing.expected) == len(showing.pictures) and showing.note
    assert answers == showing()
    return answers


def padded(tokenizer: PreTrainedTokenizerFast) -> Examples:
    own = copy.deepcopy(tokenizer)  # that of the other tests stays as it is
    own.pad_token = "</s>"
    return Examples(dict(own(SENTENCES, padding=True, return_tensors="pt", return_token_type_ids=False)))


def test_a_language_model_continues_text(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer(" ".join(SENTENCES), return_tensors="pt")["input_ids"][:, :60]
    showing = showing_of(tiny_llama, tiny_tokenizer, Examples({"input_ids": ids.repeat(5, 1)}), 3)
    assert len(answered(showing)) == 3 and showing.expected == [None] * 3
    words = showing.given[0].split()
    assert set(words) <= set(" ".join(SENTENCES).split())  # whole words
    with pytest.raises(NotShown):
        showing_of(tiny_llama, tiny_tokenizer, Examples({"input_ids": ids[:, :PROMPT]}), 3)


def test_a_prompt_begins_with_a_sentence(tiny_llama: LlamaForCausalLM) -> None:
    words = ["<s>", *(f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in ["end.", "The", "and", *map(str, range(60))])]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<s>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    text = ["and", "and", "end.", "and", "end.", "The", *map(str, range(60))]
    ids = torch.tensor([[0, *fast(" ".join(text))["input_ids"]]])
    showing = showing_of(tiny_llama, fast, Examples({"input_ids": ids}), 3)
    assert showing.given == [" ".join(["The", *map(str, range(PROMPT - 2))])]


def test_a_masked_language_model_fills_in_words(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForMaskedLM.from_config(BertConfig(**BLOCK, vocab_size=128))
    with pytest.raises(NotShown):
        showing_of(model, tiny_tokenizer, WINDOWS, 3)
    fast = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, mask_token="<unk>")
    showing = showing_of(model, fast, WINDOWS, 3)
    answered(showing)
    assert all("<unk>" in given for given in showing.given)
    assert showing.expected == [fast.decode([int(WINDOWS["input_ids"][place, 20])]).strip() for place in (0, 2, 4)]


def test_an_encoder_and_decoder_write(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    assert len(answered(showing_of(T5ForConditionalGeneration(config), tiny_tokenizer, WINDOWS, 2))) == 2


def test_sentences_have_neighbours(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModel.from_config(BertConfig(**BLOCK, vocab_size=128))
    texts = padded(tiny_tokenizer)
    with pytest.raises(NotShown):
        showing_of(model, tiny_tokenizer, texts, 2)  # an encoder of which nobody knows what it is for
    setattr(model.config, POOLING, "mean")
    twice = Examples.join([texts, texts[:1]])
    showing = showing_of(model.eval(), tiny_tokenizer, twice, 2)
    assert showing.given == [SENTENCES[0], SENTENCES[2]] and answered(showing)[0] == SENTENCES[0]


def test_classes_of_texts(tiny_bert: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, tokenizer, _ = read_model(str(tiny_bert))
    labels = torch.tensor([0, 2, 1, IGNORED])
    texts = padded(tiny_tokenizer)
    showing = showing_of(model, tokenizer, Examples({**texts, "labels": labels}), 2)
    assert showing.given == SENTENCES and showing.expected == ["no", "yes", "Maybe", None]
    assert set(answered(showing)) <= {"no", "Maybe", "yes"}
    model.config.num_labels = 1
    scores = showing_of(model, tokenizer, Examples({**texts, "labels": labels + 0.25}), 1)
    assert scores.kind == "scores" and scores.expected[1] == "2.25"
    assert all(float(answer) for answer in answered(scores))


def test_classes_of_images_have_thumbnails(tiny_vit: Path) -> None:
    model, processor, _ = read_model(str(tiny_vit))
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    pixels = processor(images=[red] * 6, return_tensors="pt")["pixel_values"]  # type: ignore[operator,misc]
    showing = showing_of(model, processor, Examples({"pixel_values": pixels}), 1)
    assert len(answered(showing)) == STRIP and {*showing()} <= {"cat", "dog", "Owl"}
    picture = Image.open(BytesIO(base64.b64decode(showing.pictures[0] or "")))
    seen = picture.getpixel((8, 8))
    assert isinstance(seen, tuple) and seen[0] > 240 and max(seen[1:]) < 15


def test_images_have_neighbours(tiny_vit: Path, shown: None) -> None:
    _, processor, _ = read_model(str(tiny_vit))
    model = ViTModel(ViTConfig(**BLOCK, image_size=16, patch_size=4)).eval()
    pixels = torch.rand(6, 3, 16, 16)
    showed = Shown(model, processor, Examples({"pixel_values": torch.cat([pixels, pixels[:3]])}), 3)
    made = showed.beside({"dense": showed.answers()}, {})
    assert [one.answers["dense"] for one in made.examples] == ["image 7", made.examples[1].answers["dense"], "image 1"]
    assert made.examples[0].pictures["dense"] == made.examples[0].picture == made.examples[2].pictures["dense"]


@pytest.mark.parametrize("folder", ["tiny_whisper", "tiny_ctc"])
def test_speech_has_transcripts(folder: str, request: pytest.FixtureRequest) -> None:
    model, processor, _ = read_model(str(request.getfixturevalue(folder)))
    maker: Any = processor
    waves = [torch.randn(16000).numpy() for _ in range(3)]
    made = maker.feature_extractor(waves, sampling_rate=16000, return_tensors="pt")
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(maker.tokenizer(text)["input_ids"]) for text in ("ONE WORD", "TWO", "NO")], True, IGNORED
    )
    taken = {name: made[name] for name in ("input_features", "input_values") if name in made}
    showing = showing_of(model, processor, Examples({**taken, "labels": labels}), 2)
    answered(showing)
    assert [str(text).lower().split()[-1] for text in showing.expected] == ["word", "two"]
    with pytest.raises(NotShown):
        showing_of(model, processor, Examples(taken), 2)


def test_images_with_texts_are_answered(tmp_path: Path) -> None:
    from permprune.data.images import load_pairs
    from permprune.data.items import Selection

    model, processor = qwen()
    pairs = load_pairs(write_pairs(tmp_path / "pairs", 6), model, processor, Selection("evaluation", 6))
    showing = showing_of(model, processor, pairs, 2)
    assert len(answered(showing)) == 2 and all(showing.expected)


def test_the_first_answer_of_a_conversation_is_expected(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [{"messages": turns("which", "two of four", "no", "the text")}]
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    tokenizer = with_template(tiny_tokenizer)
    examples = load_examples(source, tiny_llama, tokenizer, part="evaluation", count=1, length=64)
    showing = showing_of(tiny_llama, tokenizer, examples, 2)
    assert len(answered(showing)) == 1
    assert showing.given == ["user which assistant"] and showing.expected == ["two of four"]


def test_of_a_long_prompt_the_question_at_its_end_is_shown(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tiny_tokenizer(f"{' '.join(SENTENCES * 2)} which weights survive two of four", return_tensors="pt")[
        "input_ids"
    ]
    labels = torch.full_like(ids, IGNORED)
    labels[:, -3:] = ids[:, -3:]
    showing = showing_of(tiny_llama, tiny_tokenizer, Examples({"input_ids": ids, "labels": labels}), 1)
    assert showing.given[0].startswith("\N{HORIZONTAL ELLIPSIS}") and showing.given[0].endswith("which weights survive")
    assert len(showing.given[0]) == LONGEST + 1 and showing.expected == ["two of four"]


def test_nothing_that_a_model_raises_ends_a_run(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    shown: None,
) -> None:
    def generate(*_: object, **__: object) -> None:
        raise KeyError("of its own")

    tiny_llama.generate = generate  # type: ignore[assignment,method-assign]
    showed = Shown(tiny_llama, tiny_tokenizer, WINDOWS, 2)
    assert showed.answers() == [] == showed.answers()
    assert "of its own" in caplog.text and "of its own" in showed.beside({}, {}).note
