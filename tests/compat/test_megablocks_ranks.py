"""MegaBlocks' layers on 2 and 4 gloo ranks against one process: results, gradients, bias, losses, parameters."""

from __future__ import annotations

import pytest
import rank_jobs_megablocks as jobs
import torch
from helpers import without_generated_products
from parallel_layer_cases import close

from dmoe.checkpoint import Options, convert, load_layers

pytestmark = without_generated_products

H = 6
TOKENS = (9, 0, 7, 6)


def shares_of(world, tokens=TOKENS):
    torch.manual_seed(7)
    return [tuple(torch.randn(n, H, dtype=torch.float64) for _ in range(2)) for n in tokens[:world]]


def part_of(name, whole, rank, world, experts):
    """What rank holds of a parameter, as MegaBlocks cuts it: rank = s * E + e has part s of expert e."""
    if ".mlp." not in name:
        return whole
    stacked = whole.dim() == 2
    by_expert = whole.view(experts, -1, H) if stacked else whole
    if world <= experts:
        mine = by_expert.chunk(world)[rank]
    else:
        slices, (s, e) = world // experts, divmod(rank, experts)
        features = 2 if not stacked and name.endswith("w1") else 1
        mine = by_expert[e : e + 1].chunk(slices, features)[s]
    return mine.reshape(-1, H) if stacked else mine


def alone(kind, options, shares):
    """One process: all ranks' tokens as one batch, each rank's losses, and the gradients of the sum of all."""
    layer, args = jobs.seeded(kind, **options)
    x = torch.cat([x for x, _ in shares]).requires_grad_()
    grad_y = torch.cat([grad_y for _, grad_y in shares])
    y = jobs.total(layer(x))
    jobs.losses_of(args)
    loss, of_ranks = (y * grad_y).sum(), []
    lengths = [len(tokens) for tokens, _ in shares]
    for tokens in x.split(lengths):
        layer(tokens)
        of_ranks.append(jobs.losses_of(args))
        loss = loss + sum(of_ranks[-1])
    loss.backward()
    return layer, {
        "y": y.detach().split(lengths),
        "x": x.grad.split(lengths),
        "losses": of_ranks,
        "gradients": {name: p.grad for name, p in layer.named_parameters()},
    }


# Kind, ranks, options, and whether a hook has the steps run one by one. With 2 experts on 4 ranks two share one.
CASES = {
    "2 ranks": ("dMoE grouped", 2, {}, False),
    "2 ranks, by steps": ("dMoE grouped", 2, {}, True),
    "4 ranks, gated, bias apart": ("dMoE glu", 4, {"bias": True}, False),
    "4 ranks, gated, bias added": ("dMoE glu", 4, {"bias": True, "return_bias": False, "moe_zloss_weight": 0.1}, False),
    "4 ranks, sparse by steps": ("dMoE sparse", 4, {"moe_num_experts": 8}, True),
    "4 ranks, parts of F": ("dMoE glu", 4, {"moe_num_experts": 2, "bias": True}, False),
    "4 ranks, parts of F, by steps": (
        "dMoE grouped",
        4,
        {"moe_num_experts": 2, "moe_normalize_expert_weights": 1},
        True,
    ),
    "4 ranks, one expert": ("dMoE grouped", 4, {"moe_num_experts": 1, "moe_top_k": 1, "ffn_hidden_size": 12}, False),
    "2 ranks, an unknown activation": ("dMoE glu", 2, {"activation_fn": torch.tanh, "shared_expert": True}, False),
    "2 ranks, capacity that binds": ("MoE", 2, {"moe_capacity_factor": 0.6}, False),
    "4 ranks, capacity that binds, by steps": ("MoE", 4, {"moe_capacity_factor": 0.6}, True),
    "4 ranks, no capacity, by steps": ("MoE", 4, {"moe_capacity_factor": 0}, True),
    "4 ranks, capacity, parts of F": (
        "MoE",
        4,
        {"moe_num_experts": 2, "moe_capacity_factor": 0.5, "bias": True},
        False,
    ),
}


