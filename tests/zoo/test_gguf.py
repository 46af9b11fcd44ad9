from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from permprune.zoo.gguf import convert

TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOKENS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "he", "<|endoftext|>"]


@pytest.fixture
def qwen2() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def file(qwen2, tmp_path) -> Path:
    file = tmp_path / "package.gguf"
    writer = GGUFWriter(file, "qwen2")
    config = qwen2.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.NORMAL] * (len(TOKENS) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_eos_token_id(len(TOKENS) - 1)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in qwen2.state_dict().items():
        if name in names:
            writer.add_tensor(names[name], tensor.numpy())
        elif name.startswith("model.layers."):
            number, module = name.removeprefix("model.layers.").split(".", 1)
            module, kind = module.rsplit(".", 1)
            writer.add_tensor(f"blk.{number}.{TENSORS[module]}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_in_parts(qwen2, file, count, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    folder.mkdir()
    whole = file.read_bytes()
    step = len(whole) // count + 1
    parts = [source / f"part{number}" for number in range(count)]
    for number, part in enumerate(parts):
        part.write_bytes(whole[number * step : (number + 1) * step])
    convert(parts, folder)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert type(converted) is Qwen2ForCausalLM
    assert converted.get_input_embeddings().weight is converted.get_output_embeddings().weight
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, qwen2(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("hello").input_ids[:3] == [27, 11, 11]
