"""What discovery finds, named exactly, on LLaMA-like models and on small modules made to mislead it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from permprune.coupling.discovery import discover
from permprune.coupling.fold import verify_space
from permprune.coupling.space import Coupling
from permprune.errors import PermpruneError

from .coupling_models import FAMILIES, llama, randomised, tokens

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def llama_coupling() -> Coupling:
    return discover(randomised(llama()), tokens())


def spaces_of(coupling: Coupling) -> dict:
    return {space.name: space for space in coupling.spaces}


def check(model: nn.Module, example: dict[str, Tensor]) -> dict:
    """The spaces of a model, each verified."""
    randomised(model)
    coupling = discover(model, example)
    for space in coupling.spaces:
        if space.freedom != "frozen":
            verify_space(model, space, example, 1e-10)
    return spaces_of(coupling)


def test_llama_mlp_space(llama_coupling):
    space = spaces_of(llama_coupling)[f"{LAYER}.mlp.down_proj.input"]
    assert (space.size, space.blocks, space.freedom) == (40, 1, "free")
    assert [member.parameter for member in space.members if member.role == "writes"] == [
        f"{LAYER}.mlp.gate_proj.weight",
        f"{LAYER}.mlp.up_proj.weight",
    ]
    (reader,) = space.readers
    assert (reader.parameter, reader.dims, reader.site) == (
        f"{LAYER}.mlp.down_proj.weight",
        (1,),
        f"{LAYER}.mlp.down_proj.input",
    )


def test_llama_value_channels_move_within_each_kv_head(llama_coupling):
    space = spaces_of(llama_coupling)[f"{LAYER}.self_attn.o_proj.input"]
    assert (space.size, space.blocks, space.freedom) == (4, 3, "blocks")
    members = {member.parameter: member for member in space.members}
    assert set(members) == {f"{LAYER}.self_attn.v_proj.weight", f"{LAYER}.self_attn.o_proj.weight"}
    assert members[f"{LAYER}.self_attn.v_proj.weight"].positions[1].tolist() == [[4, 5, 6, 7]]
    assert members[f"{LAYER}.self_attn.o_proj.weight"].positions[1].tolist() == [
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]


def test_llama_heads_move_in_groups_and_within_them(llama_coupling):
    spaces = spaces_of(llama_coupling)
    groups = spaces[f"{LAYER}.self_attn.heads"]
    assert (groups.size, groups.blocks) == (3, 1)
    assert {member.parameter.split(".")[-2] for member in groups.members} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    heads = spaces[f"{LAYER}.self_attn.heads_in_group"]
    assert (heads.size, heads.blocks) == (2, 3)
    assert {member.parameter.split(".")[-2] for member in heads.members} == {"q_proj", "o_proj"}


@pytest.mark.parametrize("tied", [False, True])
def test_llama_residual_stream_has_every_reader(tied):
    model = llama(tie_word_embeddings=tied)
    (space,) = [space for space in discover(model, tokens()).spaces if space.name.endswith("residual")]
    assert (space.size, space.freedom) == (24, "free")
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    }
    assert {member.parameter for member in space.readers} == expected | (
        {"model.embed_tokens.weight"} if tied else set()
    )
    assert len(space.members) == len({member.parameter for member in space.members})


def test_llama_sites(llama_coupling):
    found = {site.name: (site.readers, site.size, site.gather) for site in llama_coupling.sites}

    def weights(*names: str) -> tuple[str, ...]:
        return tuple(f"model.layers.0.{name}_proj.weight" for name in names)

    first = dict(list(found.items())[:4])
    assert first == {
        "model.layers.0.input_layernorm.output": (
            weights("self_attn.q", "self_attn.k", "self_attn.v"),
            24,
            ("output", "model.layers.0.input_layernorm"),
        ),
        "model.layers.0.self_attn.o_proj.input": (weights("self_attn.o"), 24, ("input",)),
        "model.layers.0.post_attention_layernorm.output": (
            weights("mlp.gate", "mlp.up"), 24, ("output", "model.layers.0.post_attention_layernorm")
        ),
        "model.layers.0.mlp.down_proj.input": (weights("mlp.down"), 40, ("input",)),
    }  # fmt: skip
    assert len(found) == 9
    assert found["model.norm.output"] == (("lm_head.weight",), 24, ("output", "model.norm"))


def test_post_norm_stream_is_read_at_the_inputs_and_frozen_by_the_output():
    family = FAMILIES["bert"]
    coupling = discover(family.build(), family.example())
    residual = spaces_of(coupling)["residual"]
    assert residual.freedom == "frozen"
    assert "returns it" in residual.reason
    readers = {site.readers[0]: site.gather for site in coupling.sites}
    assert readers["encoder.layer.0.attention.self.query.weight"] == ("input",)


class Mlp(nn.Module):
    """up -> `middle` -> down, and beside it a plain up -> relu -> down."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 5)
        self.plain_up, self.plain_down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x))) + self.plain_down(F.relu(self.plain_up(x)))

    def middle(self, h: Tensor) -> Tensor:
        raise NotImplementedError


