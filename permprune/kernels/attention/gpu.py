"""A Triton kernel for attention of a few queries to packed keys and values, for GPUs.

On the CPU, tests run it in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from permprune.kernels.attention.states import kept_count, numbered
from permprune.pattern import Pattern

PART, TOKENS = 256, 32
"""Tokens of a program, and those that it unpacks at a time."""

SMALLEST = 16
"""The smallest side of a tile of a GPU's matrix units."""


@dataclass(frozen=True, eq=False)
class PackedTensors:
    """Packed keys or values: `parts` as in `permprune.kv.packing`, `level` fp32 (heads, width), and the `pattern` or
    the `bits`, 0 for whole numbers."""

    parts: Mapping[str, Tensor]
    level: Tensor
    pattern: Pattern | None
    bits: int

    @property
    def tensors(self) -> list[Tensor]:
        """The values, codes, signs, amplitudes, scales and levels; the values in place of parts that are absent, and
        what numbers of few bits stand for in place of the levels."""
        names = ("values", "code", "signs", "amplitude", "scale")
        table = numbered(self.bits, self.level.device) if self.bits else self.level
        return [*(self.parts.get(name, self.parts["values"]) for name in names), table]

    @property
    def sizes(self) -> list[int]:
        """The tokens of a head for which there is memory, the width, the kept values, and the sizes of their tensor,
        the codes and the signs."""
        width, tokens = self.level.shape[-1], self.parts["values"].shape[2]
        values, code, signs = (self.parts[n].shape[-1] if n in self.parts else 0 for n in ("values", "code", "signs"))
        return [tokens, width, kept_count(self.pattern, width), values, code, signs]

    def kinds(self, side: str) -> dict[str, int]:
        """The compile-time arguments of the kernel for keys (`side` "K") or values ("V")."""
        arguments = {
            "BITS": self.bits,
            "CODED": self.pattern is not None,
            "SIGNS": "amplitude" in self.parts,
            "SCALED": "scale" in self.parts,
            "WIDTH": max(SMALLEST, triton.next_power_of_2(self.level.shape[-1])),
        }
        return {f"{side}_{name}": value for name, value in arguments.items()}


