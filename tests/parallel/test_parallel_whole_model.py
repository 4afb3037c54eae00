"""A whole model on a mesh by one call: losses, norms and parameters are those of one process on all ranks' tokens."""

from __future__ import annotations

import pytest
import rank_jobs_whole_model as jobs
import torch
from parallel_layer_cases import close, part_of

LAYOUTS = [
    ({"ep": 4}, "fsdp2"),
    ({"ep": 4}, "ddp"),
    ({"replicas": 2, "ep": 2}, "fsdp2"),
    ({"replicas": 2, "ep": 2}, "ddp"),
    ({"ep": 2, "replicas": 2}, "fsdp2"),
    ({"ep": 2, "expert_tp": 2}, "fsdp2"),
    ({"replicas": 4}, "fsdp2"),
    ({"replicas": 4}, "ddp"),
]


def batches_for(world, steps=6, micro=2):
    torch.manual_seed(7)
    return [[[torch.randint(12, (2, 5)) for _ in range(micro)] for _ in range(world)] for _ in range(steps)]


def by_hand(batches, **options):
    """One process: the tokens of all ranks are one batch."""
    model = jobs.Model()
    together = [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    losses, norms = jobs.take_steps(
        model, optimizer, together, lambda m, n: torch.nn.utils.clip_grad_norm_(m.parameters(), n)
    )
    return losses, norms, model.state_dict()


@pytest.mark.parametrize(("sizes", "data"), LAYOUTS)
def test_steps_equal_one_process(ranks, sizes, data):
    """AdamW, foreach and fused in turns; two micro-batches a step; clipped."""
    options = {"foreach": True} if data == "fsdp2" else {"fused": True}
    batches = batches_for(4)
    losses, norms, state = by_hand(batches)
    assert (norms > jobs.MAX_NORM).all()  # clipping is at work
    for rank, (there, norms_there, values, marks) in enumerate(ranks.run(jobs.train, sizes, data, batches, options)):
        close("losses", there, losses)
        close("norms", norms_there, norms)
        assert values.keys() == state.keys()
        for name, value in state.items():
            if ".experts." in name and "expert_tp" in sizes:
                value = part_of(jobs.Model().blocks[0].moe, name.split("moe.")[1], value, rank, 4, tp=2)
            close(name, values[name], value)
        assert set(marks.values()) == {(True, "ep" not in sizes)}


@pytest.mark.filterwarnings("ignore:dmoe. a MoE layer ran a second training forward")
@pytest.mark.parametrize("sizes", [{"replicas": 2, "ep": 2}, {"ep": 4}])
def test_blocks_in_lists_of_lists(ranks, sizes):
    """A block that is called twice keeps the loss of its second call."""
    model = jobs.Nested()
    torch.manual_seed(7)
    ids = [torch.randint(12, (2, 6)) for _ in range(4)]
    loss = jobs.loss_of(model, torch.cat(ids))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    results = ranks.run(jobs.train_nested, sizes, ids)
    close("loss", torch.stack([there for there, _ in results]).mean(), loss.detach())
    for _, values in results:
        for name, value in model.state_dict().items():
            close(name, values[name], value)


LAYER = {"hidden_size": 6, "ffn_hidden_size": 8, "num_experts": 4, "top_k": 2, "bias": "expert"}


@pytest.mark.parametrize(
    ("fields", "sizes", "dtensor"),
    [
        ({"capacity_factor": 0.5, "capacity_over": "group"}, {"ep": 4}, True),
        ({"gated": False, "shared_ffn_hidden_size": 4}, {"ep": 2, "expert_tp": 2}, True),
        ({"num_experts": 2}, {"ep": 4}, False),
        ({"ffn_hidden_size": [4, 8, 2, 6]}, {"ep": 4}, True),
        ({"ffn_hidden_size": [4, 8, 2, 6], "gated": False}, {"ep": 2, "expert_tp": 2}, False),
        ({"frozen_down_bias": True}, {"replicas": 2, "ep": 2}, True),
    ],
)
def test_a_layer_that_lets_go_of_experts_is_the_one_built_on_ranks(ranks, fields, sizes, dtensor):
    """To the bit; and it keeps no memory of the others."""
    for built, spread in ranks.run(jobs.spread, {**LAYER, **fields}, sizes, dtensor):
        assert built[2:4] == spread[2:4]
        assert spread[4] == built[4]
        for mine, theirs in zip((built[0], *built[1]), (spread[0], *spread[1]), strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)
        assert built[5].keys() == spread[5].keys()
        assert all(torch.equal(value, spread[5][name]) for name, value in built[5].items())


@pytest.mark.parametrize(("sizes", "data"), [({"ep": 4}, None), ({"replicas": 2, "ep": 2}, "fsdp2")])
def test_a_model_on_meta_is_never_whole(ranks, sizes, data):
    fields = {**jobs.FIELDS, "shared_ffn_hidden_size": 4}
    model = jobs.Model(fields)
    torch.manual_seed(7)
    ids = [torch.randint(12, (2, 6)) for _ in range(4)]
    loss = jobs.loss_of(model, torch.cat(ids)).detach()
    results = ranks.run(jobs.from_meta, fields, sizes, data, model.state_dict(), ids)
    close("loss", torch.stack([there for there, *_ in results]).mean(), loss)
    total = sum(p.numel() for p in model.blocks[0].moe.experts.parameters())
    assert [numel for _, numel, _ in results] == [total // 4] * 4
    for name, value in jobs.reset(model).items():
        assert all(torch.equal(values[name], value) for *_, values in results), name


def test_what_cannot_be_is_said(ranks):
    says = [
        "TypeError: parallelize: mesh: expected a DeviceMesh with named dimensions",
        "got ('replicas', 'ep', 'tp'); pass the part of a larger mesh that trains this model",
        "ValueError: parallelize: data: expected 'fsdp2', 'ddp' or None, got 'zero'",
        "ValueError: parallelize: blocks: expected None with data='ddp', got list",
        "ValueError: parallelize: expected a model that nothing wraps, got DistributedDataParallel in it",
        "ValueError: parallelize: expected a model that nothing wraps, got FSDPModel in it",
        "ValueError: Experts.keep: expected plain weights of all 4 experts, got experts that are spread already",
        "ValueError: MoE.spread_experts: ep_group: expected the ranks that are to share the experts, got None",
        "ValueError: Experts.keep: expected plain weights of all 4 experts, got adapters: spread the experts first",
        "ValueError: ep_group: expected num_experts to be a multiple of the ranks, got E = 3 experts for W = 2 ranks",
        "ValueError: parallelize: model: expected experts that are each one layer's, got two layers that share a param",
        "ValueError: MoE: ep_group: expected None in a model that FullyShardedDataParallel (FSDP1) wraps",
    ]
    for told in ranks.run(jobs.refused):
        assert len(told) == len(says)
        for line, expected in zip(told, says, strict=True):
            assert expected in line


def test_fsdp1_with_all_experts_on_each_rank_equals_one_process(ranks):
    batches = batches_for(4)
    model = jobs.Model(dtype=torch.float32)
    together = [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms = jobs.take_steps(
        model, optimizer, together, lambda m, n: torch.nn.utils.clip_grad_norm_(m.parameters(), n)
    )
    for there, norms_there, values in ranks.run(jobs.by_fsdp1, batches):
        close("losses", there, losses, 1e-5)
        close("norms", norms_there, norms, 1e-5)
        for name, value in model.state_dict().items():
            close(name, values[name], value, 1e-5)