def mlp(function, width: int = 12) -> nn.Module:
    return type("Example", (Mlp,), {"middle": lambda self, h: function(h)})(width)


X = {"x": torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2)).double()}

FREEZING = {
    "cumsum": lambda h: h.cumsum(-1),
    "sort": lambda h: h.sort(dim=-1).values,
    "flip": lambda h: h.flip(-1),
    "roll": lambda h: h.roll(1, -1),
    "fft": lambda h: torch.fft.rfft(h, n=22, dim=-1).real,
    "constant": lambda h: h + torch.arange(12, dtype=h.dtype),
    "strided slice": lambda h: torch.cat([h[..., ::5]] * 4, -1),
    "picked channels": lambda h: h.gather(-1, torch.arange(11, -1, -1).expand(3, 4, 12)),
    "place of the largest": lambda h: h * h.max(-1, keepdim=True).indices,
    "gather": lambda h: h[..., torch.arange(11, -1, -1)],
    "argmax": lambda h: h * h.argmax(-1, keepdim=True),
    "unfold": lambda h: h.unfold(-1, 2, 1).sum(-1).repeat(1, 1, 2)[..., :12],
    "pad": lambda h: F.pad(h, (1, 1))[..., :12],
    "written in one place": lambda h: (copy := h.clone(), copy[..., 0].zero_())[0],
    "pool": lambda h: F.adaptive_avg_pool1d(h, 12),
    "pool of one": lambda h: h + F.adaptive_avg_pool1d(h[0], 12),
    "groups across pieces": lambda h: F.group_norm(torch.cat([h[..., :5] * 2, h[..., 5:]], -1).mT, 3).mT,
    "scattered": lambda h: h.masked_scatter(h > 0, -h),
    "triangle": lambda h: (h.mT @ h).tril().mean(1, keepdim=True).expand(-1, 4, -1),
    "regrouped": lambda h: h.view(3, 4, 3, 4).transpose(2, 3).reshape(3, 4, 12) + h,
    "einsum": lambda h: torch.einsum("bsd,btd->bst", h, h) @ h,
}


@pytest.mark.parametrize("function", FREEZING.values(), ids=FREEZING)
def test_what_depends_on_the_order_is_frozen_and_the_rest_is_not(function):
    spaces = check(mlp(function), X)
    assert spaces["plain_down.input"].freedom == "free"
    frozen = [space for name, space in spaces.items() if not name.startswith("plain_down")]
    assert all(space.reason for space in frozen if space.freedom == "frozen")
    if function is not FREEZING["regrouped"]:
        assert {space.freedom for space in frozen} == {"frozen"}


def test_an_unknown_op_is_named_with_its_place(monkeypatch):
    monkeypatch.setattr("torch.fx.config.do_not_emit_stack_traces", False)
    (space,) = [s for n, s in check(mlp(lambda h: h.unfold(-1, 1, 1).squeeze(-1)), X).items() if n == "down.input"]
    assert "no rule for unfold" in space.reason
    assert "test_discover.py" in space.reason