@pytest.mark.parametrize(("kind", "world", "options", "by_steps"), CASES.values(), ids=CASES)
def test_a_layer_on_ranks_equals_the_layer_on_one(ranks, kind, world, options, by_steps):
    shares = shares_of(world)
    one, expected = alone(kind, options, shares)
    args = one.args
    state, experts = one.state_dict(), args.moe_num_experts
    results = ranks.run(jobs.layer, kind, options, shares, by_steps, ranks=world)
    slices = max(world // experts, 1)
    for rank, got in enumerate(results):
        assert got["form"] == ("tuple" if args.bias and args.return_bias and not args.shared_expert else "Tensor")
        close("y", got["y"], expected["y"][rank])
        close("y of a copy", got["again"], got["y"], 1e-15)
        close("x", got["x"], expected["x"][rank])
        for name, loss in zip(("balance", "z"), expected["losses"][rank], strict=True):
            close(name, got[name], torch.as_tensor(loss).detach().to(got[name].dtype))
        assert got["calls"] == by_steps
        assert got["mpu"] == (
            *(world, rank, min(world, experts), slices, max(experts // world, 1), args.ffn_hidden_size // slices),
        )
        assert set(got["marks"].values()) == {(True, False, True)}
        assert got["unmarked"] == [name for name, _ in one.named_parameters() if ".mlp." not in name]
        for name, value in got["state"].items():
            assert torch.equal(value, part_of(name, state[name], rank, world, experts)), name
        for name, gradient in got["gradients"].items():
            if ".mlp." in name:  # a mean over ranks already
                close(name, gradient, part_of(name, expected["gradients"][name], rank, world, experts) / world)
        assert ("part " in got["repr"]) == (slices > 1)
    for name, whole in expected["gradients"].items():
        if ".mlp." not in name:
            close(name, sum(got["gradients"][name] for got in results), whole)


@pytest.mark.parametrize("experts", [4, 2])
def test_files_of_ranks_are_those_that_the_checkpoint_tools_know(ranks, experts, tmp_path):
    """Four files of ranks become one layer, and are cut again as the ranks had them."""
    options = {"moe_num_experts": experts, "bias": True, "return_bias": False}
    shares = shares_of(4)
    results = ranks.run(jobs.layer, "dMoE glu", options, shares, False)
    files = [tmp_path / f"rank{rank}.pt" for rank in range(4)]
    for file, got in zip(files, results, strict=True):
        torch.save({f"moe.{name}": value for name, value in got["state"].items()}, file)
    settings = {"top_k": 2, "activation": "gelu_tanh"}
    convert(files, tmp_path / "whole", to="dmoe", options=Options(settings=settings))
    layer = load_layers(tmp_path / "whole")["moe"]
    for (x, _), got in zip(shares, results, strict=True):
        y = layer(x)
        close("y", sum(y) if isinstance(y, tuple) else y, got["y"])
    convert(tmp_path / "whole", tmp_path / "back{rank}.pt", to="megablocks", options=Options(ranks=4))
    for rank, got in enumerate(results):
        back = torch.load(tmp_path / f"back{rank}.pt", weights_only=True)
        assert {name: value.shape for name, value in back.items()} == {
            f"moe.{name}": value.shape for name, value in got["state"].items()
        }
        assert all(torch.equal(back[f"moe.{name}"], value) for name, value in got["state"].items())


@pytest.mark.parametrize("experts", [4, 2])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["dMoE grouped", "dMoE glu"])
def test_expert_parallelism_equals_weight_parallelism(ranks, kind, world, experts):
    """What MegaBlocks compares: one seed, each rank's own tokens, results, and gradients in the order of experts."""
    options = {"moe_num_experts": experts, "bias": True, "moe_loss_weight": 0.0}
    inputs = [x for x, _ in shares_of(world)]
    results = ranks.run(jobs.both_parallelisms, kind, options, inputs, ranks=world)
    one, _ = jobs.seeded(kind, **options)
    names = [name for name, _ in one.named_parameters() if ".mlp." in name]
    gathered = {name: torch.cat([got["weight"]["gradients"][name] for got in results]) for name in names}
    for rank, got in enumerate(results):
        expert, weight = got["expert"], got["weight"]
        assert weight["ranks"] == (world, rank)
        assert set(weight["shapes"].values()) == {(experts * 10 // world, H)}
        x = inputs[rank].clone().requires_grad_()
        y = jobs.total(one(x))
        (y.sum() / world).backward()  # of all ranks in turn: the mean over ranks
        for name in ("y", "x"):
            close(name, expert[name], weight[name])
        close("y", weight["y"], y.detach())
        close("x", weight["x"], x.grad * world)
        for name, gradient in expert["gradients"].items():
            whole = gathered.get(name, weight["gradients"][name])
            close(name, gradient, part_of(name, whole, rank, world, experts))
    for name, whole in gathered.items():
        close(name, whole, one.get_parameter(name).grad)


@pytest.mark.parametrize("by_steps", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_its_dtypes_and_its_accuracy(ranks, autocast, by_steps):
    shares = shares_of(4)
    one, _ = jobs.seeded("dMoE glu", moe_num_experts=2, moe_loss_weight=0.0)
    one = one.bfloat16().double()  # the values that the ranks have
    x = torch.cat([x for x, _ in shares])
    x = (x.float() if autocast else x.bfloat16()).double().requires_grad_()
    y = one(x)
    y.square().sum().backward()
    lengths = [len(tokens) for tokens, _ in shares]
    results = ranks.run(jobs.in_bfloat16, shares, autocast, by_steps)
    for rank, got in enumerate(results):
        expected = {"y": y.detach().split(lengths)[rank], "x": x.grad.split(lengths)[rank]}
        for name, parameter in one.named_parameters():
            if ".mlp." in name:
                expected[name] = part_of(name, parameter.grad, rank, 4, 2) / 4
        for name, whole in expected.items():
            assert got[name].dtype == (torch.float32 if autocast and name != "y" else torch.bfloat16), name
            if whole.numel():
                assert (got[name] - whole).norm() < 0.02 * whole.norm(), name


@pytest.mark.parametrize("how", ["fsdp2 experts.mlp", "fsdp2 experts", "data_parallel", "weight parallelism"])
def test_a_step_of_training_with_replicas_is_that_of_one_process(ranks, how):
    options = {"moe_zloss_weight": 0.1}
    shares = shares_of(4, (5, 5, 5, 5))
    layer, _ = alone("dMoE glu", options, shares)
    for parameter in layer.parameters():
        parameter.grad /= 4
    norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1e9)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    for rank, (state, own_norm) in enumerate(ranks.run(jobs.trained, "dMoE glu", options, shares, how)):
        for name, value in state.items():
            close(name, value, part_of(name, layer.get_parameter(name).detach(), rank % 2, 2, 4))  # halves of rows, too
        if own_norm is not None:
            close("norm", own_norm, norm)


def test_micro_batches_share_one_loss(ranks):
    options = {"moe_zloss_weight": 0.1}
    shares = shares_of(2, (8, 8))
    results = ranks.run(jobs.micro_batches, "dMoE glu", options, shares, 2, ranks=2)
    one, args = jobs.seeded("dMoE glu", **options)
    loss, balances = 0, []
    for x, grad_y in shares:
        halves = []
        for part, dy in zip(x.chunk(2), grad_y.chunk(2), strict=True):
            loss = loss + (one(part) * dy).sum()
            balance, z = jobs.losses_of(args)
            halves.append(balance)
            loss = loss + balance / 2 + z
        balances.append(sum(halves).detach() / 2)
    loss.backward()
    for rank, (balance, gradients) in enumerate(results):
        close("balance", balance, balances[rank])
        for name, gradient in gradients.items():
            if ".mlp." in name:
                close(name, gradient, part_of(name, one.get_parameter(name).grad, rank, 2, 4) / 2)
    router = "router.layer.weight"
    close(router, sum(gradients[router] for _, gradients in results), one.get_parameter(router).grad)


def test_checkpointed_activations_travel_again_and_leave_no_second_loss(ranks):
    options = {"moe_num_experts": 2, "moe_zloss_weight": 0.1}
    for plain, again in ranks.run(jobs.checkpointed, "dMoE glu", options, shares_of(4)):
        assert plain[2] == again[2] == []
        close("balance", plain[0], again[0])
        close("x", plain[1], again[1])
        for name, gradient in plain[3].items():
            close(name, gradient, again[3][name])


def test_what_does_not_fit_is_said_on_every_rank(ranks):
    for rank, told in enumerate(ranks.run(jobs.messages)):
        differing, odd, shared, narrow, group, both, capacity, rows = told
        assert (
            "ParallelDroplessMLP: the ranks of the expert-parallel group disagree: moe_top_k: 1 on ranks 0, 2, 2 on"
            in differing
        )
        assert "moe_num_experts: expected a multiple of the 4 ranks of expert_parallel_group, got 6" in odd
        assert "moe_num_experts: expected a divisor of the 4 ranks of expert_parallel_group" in shared
        assert "ffn_hidden_size: expected a multiple of 2, the ranks that share an expert, got 7" in narrow
        if rank:
            assert "expert_parallel_group: expected a group that this rank belongs to" in group
        else:
            assert group == "done"
        assert both.startswith("NotImplementedError: Arguments: moe_weight_parallelism: expected False, or one rank")
        assert capacity.startswith("NotImplementedError: MoE: moe_weight_parallelism: expected False, or one rank")
        assert rows.startswith("ValueError: Arguments: ffn_hidden_size: expected moe_num_experts * ffn_hidden_size")
