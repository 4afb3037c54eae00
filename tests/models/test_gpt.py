"""MoEGPT: its arithmetic against plain formulas, with a cache and without, padded, trained, compiled."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from gpt_cases import GATED, ROTARY, small_config, small_model

import dmoe
from dmoe.models import MoEGPT

KINDS = [
    pytest.param({}, id="gpt2"),
    pytest.param({**ROTARY, **GATED}, id="rotary"),
    pytest.param({"norm": "rms", "qk_norm": True, "activation": "relu_squared"}, id="mixed"),
]


def plain_logits(model, ids):
    """The formulas in float64, one sequence and one head after the other; FFNs are the model's own."""
    c, p = model.config, dict(model.named_parameters())

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True) if c.norm == "layer" else x
        eps = torch.finfo(x.dtype).eps if c.norm_eps is None else c.norm_eps
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"]
        return x + p[f"{name}.bias"] if f"{name}.bias" in p else x

    def linear(x, name):
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def placed(x):
        if c.qk_norm:
            x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
        if c.positions == "learned":
            return x
        half = c.head_size // 2
        turned = torch.empty_like(x)
        for t in range(len(x)):
            for i in range(half):
                angle = t * 10000.0 ** (-2 * i / c.head_size)
                a, b = x[t, i], x[t, half + i]
                turned[t, i] = a * math.cos(angle) - b * math.sin(angle)
                turned[t, half + i] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    S, H, D = len(ids), c.hidden_size, c.head_size
    x = p["embedding.weight"][ids]
    x = x + p["positions.weight"][:S] if c.positions == "learned" else x
    for n, block in enumerate(model.blocks):
        rows = linear(norm(x, f"blocks.{n}.attention_norm"), f"blocks.{n}.attention.qkv")
        heads = []
        for h in range(c.num_heads):
            q, k, v = (rows[:, part * H + h * D : part * H + (h + 1) * D] for part in range(3))
            scores = placed(q) @ placed(k).T / math.sqrt(D)
            scores[torch.ones(S, S).triu(1).bool()] = -math.inf
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"blocks.{n}.attention.out")
        x = x + block.ffn(norm(x, f"blocks.{n}.ffn_norm"), token_ids=ids)
    last = norm(x, "norm")
    return last @ p["embedding.weight"].T if c.tied_head else linear(last, "head")


@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas(kind):
    model = small_model(**kind)
    ids = torch.randint(30, (2, 9))
    with torch.no_grad():
        for row, actual in zip(ids, model(ids), strict=True):
            torch.testing.assert_close(actual, plain_logits(model, row), atol=1e-11, rtol=1e-11)


def test_a_dense_ffn_is_gated_or_not():
    x = torch.randn(5, 16, dtype=torch.float64)
    plain, gated = (small_model(moe={}, residual={}, gated=g).blocks[0].ffn for g in (False, True))
    gelu = torch.nn.GELU("tanh")
    with torch.no_grad():
        up = x @ plain.up_proj.weight.T + plain.up_proj.bias
        torch.testing.assert_close(plain(x), gelu(up) @ plain.down_proj.weight.T + plain.down_proj.bias)
        gate, up = (x @ gated.gate_up_proj.weight.T + gated.gate_up_proj.bias).split(24, dim=1)
        torch.testing.assert_close(gated(x), (gelu(gate) * up) @ gated.down_proj.weight.T + gated.down_proj.bias)