HARMLESS = {
    "softmax": (lambda h: h.softmax(-1), 12, 1),
    "rms": (lambda h: h * h.pow(2).mean(-1, keepdim=True).rsqrt(), 12, 1),
    "halves": (lambda h: torch.cat([h[..., :6] * h[..., 6:], h[..., :6]], -1), 6, 1),
    "rotate": (lambda h: h + torch.cat([-h[..., 6:], h[..., :6]], -1), 6, 1),
    "chunks": (lambda h: torch.cat(h.chunk(3, -1)[:2] + h.chunk(3, -1)[1:2], -1), 4, 1),
    "per head": (lambda h: h.view(3, 4, 3, 4).softmax(-1).flatten(2), 4, 3),
    "across heads": (lambda h: h.view(3, 4, 3, 4).softmax(-2).flatten(2), 4, 1),
    "head mean": (lambda h: (h.view(3, 4, 3, 4) - h.view(3, 4, 3, 4).mean(2, keepdim=True)).flatten(2), 4, 1),
    "repeat": (lambda h: h[..., :4].repeat(1, 1, 3), 4, 1),
    "interleave": (lambda h: h[..., :4].repeat_interleave(3, dim=-1), 4, 1),
    "layer norm": (lambda h: F.layer_norm(h, (12,)), 12, 1),
    "rms norm": (lambda h: F.rms_norm(h, (12,)), 12, 1),
    "norm over heads": (lambda h: F.layer_norm(h.view(3, 4, 3, 4), (3, 4)).flatten(2), 4, 3),
    "narrow": (lambda h: torch.cat([h.narrow(-1, 6, 6), h.narrow(-1, 0, 6)], -1), 6, 1),
    "unbind": (lambda h: torch.cat(h.view(3, 4, 3, 4).unbind(2), -1), 4, 1),
    "stack": (lambda h: torch.stack([h[..., :6], h[..., 6:]], -1).flatten(2), 6, 1),
    "picked tokens": (lambda h: h[:, torch.tensor([3, 2, 1, 0])], 12, 1),
    "running tokens": (lambda h: h.cumsum(1), 12, 1),
    "gram": (lambda h: h @ (h.mT @ h), 12, 1),
    "written in place": (lambda h: torch.zeros_like(h).copy_(h).mul_(2), 12, 1),
    "padded tokens": (lambda h: F.pad(h, (0, 0, 1, 1))[:, 1:-1], 12, 1),
    "pooled tokens": (lambda h: F.adaptive_avg_pool1d(h.mT, 4).mT, 12, 1),
    # not > 0: the mean of what is centred is rounding, of whichever sign the order gives it
    "scattered tokens": (lambda h: h.masked_scatter((h.mean(-1, keepdim=True) > 0.05).expand_as(h), h), 12, 1),
    "unused": (lambda h: (h, h[..., 0])[0], 12, 1),
    "even and odd": (lambda h: torch.cat([h[..., ::2], h[..., 1::2]], -1), 6, 1),
    "gathered tokens": (lambda h: h.gather(1, torch.tensor([3, 2, 1, 0])[:, None].expand(3, 4, 12)), 12, 1),
    "largest": (lambda h: h - h.max(-1, keepdim=True).values, 12, 1),
    "group norm": (lambda h: F.group_norm(h.mT, 3).mT, 4, 3),
    "stacked": (lambda h: h.view(3, 4, 3, 4)[:, :, 0].repeat(1, 1, 3), 4, 1),
    "glu": (lambda h: F.glu(h, -1).repeat(1, 1, 2), 6, 1),
}


@pytest.mark.parametrize(("function", "size", "blocks"), HARMLESS.values(), ids=HARMLESS)
def test_symmetric_ops_leave_a_space(function, size, blocks):
    spaces = check(mlp(function), X)
    assert (size, blocks) in {(s.size, s.blocks) for n, s in spaces.items() if not n.startswith("plain")}


