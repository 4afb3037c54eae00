"""``record_routing`` and ``replay_routing``: the same experts again, however the tokens come; errors that name it."""

from __future__ import annotations

import copy
import dataclasses
import io
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe import MoE, MoEConfig, RoutingRecord, record_routing, replay_routing

H = 8
BASE = {"hidden_size": H, "ffn_hidden_size": 6, "num_experts": 5, "top_k": 2, "load_balancing_coefficient": 0.0}


class Model(nn.Module):
    """MoE layers with residuals and dropout, each block maybe behind a checkpoint: None, "reentrant" or "other"."""

    def __init__(self, depth=2, recompute=None, dropout=0.0, **fields):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(H), "moe": MoE(**BASE | fields)}) for _ in range(depth)
        )
        self.recompute, self.dropout = recompute, nn.Dropout(dropout)

    def forward(self, x, token_mask=None):
        for block in self.blocks:

            def run(x, block=block):
                return x + self.dropout(block["moe"](block["norm"](x), token_mask=token_mask))

            recompute = self.recompute is not None
            x = checkpoint(run, x, use_reentrant=self.recompute == "reentrant") if recompute else run(x)
        return x


def model_of(seed, **options):
    torch.manual_seed(seed)
    return Model(**options)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@st.composite
def cases(draw):
    fields = {
        "num_experts": draw(st.integers(2, 6)),
        "top_k": draw(st.integers(1, 2)),
        "score_function": draw(st.sampled_from(["softmax", "sigmoid"])),
        "gate_normalization": draw(st.sampled_from([None, 1.0])),
        "router": draw(st.sampled_from(["top_k", "cosine"])),
    }
    tokens = draw(st.integers(1, 24))
    cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=3)))
    return (
        fields,
        tokens,
        [0, *cuts, tokens],
        draw(st.sampled_from([None, "reentrant", "other"])),
        draw(st.integers(0, 99)),
    )


@settings(max_examples=40)
@given(case=cases())
def test_micro_batches_and_recomputation_take_what_was_recorded(case):
    """Of another model, whose own choices differ: outputs and gradients are those of the choices, given by hand."""
    fields, tokens, cuts, recompute, seed = case
    sampler, trainer = model_of(seed, **fields), model_of(seed + 1, recompute=recompute, **fields)
    x = torch.randn(tokens, H)
    with record_routing(sampler) as record, torch.no_grad():
        sampler(x)
    parts = [x[a:b].clone().requires_grad_() for a, b in pairwise(cuts)]
    with record_routing(trainer) as again, replay_routing(trainer, record):
        outputs = [trainer(part) for part in parts]
        mine = gradients(trainer, sum(y.square().sum() for y in outputs))
    assert again == record

    by_hand, expected = [part.detach().clone().requires_grad_() for part in parts], []
    for a, b, h in zip(cuts, cuts[1:], by_hand, strict=False):
        for block, ids in zip(trainer.blocks, record.choices.values(), strict=True):
            h = h + block["moe"](block["norm"](h), expert_indices=ids[a:b].long())
        expected.append(h)
    for mine_y, its in zip(outputs, expected, strict=True):
        assert torch.equal(mine_y, its)
    theirs = gradients(trainer, sum(y.square().sum() for y in expected))
    # Gradients of micro-batches are added in the order of backward, which a reentrant checkpoint changes.
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parts, by_hand, strict=True))
    router = dict(trainer.named_parameters())["blocks.0.moe.router.weight"]
    if fields["top_k"] > 1 or fields["gate_normalization"] is None:  # one normalised weight is 1, whatever its score
        assert router.grad.abs().max() > 0


