"""What the files of a LLaMA's folder say, read and computed without permprune, Transformers or safetensors.

It knows dense checkpoints, folders with gathers and packed folders, in the formats of the documentation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The types of tensors by their names in a safetensors file."""

OTHERS = ("probe.safetensors", "kv.safetensors")
"""Safetensors files that hold no weights."""

BLOCK, CODE = 64, 8
"""Channels of a packed block, and its bytes that say which of them are kept."""


class Unjudged(Exception):
    """The folder holds a model that the oracle does not know."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: eight bytes with the length of a JSON header, the header, and the numbers."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            numbers = torch.frombuffer(bytearray(body[first:last]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = numbers.reshape(entry["shape"])
    return tensors


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the same names, types, shapes and bytes."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].flatten().view(torch.uint8), other[name].flatten().view(torch.uint8))
        for name in one
    )


def holds(weight: Tensor, pattern: str) -> bool:
    """Whether each M consecutive numbers of a row, (rows, width), have at most N that are not zero."""
    n, m = map(int, pattern.split(":"))
    return bool(((weight.unflatten(1, (-1, m)) != 0).sum(-1) <= n).all())


def int4_values(code: Tensor, rest: Tensor, pattern: str) -> Tensor:
    """The kept weights of a block of int4, fp64 (rows, slots), in steps of their scales."""
    pairs = rest[:, 2:].int()
    values = (torch.stack([pairs & 15, pairs >> 4], -1).flatten(1) - 8).double()
    if pattern != "2:4":
        return values
    places = torch.stack([code[:, i // 4] >> 2 * (i % 4) & 3 for i in range(BLOCK // 2)], 1)
    return 2 * values + (places[:, ::2] > places[:, 1::2]).double().repeat_interleave(2, 1)


def decode_blocks(blocks: Tensor, pattern: str, dtype: torch.dtype, width: int) -> Tensor:
    """Return the weight, fp64 (rows, width), in packed rows of uint8 (docs/packed-weights.md)."""
    weight = torch.zeros(len(blocks), -(-width // BLOCK) * BLOCK, dtype=torch.float64)
    for first, block in zip(range(0, weight.shape[1], BLOCK), blocks.chunk(weight.shape[1] // BLOCK, 1), strict=True):
        code, rest = block[:, :CODE].long(), block[:, CODE:]
        scale = torch.ones(len(blocks), 1)
        if dtype == torch.int8:
            scale, rest = rest[:, :4].contiguous().view(torch.float32), rest[:, 4:]
        if dtype == torch.int4:  # two in a byte
            values = int4_values(code, rest, pattern)
        else:
            values = rest.contiguous().view(dtype).double() * scale.double()
        if pattern == "2:4":  # two bits for each kept weight: where it is in its group
            kept = torch.stack([4 * (i // 2) + (code[:, i // 4] >> 2 * (i % 4) & 3) for i in range(BLOCK // 2)], 1)
            weight[:, first : first + BLOCK].scatter_(1, kept, values[:, : BLOCK // 2])
        else:  # a bit for each channel
            bits = torch.stack([code[:, c // 8] >> c % 8 & 1 for c in range(BLOCK)], 1)
            rank = (bits.cumsum(1) - 1).clamp(0, values.shape[1] - 1)
            weight[:, first : first + BLOCK] = torch.where(bits == 1, values.gather(1, rank), 0)
        if dtype == torch.int4:
            word = rest[:, 0].int() + 256 * rest[:, 1].int()
            for c in range(BLOCK):
                weight[:, first + c] *= (1 + (word >> c // 16 * 3 & 7) / 8) * 2.0 ** ((word >> 12) - 13)
    return weight[:, :width]


class Llama:
    """A folder with a LLaMA: its stored tensors, and the logits that they give."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        files = [path for path in folder.glob("*.safetensors") if path.name not in OTHERS]
        self.tensors = read_tensors(min(files))
        record = folder / "permprune.json"
        self.record = json.loads(record.read_text()) if record.exists() else {}
        self.packed = self.config.get("quantization_config") or {}
        self.orders = dict(self._orders())
        self.heads = self.config["num_attention_heads"]
        self.width = self.config.get("head_dim") or self.config["hidden_size"] // self.heads
        self.rope = self.config.get("rope_parameters") or {}
        known = self.config.get("hidden_act", "silu") == "silu" and self.rope.get("rope_type", "default") == "default"
        if not known or self.config.get("attention_bias") or self.config.get("mlp_bias"):
            raise Unjudged

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """The names of the linear layers inside the blocks, and the shapes of their weights."""
        hidden, middle = self.config["hidden_size"], self.config["intermediate_size"]
        queries, keys = (self.width * n for n in (self.heads, self.config["num_key_value_heads"]))
        shapes = {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle),
        }  # fmt: skip
        count = range(self.config["num_hidden_layers"])
        return {f"model.layers.{i}.{name}": shape for i in count for name, shape in shapes.items()}

    def weight(self, name: str) -> Tensor:
        """Return the weight of a linear layer as it is stored, fp64 (outputs, inputs)."""
        if name not in self.packed.get("layers", {}):
            return self.tensors[f"{name}.weight"].double()
        blocks, pattern = self.tensors[f"{name}.blocks"], self.packed["layers"][name]
        return decode_blocks(blocks, pattern, getattr(torch, self.packed["dtype"]), self.layers[name][1])

    def off_pattern(self, patterns: Mapping[str, str]) -> list[str]:
        """Return the layers that do not hold their patterns."""
        return [name for name, pattern in patterns.items() if not holds(self.weight(name), pattern)]

    def perplexity(self, ids: Tensor) -> float:
        """Return the perplexity of each token but the first of token ids, (windows, length)."""
        losses = -self.logits(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        return math.exp(float(losses.mean()))

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits of token ids, fp64 (windows, length, vocabulary)."""
        names = ("model.embed_tokens.weight", "lm_head.weight")
        if self.config.get("tie_word_embeddings"):  # one of them is stored
            names = 2 * tuple(name for name in names if name in self.tensors)[:1]
        table, head = (self.tensors[name].double() for name in names)
        states = self._reordered("output", "model.embed_tokens", table[ids])
        for i in range(self.config["num_hidden_layers"]):
            block = f"model.layers.{i}"
            states = states + self._attention(f"{block}.self_attn", self._norm(f"{block}.input_layernorm", states))
            inner = self._norm(f"{block}.post_attention_layernorm", states)
            gate, up = (self._linear(f"{block}.mlp.{name}_proj", inner) for name in ("gate", "up"))
            states = states + self._linear(f"{block}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
        return self._reordered("input", "lm_head", self._norm("model.norm", states)) @ head.T

    def _attention(self, name: str, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            self._linear(f"{name}.{part}_proj", x).view(batch, length, -1, self.width).transpose(1, 2) for part in "qkv"
        )
        theta = self.rope.get("rope_theta", self.config.get("rope_theta", 10000.0))
        rates = theta ** -(torch.arange(0, self.width, 2).double() / self.width)
        angles = (torch.arange(length).double()[:, None] * rates).repeat(1, 2)
        query, key = (self._rotated(states, angles) for states in (query, key))
        key, value = (states.repeat_interleave(self.heads // states.shape[1], 1) for states in (key, value))
        scores = query @ key.transpose(-1, -2) / self.width**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        read = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        return self._linear(f"{name}.o_proj", read.transpose(1, 2).flatten(2))

    @staticmethod
    def _rotated(states: Tensor, angles: Tensor) -> Tensor:
        first, second = states.chunk(2, -1)
        return states * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean = x.float().square().mean(-1, keepdim=True).double()  # overflows where the model, in fp32, does
        scaled = x * (mean + self.config.get("rms_norm_eps", 1e-6)).rsqrt()
        return self._reordered("output", name, scaled * self.tensors[f"{name}.weight"].double())

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self._reordered("output", name, self._reordered("input", name, x) @ self.weight(name).T)

    def _reordered(self, side: str, name: str, x: Tensor) -> Tensor:
        order = self.orders.get((side, name))
        return x if order is None else x.index_select(-1, order)

    def _orders(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yield the orders of channels at the outputs and inputs of modules, of gathers and of packed layers."""
        for gather in self.record.get("gathers", []):
            order = torch.tensor(gather["order"])
            yield from ((("input", name), order) for name in gather["inputs"])
            if gather["output"]:
                yield ("output", gather["output"]), order
        for name, order in self.tensors.items():
            module, _, last = name.rpartition(".")
            if last in ("order", "channel_order"):
                yield ("input" if last == "order" else "output", module), order


def channels_fit(folder: Path) -> bool:
    """Whether the channels of a pruned cache are permutations with positive, finite numbers."""
    tensors = read_tensors(folder / "kv.safetensors")
    orders = {name: order for name, order in tensors.items() if name.endswith(".order")}
    rest = [tensor for name, tensor in tensors.items() if not name.endswith((".order", ".mean"))]
    permutations = all(
        sorted(row) == list(range(order.shape[1])) for order in orders.values() for row in order.tolist()
    )
    return bool(orders) and permutations and all(bool((t.isfinite() & (t > 0)).all()) for t in rest)


def settings_of_cache(folder: Path) -> Any:
    """Return what the settings of a pruned cache say."""
    return json.loads((folder / "kv.json").read_text())["config"]