def test_mixing_heads_by_matmul_ties_their_channels():
    class Mixed(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(3, 3))

        def middle(self, h: Tensor) -> Tensor:
            heads = h.view(3, 4, 3, 4)
            return (heads + self.mix @ heads).flatten(2)

    assert check(Mixed(), X)["down.input"].blocks == 1


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_shared_key_value_heads(causal):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 24), nn.Linear(6, 12), nn.Linear(6, 12)
            self.o = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).view(3, 4, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            return self.o(y.transpose(1, 2).flatten(2))

    spaces = check(Attention(), X)
    assert (spaces["o.input"].size, spaces["o.input"].blocks) == (4, 3)
    assert (spaces["heads"].size, spaces["heads"].blocks) == (3, 1)
    assert (spaces["heads_in_group"].size, spaces["heads_in_group"].blocks) == (2, 3)


@pytest.mark.parametrize("between", [(48,), (12, 4), (3, 16)])
def test_what_one_projection_stacks_is_told_apart(between):
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(6, 48), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(3, 4, *between).view(3, 4, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
            turned = q * torch.linspace(1, 2, 4, dtype=q.dtype)  # the order of the query's channels counts
            return self.o(F.scaled_dot_product_attention(turned, k, v).transpose(1, 2).flatten(2))

    spaces = check(Fused(), X)
    assert (spaces["o.input"].size, spaces["o.input"].blocks) == (4, 4)
    members = {member.parameter: member for member in spaces["o.input"].members}
    assert set(members) == {"qkv.weight", "qkv.bias", "o.weight"}
    assert members["qkv.weight"].positions.flatten().tolist() == list(range(32, 48))
    heads = {member.parameter: member.positions.shape for member in spaces["heads"].members}
    assert heads == {"qkv.weight": (1, 12, 4), "qkv.bias": (1, 12, 4), "o.weight": (1, 4, 4)}


@pytest.mark.parametrize("normed", [False, True])
def test_a_grouped_convolution_leaves_channels_in_groups_and_whole_groups(normed):
    class Convolved(Mlp):
        def __init__(self) -> None:
            super().__init__(24)
            conv = nn.Conv1d(24, 24, 3, padding=1, groups=4)
            self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2) if normed else conv

        def middle(self, h: Tensor) -> Tensor:
            return h + self.conv(h.mT).mT

    spaces = check(Convolved(), X)
    assert (spaces["down.input"].size, spaces["down.input"].blocks) == (6, 4)
    assert (spaces["heads"].size, spaces["heads"].blocks) == (4, 1)


LOOKUPS = {
    "one key": (lambda key: key, 3),
    "two keys": (lambda key: key.flip(0), 1),
    "a key that changes": (lambda key: (key.view(-1).copy_(key.flip(0)), key)[1], 1),
}


@pytest.mark.parametrize(("second", "blocks"), LOOKUPS.values(), ids=LOOKUPS)
def test_one_table_looked_up_twice_has_an_order_for_each_expert_if_one_key_looks_it_up(second, blocks):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.table = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            key = self.router(x).argmax(-1).clone()
            h = torch.bmm(self.table[key], x.unsqueeze(-1)).squeeze(-1)
            return torch.bmm(self.table[second(key)].mT, torch.relu(h).unsqueeze(-1)).squeeze(-1)

    space = check(Experts(), {"x": X["x"].flatten(0, 1)})["table.input"]
    assert (space.size, space.blocks) == (8, blocks)


@pytest.mark.parametrize(("second", "blocks"), LOOKUPS.values(), ids=LOOKUPS)
def test_looked_up_experts_have_their_own_orders_if_one_key_looks_them_up(second, blocks):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 3)
            self.up, self.bias = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 8))
            self.down = nn.Parameter(torch.randn(3, 5, 8))

        def forward(self, x: Tensor) -> Tensor:
            key = self.router(x).argmax(-1).clone()
            h = torch.relu(torch.bmm(self.up[key], x.unsqueeze(-1)).squeeze(-1) + self.bias[key])
            return torch.bmm(self.down[second(key)], h.unsqueeze(-1)).squeeze(-1)

    space = check(Experts(), {"x": X["x"].flatten(0, 1)})["down.input"]
    assert (space.size, space.blocks) == (8, blocks)
    assert {member.parameter for member in space.members} == {"up", "bias", "down"}


def test_experts_multiplied_in_groups_have_their_own_orders():
    grouped = torch.ops.transformers.grouped_mm_fallback

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 3)
            self.up, self.down = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 8, 5))

        def forward(self, x: Tensor) -> Tensor:
            key = self.router(x).argmax(-1)
            ends = torch.histc(key.double(), 3, 0, 2).cumsum(0).int()
            return grouped(torch.relu(grouped(x[key.argsort()], self.up, ends)), self.down, ends)

    space = check(Experts(), {"x": X["x"].flatten(0, 1)})["down.input"]
    assert (space.size, space.blocks) == (8, 3)
    assert {member.parameter: member.dims for member in space.members} == {"up": (0, 2), "down": (0, 1)}


def test_groups_without_ends_stay_as_they_are():
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 16, 16)), nn.Parameter(torch.randn(3, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch._grouped_mm(torch.relu(torch._grouped_mm(x, self.up)), self.down)

    assert not discover(Batched().bfloat16(), {"x": torch.randn(3, 4, 16).bfloat16()}).spaces


def test_experts_have_their_own_orders():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 3)
            self.up, self.down = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 8, 5))

        def forward(self, x: Tensor) -> Tensor:
            share = self.router(x).softmax(-1).movedim(-1, 0)[..., None]
            each = torch.matmul(torch.relu(torch.matmul(x.expand(3, -1, -1), self.up)), self.down)
            return (share * each).sum(0)

    spaces = check(Experts(), {"x": X["x"].flatten(0, 1)})
    space = spaces["down.input"]
    assert (space.size, space.blocks) == (8, 3)
    assert {member.parameter: member.dims for member in space.members} == {"up": (0, 2), "down": (0, 1)}


