import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from permprune.zoo.models import convert_safetensors


def test_an_encoder_with_its_tokenizer(tiny_tokenizer, tmp_path):
    config = BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertModel(config).eval()
    source, folder = tmp_path / "source", tmp_path / "converted"
    model.half().save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    convert_safetensors([source / name for name in ("config.json", "model.safetensors", "tokenizer.json")], folder)
    converted = AutoModel.from_pretrained(folder)
    assert type(converted) is BertModel
    assert converted.dtype == torch.float32
    inputs = AutoTokenizer.from_pretrained(folder)("the order of the channels", return_tensors="pt")
    assert inputs.input_ids.tolist() == [tiny_tokenizer("the order of the channels").input_ids]
    with torch.no_grad():
        expected = model.float()(**inputs).last_hidden_state
        torch.testing.assert_close(converted(**inputs).last_hidden_state, expected)