@triton.jit
def _states(
    values, code, signs, amplitude, scale, level, token, inside, head, width, kept, size, code_bytes, sign_bytes,
    BITS: tl.constexpr, CODED: tl.constexpr, SIGNS: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the states of some tokens, fp32 (tokens, WIDTH), with zeros after the width.

    No value outside a token is read, even if its code is damaged.
    """
    channel = tl.arange(0, WIDTH)[None, :]
    shown = inside[:, None] & (channel < width)
    line = token[:, None]
    bit = shown.to(tl.int32)
    if BITS:
        number = bit * 0
        for plane in tl.static_range(BITS):
            at = values + line * size + plane * (size // BITS) + channel // 8
            number += ((tl.load(at, mask=shown, other=0).to(tl.int32) >> (channel % 8)) & 1) << plane
        state = tl.load(level + number, mask=shown, other=0)
    else:
        if CODED:
            byte = tl.load(code + line * code_bytes + channel // 8, mask=shown, other=0).to(tl.int32)
            bit = (byte >> (channel % 8)) & 1
        rank = tl.cumsum(bit, axis=1) - bit
        stored = shown & (bit == 1) & (rank < kept)
        state = tl.load(values + line * size + rank, mask=stored, other=0).to(tl.float32)
        lost = channel - rank
        pruned = shown & (bit == 0) & (lost < width - kept)
        if SIGNS:
            recovered = tl.load(amplitude + token, mask=inside, other=0).to(tl.float32)[:, None]
            if SCALED:
                recovered = recovered * 0.5
            recovered = recovered * tl.load(level + head * width + channel, mask=channel < width, other=0)
            byte = tl.load(signs + line * sign_bytes + lost // 8, mask=pruned, other=0).to(tl.int32)
            state = tl.where(pruned, tl.where((byte >> (lost % 8)) & 1 == 1, -recovered, recovered), state)
    if SCALED:
        state = state * tl.load(scale + token, mask=inside, other=0).to(tl.float32)[:, None]
    return state


@triton.jit
def _attend(
    query, added, sums, most, totals,
    k_values, k_code, k_signs, k_amplitude, k_scale, k_level, v_values, v_code, v_signs, v_amplitude, v_scale, v_level,
    heads, rows, tokens, softcap,
    k_capacity, k_width, k_kept, k_size, k_code_bytes, k_sign_bytes,
    v_capacity, v_width, v_kept, v_size, v_code_bytes, v_sign_bytes,
    K_BITS: tl.constexpr, K_CODED: tl.constexpr, K_SIGNS: tl.constexpr, K_SCALED: tl.constexpr, K_WIDTH: tl.constexpr,
    V_BITS: tl.constexpr, V_CODED: tl.constexpr, V_SIGNS: tl.constexpr, V_SCALED: tl.constexpr, V_WIDTH: tl.constexpr,
    ADDED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    head, part, row, channel = line % heads, tl.program_id(1), tl.arange(0, ROWS), tl.arange(0, K_WIDTH)
    used = row < rows
    shown = used[:, None] & (channel[None, :] < k_width)
    queries = tl.load(query + (line * rows + row)[:, None] * k_width + channel[None, :], mask=shown, other=0)
    largest = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, V_WIDTH), tl.float32)
    for i in range(0, PART // TOKENS):
        position = part * PART + i * TOKENS + tl.arange(0, TOKENS)
        inside = position < tokens
        keys = _states(
            k_values, k_code, k_signs, k_amplitude, k_scale, k_level, line * k_capacity + position, inside, head,
            k_width, k_kept, k_size, k_code_bytes, k_sign_bytes, K_BITS, K_CODED, K_SIGNS, K_SCALED, K_WIDTH,
        )  # fmt: skip
        score = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if CAPPED:
            small = tl.exp(-2 * tl.abs(score / softcap))
            score = tl.where(score < 0, -softcap, softcap) * (1 - small) / (1 + small)
        if ADDED:
            at = (line * rows + row)[:, None] * tokens + position[None, :]
            score += tl.load(added + at, mask=used[:, None] & inside[None, :], other=0)
        score = tl.where(inside[None, :], score, float("-inf"))
        now = tl.maximum(largest, tl.max(score, axis=1))
        share = tl.exp(score - now[:, None])
        factor = tl.exp(largest - now)
        values = _states(
            v_values, v_code, v_signs, v_amplitude, v_scale, v_level, line * v_capacity + position, inside, head,
            v_width, v_kept, v_size, v_code_bytes, v_sign_bytes, V_BITS, V_CODED, V_SIGNS, V_SCALED, V_WIDTH,
        )  # fmt: skip
        result = result * factor[:, None] + tl.dot(share, values, input_precision="ieee")
        total = total * factor + tl.sum(share, axis=1)
        largest = now
    to = (line * tl.num_programs(1) + part) * rows + row
    at = tl.arange(0, V_WIDTH)[None, :]
    tl.store(sums + to[:, None] * v_width + at, result, mask=used[:, None] & (at < v_width))
    tl.store(most + to, largest, mask=used)
    tl.store(totals + to, total, mask=used)


def attend(
    query: Tensor,
    keys: PackedTensors,
    values: PackedTensors,
    tokens: int,
    *,
    added: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of a softmax for the first `tokens` packed tokens.

    `query` is fp32 (batch, heads, rows, width), scaled, in the stored order of channels, and `added`, fp32 (batch,
    heads, rows, tokens), is added to the scores, which are soft-capped before. Returns the largest score and the sum of
    e^(score - largest), both fp32 (batch, heads, rows, 1), and the sum of the values with these weights, fp32 (batch,
    heads, rows, width of the values).
    """
    batch, heads, rows, _ = query.shape
    parts, width = triton.cdiv(tokens, PART), values.level.shape[-1]
    sums = query.new_empty(batch, heads, parts, rows, width)
    most, totals = (query.new_empty(batch, heads, parts, rows, 1) for _ in range(2))
    query = query.contiguous()
    _attend[(batch * heads, parts)](
        query, query if added is None else added.contiguous(), sums, most, totals, *keys.tensors, *values.tensors,
        heads, rows, tokens, softcap or 0.0, *keys.sizes, *values.sizes, **keys.kinds("K"), **values.kinds("V"),
        ADDED=added is not None, CAPPED=softcap is not None, PART=PART, TOKENS=TOKENS,
        ROWS=max(SMALLEST, triton.next_power_of_2(rows)),
    )  # fmt: skip
    largest = most.amax(2, keepdim=True)
    factor = (most - largest).exp()
    return largest[:, :, 0], (totals * factor).sum(2), (sums * factor).sum(2)