@pytest.mark.parametrize("flat", [False, True])
def test_parameters_that_share_memory_are_frozen(flat):
    class Shared(Mlp):
        def __init__(self) -> None:
            super().__init__(10)
            memory = torch.randn(190, dtype=torch.float64)
            self.up.weight = nn.Parameter(memory[:60].view(10, 6))
            self.down.weight = nn.Parameter(memory[(start := 60 if flat else 50) : start + 50].view(5, 10))
            if flat:
                self.flat = nn.Parameter(memory)
                self.plain_up.weight = nn.Parameter(memory[110:158].view(8, 6))

        def middle(self, h: Tensor) -> Tensor:
            return F.relu(h)

    spaces = spaces_of(discover(Shared().double(), X))
    assert "share memory" in spaces["down.input"].reason
    assert ("share memory" in spaces["plain_down.input"].reason) == flat


def test_a_shared_module_makes_one_site():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.linear, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.linear(torch.relu(self.linear(self.first(x)))))

    sites = {site.readers: site.gather for site in discover(randomised(Twice()), X).sites}
    assert sites[("linear.weight",)] == ("input",)
    assert sites[("last.weight",)] == ("input",)


def test_discovery_changes_nothing():
    model = llama().train()
    model.config.use_cache = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    discover(model, tokens())
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is True
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_cache_is_turned_off_inside_as_well():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids: Tensor) -> Tensor:
            output = self.inner(input_ids)
            assert output.past_key_values is None
            return output.logits

    model = Inner()
    discover(model, tokens())
    assert model.inner.config.use_cache is True


def test_sizes_that_depend_on_activations_freeze_what_they_touch():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return self.head(h[h.sum(-1) > 0, :].view(-1, 1, 4)[:, -1, :])

    assert {space.freedom for space in discover(randomised(Last()), X).spaces} == {"frozen"}


SIZED = {
    "split": lambda h, sizes: torch.cat([part * 2 for part in h.split(sizes.tolist(), dim=1)], 1),
    "repeated": lambda h, sizes: h[:, torch.arange(2).repeat_interleave(sizes)],
    "masked": lambda h, sizes: h[:, (torch.arange(4) >= sizes[0]).nonzero()[:, 0]],
    "branch": lambda h, sizes: h * 2 if sizes.max() > 2 else h.flip(-1),
    "picked by a mask": lambda h, sizes: h[:, torch.arange(4) < sizes[1]] * torch.ones(3, 3, 1).double(),
    "written by a mask": lambda h, sizes: (
        copy := h.clone(),
        copy.__setitem__((0, torch.arange(4) < 2), 0.5 * h[1, 2:]),
    )[0],
    "expanded": lambda h, sizes: h.gather(1, (sizes[:1] % 4).expand(3, 1, 12)),
}


@pytest.mark.parametrize("function", SIZED.values(), ids=SIZED)
def test_sizes_and_positions_in_the_inputs_are_constants(function):
    class Sized(Mlp):
        def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
            return self.down(function(self.up(x), sizes))

    space = check(Sized(), {**X, "sizes": torch.tensor([1, 3])})["down.input"]
    assert (space.size, space.freedom) == (12, "free")


def test_an_integer_tensor_that_activations_overwrite_is_no_constant():
    class Overwritten(Mlp):
        def middle(self, h: Tensor) -> Tensor:
            signs = torch.tensor([0, 1])
            signs[0] = (h.sum() > 0).long()
            return h if (signs * 2).sum() > 1 else h.flip(-1)

    with pytest.raises(PermpruneError, match="cannot trace"):
        discover(Overwritten(), {"x": X["x"].float()})


def test_tracing_leaves_the_inputs_and_the_forward_as_they_were():
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(x.mean()))

    model, x = Centred(6, 6), X["x"].float()
    discover(model, {"x": x})
    assert torch.equal(x, X["x"].float())
    assert "forward" not in vars(model)


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(capsys):
    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return y if (y := super().forward(x)).sum() > 0 else x

    with pytest.raises(PermpruneError, match=r"cannot trace the model on x .*gather") as caught:
        discover(Branch(6, 6), {"x": X["x"].float()})
    assert "\n" not in str(caught.value)
    assert not capsys.readouterr().err  # torch prints the graph it has so far
    with pytest.raises(PermpruneError, match="empty"):
        discover(Branch(6, 6), {})


@pytest.mark.slow
@given(st.lists(st.sampled_from([*FREEZING.values(), *(entry[0] for entry in HARMLESS.values())]), max_size=4))
@settings(max_examples=40)
def test_no_chain_of_ops_yields_a_wrong_space(chain):
    def apply(h: Tensor) -> Tensor:
        for function in chain:
            h = function(h)
        return h

    assert check(mlp(apply), X)["plain_down.input"].freedom == "free"