def test_names_are_a_contract():
    names = {name: tuple(value.shape) for name, value in MoEGPT(small_config()).state_dict().items()}
    expected = {"embedding.weight": (30, 16), "positions.weight": (20, 16), "norm.weight": (16,), "norm.bias": (16,)}
    for n in range(3):
        for norm in ("attention_norm", "ffn_norm"):
            expected |= {f"blocks.{n}.{norm}.weight": (16,), f"blocks.{n}.{norm}.bias": (16,)}
        expected |= {f"blocks.{n}.attention.qkv.weight": (48, 16), f"blocks.{n}.attention.qkv.bias": (48,)}
        expected |= {f"blocks.{n}.attention.out.weight": (16, 16), f"blocks.{n}.attention.out.bias": (16,)}
    dense = {"up_proj.weight": (24, 16), "up_proj.bias": (24,), "down_proj.weight": (16, 24), "down_proj.bias": (16,)}
    expected |= {f"blocks.0.ffn.{name}": shape for name, shape in dense.items()}
    expected |= {"blocks.1.ffn.router.weight": (4, 16), "blocks.1.ffn.experts.gate_up_proj": (4, 2, 12, 16)}
    expected |= {"blocks.1.ffn.experts.gate_up_bias": (4, 2, 12), "blocks.1.ffn.experts.down_bias": (4, 16)}
    expected |= {"blocks.1.ffn.experts.down_proj": (4, 16, 12), "blocks.2.ffn.moe.router.weight": (3, 16)}
    expected |= {"blocks.2.ffn.moe.experts.up_proj": (3, 12, 16), "blocks.2.ffn.moe.experts.down_proj": (3, 16, 12)}
    expected |= {"blocks.2.ffn.mlp.up_proj.weight": (10, 16), "blocks.2.ffn.mlp.up_proj.bias": (10,)}
    expected |= {"blocks.2.ffn.mlp.down_proj.weight": (16, 10), "blocks.2.ffn.mlp.down_proj.bias": (16,)}
    expected |= {"blocks.2.ffn.coefficient.weight": (2, 16), "blocks.2.ffn.coefficient.bias": (2,)}
    assert names == expected
    assert MoEGPT(small_config(**ROTARY)).state_dict().keys() >= {"head.weight"}
    assert MoEGPT(small_config(**ROTARY, **GATED)).blocks[0].ffn.gate_up_proj.weight.shape == (48, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing_however_the_text_comes(kind):
    model = small_model(**kind)
    ids = torch.randint(30, (3, 12))
    with torch.no_grad():
        whole = model(ids)
        for cuts in ([12], [1] * 12, [5, 1, 1, 3, 2]):
            cache = model.new_cache(3, 12)
            parts = [model(part, cache=cache) for part in ids.split(cuts, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=1e-12)
            assert cache.lengths.tolist() == [12, 12, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_seen_by_nobody(kind):
    """Sequences of 7, 2 and 4 tokens, then 3, 1 and 2 more, beside padding of any ids."""
    model = small_model(**kind)
    ids = torch.randint(30, (3, 12))
    first, more = torch.tensor([7, 2, 4]), torch.tensor([3, 1, 2])
    with torch.no_grad():
        alone = [model(row[: a + b][None])[0] for row, a, b in zip(ids, first, more, strict=True)]
        cache = model.new_cache(3, 12)
        padded = torch.randint(30, (3, 7))
        mask = torch.arange(7) < first[:, None]
        padded[mask] = torch.cat([row[:a] for row, a in zip(ids, first, strict=True)])
        begin = model(padded, token_mask=mask, cache=cache)
        padded, mask = torch.randint(30, (3, 3)), torch.arange(3) < more[:, None]
        padded[mask] = torch.cat([row[a : a + b] for row, a, b in zip(ids, first, more, strict=True)])
        end = model(padded, token_mask=mask, cache=cache)
    assert cache.lengths.tolist() == [10, 3, 6]
    for n, whole in enumerate(alone):
        together = torch.cat([begin[n, : first[n]], end[n, : more[n]]])
        torch.testing.assert_close(together, whole, atol=1e-12, rtol=1e-12)


def test_what_is_not_finite_in_padding_stays_there():
    model = small_model()
    model.embedding.weight.data[29] = math.nan
    ids, mask = torch.tensor([[1, 2, 3], [4, 29, 29]]), torch.tensor([[True] * 3, [True, False, False]])
    with torch.no_grad():
        cache = model.new_cache(2, 4)
        model(ids, token_mask=mask, cache=cache)
        after = model(torch.tensor([[5], [6]]), cache=cache)[:, 0, :29]  # the head is tied: logit 29 is NaN for all
        alone = model(torch.tensor([[4, 6]]))[0, -1, :29]
    torch.testing.assert_close(after[1], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains(kind):
    torch.manual_seed(0)
    model = MoEGPT(small_config(**kind))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.randint(30, (4, 12))
    losses = []
    for _ in range(30):
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        balance = dmoe.aux_loss(model)
        assert balance.item() > 0
        (loss + balance).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert losses[0] < 1.5 * math.log(30), "begins near chance"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_types(kind, dtype):
    exact = small_model(**kind)
    model = copy.deepcopy(exact).to(dtype)
    ids = torch.randint(30, (2, 9))
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        logits = model(ids)
        parts = [model(part, cache=cache) for part in ids.split([6, 1, 2], dim=1)]
        reference = exact.to(dtype).double()(ids)  # the same rounded weights
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    size = float(reference.abs().max())
    # Near ties a narrow type may choose another expert: most tokens have to agree, and all the rest be finite.
    near = 60 * torch.finfo(dtype).eps * size
    for found in (logits, torch.cat(parts, 1)):
        assert ((found.double() - reference).abs().amax(-1) < near).double().mean() > 0.7


def test_rotary_is_exact_in_float64_wherever_the_model_was():
    model = small_model(**ROTARY)
    ids = torch.randint(30, (1, 15))
    with torch.no_grad():
        before = model(ids)
        for moved in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.bfloat16().double().float()):
            state = {name: value.double() for name, value in moved.state_dict().items()}
            again = MoEGPT(moved.config, device="meta", dtype=torch.float64).to_empty(device="cpu").eval()
            again.load_state_dict(state)
            if moved is not model:
                torch.testing.assert_close(again(ids), before, atol=0, rtol=0)
        exact = again.rotary.exact
        again(ids)
        assert torch.equal(again.rotary.cos, exact[0])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_one_graph(kind):
    model = small_model(dtype=torch.float32, **kind)
    ids = torch.randint(30, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids), atol=1e-5, rtol=1e-5)
    loss = compiled(ids).square().mean()
    loss.backward()
    assert model.embedding.weight.grad.abs().sum() > 0