@settings(max_examples=30)
@given(
    recompute=st.sampled_from(["reentrant", "other"]),
    outside=st.booleans(),
    order=st.permutations(range(4)),
    alike=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
)
def test_full_recomputation_has_the_bits_of_none(recompute, outside, order, alike, dropout):
    """Backward of several forwards in any order, inside the context or after it, and with the same tokens twice."""
    sampler, plain = model_of(0), model_of(1, dropout=dropout)
    x = torch.randn(4, 6, H)
    if alike:
        x[2] = x[1]
    with record_routing(sampler) as record, torch.no_grad():
        sampler(torch.randn(24, H))
    found = []
    for how in (None, recompute):
        model = copy.deepcopy(plain)
        model.recompute = how
        torch.manual_seed(7)
        inputs = [each.clone().requires_grad_() for each in x]
        with replay_routing(model, record):
            outputs = [model(each) for each in inputs]
            for n in () if outside else order:
                outputs[n].square().sum().backward()
        for n in order if outside else ():
            outputs[n].square().sum().backward()
        found.append([t.detach() for t in outputs] + [t.grad for t in inputs] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_forwards_that_nobody_can_recompute_are_not_kept():
    model, x = model_of(0), torch.randn(6, H)
    record = _record()
    kept = model.blocks[0]["moe"].router
    with replay_routing(model, record):
        model(x)
    assert not kept.__dict__["_dmoe_replay"].forwards
    model.recompute = "other"
    for _ in range(2):
        with replay_routing(model, record):
            model(x)
    assert len(kept.__dict__["_dmoe_replay"].forwards) == 2


def test_a_recomputation_is_not_recorded():
    for recompute in ("reentrant", "other"):
        model = model_of(0, recompute=recompute)
        with record_routing(model) as record:
            model(torch.randn(5, H, requires_grad=True)).sum().backward()
        assert record.num_tokens == 5


def test_a_recomputation_whose_forward_was_elsewhere():
    model = model_of(0, recompute="other")
    x = torch.randn(5, H, requires_grad=True)
    with record_routing(model) as record:
        y = model(x)
    elsewhere = pytest.raises(RuntimeError, match="recomputes tokens whose bits no forward in this context had")
    with elsewhere, replay_routing(model, record):
        y.sum().backward()
    model(x).sum().backward()  # and it goes on


def test_padding_and_packing():
    """Recorded token by token; replayed as a padded batch, as a packed row, and in another order."""
    sampler, trainer = model_of(0), model_of(1)
    x, lengths = torch.randn(3, 4, H), [4, 1, 3]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    sequences = [x[n, :length] for n, length in enumerate(lengths)]
    with torch.no_grad():
        with record_routing(sampler) as record:
            for sequence in sequences:
                for token in sequence:
                    sampler(token)
        with record_routing(sampler) as padded:
            sampler(x, token_mask=mask)
        assert padded.num_tokens == 8
        with replay_routing(trainer, record):
            by_mask = trainer(x, token_mask=mask)
        with record_routing(trainer) as again, replay_routing(trainer, record):
            packed = trainer(torch.cat(sequences)[None])
        assert again == record
        torch.testing.assert_close(packed[0], by_mask[mask])
        with replay_routing(trainer, record) as replay:
            replay.take(slice(5, 8))
            last = trainer(sequences[2])
            replay.take(torch.tensor([4, 0, 1, 2, 3]))
            mixed = trainer(torch.cat([sequences[1], sequences[0]]))
        torch.testing.assert_close(last, packed[0, 5:])
        torch.testing.assert_close(mixed, packed[0, [4, 0, 1, 2, 3]])


def test_a_sampled_last_token_takes_no_expert():
    model = model_of(0)
    x = torch.randn(6, H)
    with record_routing(model) as record, torch.no_grad():
        model(x[:5])
    with replay_routing(model, record.padded(1)), torch.no_grad():
        y = model(x)
    assert torch.equal(y[5], x[5])
    with torch.no_grad():
        torch.testing.assert_close(y[:5], model(x[:5]))


class Stage(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks


def test_pipeline_stages():
    """Each stage records and replays its own layers, under the whole model's names."""
    model, x = model_of(0, depth=3), torch.randn(7, H)
    with record_routing(model) as whole, torch.no_grad():
        model(x)
    named = Stage(nn.ModuleDict({"1": model.blocks[1], "2": model.blocks[2]}))  # names as in the whole
    numbered = Stage(nn.ModuleList([model.blocks[0]]))  # names of its own: blocks.0, here of layer 0
    other = Stage(nn.ModuleList([model.blocks[2]]))
    names = whole.layers
    assert tuple(dmoe.moe_layers(named)) == names[1:]

    def run(stage):
        for block in stage.blocks.values() if isinstance(stage.blocks, nn.ModuleDict) else stage.blocks:
            block["moe"](x)

    parts = []
    for stage, layers in ((numbered, None), (named, None)):
        with record_routing(stage, layers=layers) as part, torch.no_grad():
            run(stage)
        parts.append(part)
    assert RoutingRecord.merge(parts).layers == names
    with (
        record_routing(other, layers=names[2:]) as mine,
        replay_routing(other, whole.select(names[2:]), layers=names[2:]),
    ):
        run(other)
    assert mine == whole.select(names[2:])
    with (
        pytest.raises(ValueError, match=r"replay_routing: record: expected the model's layers \['blocks.0.moe'\], got"),
        replay_routing(other, whole),
    ):
        pass


def test_a_layer_that_runs_twice_in_a_forward():
    layer = MoE(**BASE)
    x = torch.randn(4, H)
    with record_routing(layer, layers=["loop"]) as record:
        layer(layer(x))
    assert record.num_tokens == 8
    with record_routing(layer, layers=["loop"]) as again, replay_routing(layer, record, layers=["loop"]):
        layer(layer(x + 1))
    assert again == record


def test_compiled_models_run_eagerly_inside():
    layer = MoE(**BASE)
    x = torch.randn(6, H)
    before = torch.compile(layer, backend="eager")
    with torch.no_grad():
        before(x)
        with record_routing(before) as record:
            before(x)
        assert (record.layers, record.num_tokens) == (("",), 6)
        other = torch.compile(MoE(**BASE), backend="eager")
        other(x)
        with record_routing(other) as again, replay_routing(other, record):
            other(x)
    assert again == record


def test_a_layer_that_has_replayed_compiles_in_one_graph():
    layer, x = MoE(**BASE), torch.randn(6, H)
    with torch.inference_mode(), record_routing(layer) as record:
        layer(x)
    with replay_routing(layer, record):
        layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_wrappers_change_no_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = model_of(0)
    names = list(dmoe.moe_layers(model))
    model.blocks[0]["moe"] = checkpoint_wrapper(model.blocks[0]["moe"])
    with record_routing(model) as record:
        model(torch.randn(3, H, requires_grad=True)).sum().backward()
    assert (list(record.layers), record.num_tokens) == (names, 3)


def test_copies_and_files_of_a_layer_have_replayed_nothing():
    model, x = model_of(0), torch.randn(4, H)
    with record_routing(model) as record:
        model(x)
    with replay_routing(model, record):
        inside = copy.deepcopy(model)
        inside(x)
        model(x)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(loaded(x), inside(x))
    with replay_routing(loaded, record):
        loaded(x)
    assert list(model.state_dict()) == list(model_of(0).state_dict())


@pytest.mark.parametrize("family", ["hash", "uniform", "sinkhorn", "base"])
def test_other_families(family):
    torch.manual_seed(0)
    fields = {"top_k": 1} if family in ("base", "sinkhorn", "hash") else {}
    router = dmoe.routing.Hash(vocab_size=50) if family == "hash" else family
    layer = MoE(**BASE | fields, router=router, causal=False).eval()
    x, ids = torch.randn(10, H), torch.randint(50, (10,))
    with record_routing(layer, layers=["a"]) as record:
        layer(x, token_ids=ids)
    with record_routing(layer, layers=["a"]) as again, replay_routing(layer, record.tokens(slice(3, 9)), layers=["a"]):
        layer(torch.randn(6, H), token_ids=ids[3:9])
    assert again == record.tokens(slice(3, 9))


def _record(**fields):
    model = model_of(0, **fields)
    with record_routing(model) as record:
        model(torch.randn(6, H))
    return record


@pytest.mark.parametrize(
    ("record", "run", "match"),
    [
        (
            {"depth": 1},
            None,
            r"record: expected the model's layers \['blocks.0.moe', 'blocks.1.moe'\], got \['blocks.0.moe'\]",
        ),
        ({"top_k": 1}, None, r"layer blocks.0.moe: expected a record of \(E, K\) = \(5, 2\), got \(5, 1\)"),
        ({"num_experts": 4}, None, r"layer blocks.0.moe: expected a record of \(E, K\) = \(5, 2\), got \(4, 2\)"),
        (
            {},
            lambda model: model(torch.randn(7, H)),
            "layer blocks.0.moe: expected a forward of at most 6 tokens.* got 7",
        ),
        (
            {},
            lambda model: model(torch.randn(5, H)),
            r"take all 6 tokens of the record, got tokens left by layer: {'blocks",
        ),
        ({}, lambda model: None, r"got tokens left by layer: {'blocks.0.moe': 6, 'blocks.1.moe': 6}"),
        (
            {},
            lambda model: model.blocks[1]["moe"](torch.randn(2, H), expert_indices=torch.zeros(2, 2).long()),
            "layer blocks.1.moe: expected forwards without expert_indices",
        ),
    ],
    ids=["layers", "k", "e", "too-many", "too-few", "none", "indices"],
)
def test_what_does_not_fit_is_named(record, run, match):
    model = model_of(1)
    with pytest.raises(ValueError, match=f"^replay_routing: .*{match}"), replay_routing(model, _record(**record)):
        run(model)
    with replay_routing(model, _record()):  # nothing is left behind
        model(torch.randn(6, H))


def test_errors_inside_are_the_users_own_and_left_tokens_may_be_allowed():
    model, record = model_of(1), _record()
    with pytest.raises(KeyError), replay_routing(model, record):
        raise KeyError
    with replay_routing(model, record, allow_unused=True) as replay:
        model(torch.randn(2, H))
        assert replay.unused == {"blocks.0.moe": 4, "blocks.1.moe": 4}
        with pytest.raises(RuntimeError, match="inside another replay"), replay_routing(model, record):
            pass
        with pytest.raises(ValueError, match=r"^RoutingRecord\.tokens"):
            replay.take([6])


def test_models_without_choices():
    for call in (record_routing, lambda model: replay_routing(model, _record())):
        none = pytest.raises(ValueError, match=r"expected one with dmoe\.MoE layers, got Linear without any.*to_dmoe")
        with none, call(nn.Linear(2, 2)):
            pass
        experts = Model(router="expert_choice", causal=False, capacity_factor=1.0, top_k=1)
        with pytest.raises(ValueError, match="expected layers whose tokens choose, got"), call(experts):
            pass
        with pytest.raises(ValueError, match=r"expected no nn\.DataParallel"), call(nn.DataParallel(model_of(0))):
            pass
    twice = pytest.raises(ValueError, match="record_routing: layers: expected 2 different names")
    with twice, record_routing(model_of(0), layers=["a", "a"]):
        pass
    with pytest.raises(TypeError, match="record: expected a RoutingRecord, got dict"), replay_routing(model_of(0), {}):
        pass


def test_a_router_of_somebodys_own_is_heard():
    class Own(nn.Module):
        choices = True

        def __init__(self, config):
            super().__init__()
            self.inner = dmoe.routing.build_router(config)

        def forward(self, x, **about):
            routing = self.inner(x, **about)
            return routing if self.choices else dataclasses.replace(routing, expert_indices=None)

        def update_selection_bias(self):
            pass

    torch.manual_seed(0)
    config, x = MoEConfig(**BASE), torch.randn(6, H)
    layer = MoE(config, router_module=Own(config))
    with record_routing(layer) as record:
        layer(x)
    with record_routing(layer) as again, replay_routing(layer, record):
        layer(x + 1)
    assert again == record
    layer.router.choices = False
    nothing = pytest.raises(ValueError, match=r"^record_routing: layer : expected a router whose tokens choose, got no")
    with nothing, record_routing(layer):
        layer(x)


def test_outside_nothing_changes():
    model, x = model_of(0), torch.randn(6, H)
    before = model(x)
    record = _record()
    with replay_routing(model, record):
        model(x)
    assert torch.equal(model(x), before)
    assert MoEConfig(**BASE).batch_invariant is False
