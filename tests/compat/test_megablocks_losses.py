"""The losses over MegaBlocks' layers: their values, and that nothing is kept longer than a round."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from helpers import without_generated_products
from megablocks_cases import arguments
from megablocks_oracle import (
    layer_with,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe.compat import megablocks
from dmoe.compat.megablocks.layers import saved
from dmoe.compat.megablocks.layers.moe import _LOADS, batched_load_balancing_and_z_loss
from dmoe.compat.megablocks.layers.router import _LOGITS, batched_router_zloss, clear_router_zloss

pytestmark = without_generated_products


# ---- The losses over layers


def test_the_batched_loss_is_one_when_even_and_counts_every_layer():
    args = arguments(num_layers=3, moe_loss_weight=0.5)
    for _ in range(3):
        megablocks.save_load_balancing_loss((torch.tensor([3, 3, 3, 3]), torch.full((6, 4), 0.25)))
    assert megablocks.batched_load_balancing_loss(args).item() == pytest.approx(0.5)
    megablocks.clear_load_balancing_loss()
    # every token to expert 0, with certainty: E times as much
    for _ in range(3):
        megablocks.save_load_balancing_loss((torch.tensor([12, 0, 0, 0]), torch.eye(4)[[0] * 6]))
    assert megablocks.batched_load_balancing_loss(args).item() == pytest.approx(2.0)


def test_a_pipeline_stage_has_its_share_of_layers():
    entry = (torch.tensor([3, 3, 3, 3]), torch.full((6, 4), 0.25))
    for options, count in (
        ({"num_layers": 6, "pipeline_model_parallel_size": 3}, 2),
        ({"num_layers": 6, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, 1),
    ):
        args = arguments(**options)
        assert saved.layers_per_stage(args) == count
        for _ in range(count):
            with pytest.raises(ValueError, match=rf"expected {count} layers .*got {len(_LOADS)} since"):
                megablocks.batched_load_balancing_loss(args)
            megablocks.save_load_balancing_loss(entry)
        # the whole model's loss is the sum over its stages
        assert megablocks.batched_load_balancing_loss(args).item() == pytest.approx(0.1 * count / 6)
        megablocks.clear_load_balancing_loss()


def test_counts_beyond_half_precision_do_not_overflow():
    megablocks.save_load_balancing_loss((torch.tensor([70_000]), torch.ones(70_000, 1, dtype=torch.float16)))
    loss = megablocks.batched_load_balancing_loss(arguments(moe_num_experts=1, moe_top_k=1, moe_loss_weight=0.25))
    assert loss.dtype == torch.float16
    assert loss.item() == 0.25


def test_shapes_that_disagree_and_a_weight_of_zero():
    args = arguments(num_layers=2)
    megablocks.save_load_balancing_loss((torch.zeros(4), torch.zeros(6, 4)))
    megablocks.save_load_balancing_loss((torch.zeros(4), torch.zeros(5, 4)))
    with pytest.raises(ValueError, match=r"expert_scores \(6, 4\) of every layer, got \(4,\) and \(5, 4\)"):
        megablocks.batched_load_balancing_loss(args)
    assert megablocks.batched_load_balancing_loss(arguments(moe_loss_weight=0)) == 0.0
    layer, _ = layer_with("dMoE", moe_loss_weight=0)
    megablocks.clear_load_balancing_loss()
    layer(torch.randn(2, 3, 6))
    assert megablocks.get_load_balancing_loss() == []


def test_a_layers_own_loss_is_the_same_without_its_weight():
    layer, args = layer_with("MoE")
    layer(torch.randn(5, 2, 6))
    ((counts, scores),) = megablocks.get_load_balancing_loss()
    own = layer.experts.load_balancing_loss(counts, scores) * args.moe_loss_weight
    torch.testing.assert_close(own, megablocks.batched_load_balancing_loss(args))


@pytest.mark.parametrize("kind", ["MoE", "dMoE"])
def test_zero_tokens_give_zero_losses_and_gradients(kind):
    layer, args = layer_with(kind, moe_zloss_weight=1.0, shared_expert=True)
    x = torch.zeros(0, 3, 6, requires_grad=True)
    out, _ = layer(x)
    loss = out.sum() + megablocks.batched_load_balancing_loss(args) + batched_router_zloss(args).sum()
    assert loss.item() == 0
    loss.backward()
    assert all(not parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)
    assert x.grad.shape == x.shape


def test_an_evaluation_leaves_nothing():
    layer, args = layer_with("dMoE", moe_zloss_weight=1.0)
    layer.eval()
    for _ in range(3):
        layer(torch.randn(2, 3, 6))
    assert len(_LOADS) == len(_LOGITS) == 0
    assert batched_router_zloss(args).item() == 0
    with pytest.raises(ValueError, match="got 0 since"):
        megablocks.batched_load_balancing_loss(args)
    with pytest.warns(UserWarning, match="moe_zloss_weight is 0"):
        assert batched_router_zloss(arguments()) == 0


def test_the_z_loss_has_a_value_for_each_router_in_the_dtype_asked_for():
    model, args = stack(2, bf16=True)
    model(torch.randn(3, 6, dtype=torch.bfloat16))
    logits = [logits.double() for logits in _LOGITS.values()]
    expected = 0.1 * torch.stack([torch.logsumexp(rows, 1).square().mean() for rows in logits])
    for in_fp32, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        args.moe_zloss_in_fp32 = in_fp32
        z = batched_router_zloss(args)
        assert z.dtype == dtype
        torch.testing.assert_close(z.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def stack(count, **options):
    args = arguments(bias=False, moe_zloss_weight=0.1, **options)
    return nn.Sequential(*(megablocks.dMoE(args) for _ in range(count))), args


@pytest.mark.parametrize("num_layers", [1, 3])
def test_rounds_that_nobody_clears_do_not_pile_up(num_layers):
    model, args = stack(3, num_layers=num_layers)
    first = []

    def record(module, inputs, output):
        first.append(weakref.ref(output[0]))

    handle = model[0].router.register_forward_hook(record)
    model(torch.randn(2, 5, 6))
    handle.remove()
    gc.collect()
    assert first[0]() is not None  # kept for the loss
    assert len(megablocks.get_load_balancing_loss()) == 3  # every layer's, whatever num_layers says
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            model(torch.randn(2, 5, 6))
            assert (len(_LOADS), len(_LOGITS)) == (3, 3)
    for what in ("load-balancing loss", "router z-loss"):  # once each
        assert len([w for w in caught if f"the {what} of the first was cleared" in str(w.message)]) == 1
    gc.collect()
    assert first[0]() is None
    if num_layers == 3:  # what is left is one whole round, of the last forward
        own = megablocks.batched_load_balancing_loss(args)
        megablocks.clear_load_balancing_loss()
        assert own.requires_grad


def test_clearing_lets_the_graph_go():
    model, args = stack(2, num_layers=2)
    scores = []
    model[1].router.register_forward_hook(lambda module, inputs, output: scores.append(weakref.ref(output[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            out = model(torch.randn(2, 5, 6))
            (out.sum() + megablocks.batched_load_balancing_loss(args) + batched_router_zloss(args).sum()).backward()
            megablocks.clear_load_balancing_loss()
            clear_router_zloss()
            del out
            gc.collect()
    assert len(scores) == 3
    assert all(ref() is None for ref in scores)


def test_one_layer_called_twice_in_a_forward_counts_twice():
    layer, args = layer_with("dMoE", num_layers=2, bias=False)
    for _ in range(2):
        layer(layer(torch.randn(2, 3, 6)))
        assert len(_LOADS) == 2
        megablocks.batched_load_balancing_loss(args)
        megablocks.clear_load_balancing_loss()


def test_what_is_handed_out_is_the_callers_own_list():
    layer, _ = layer_with("dMoE")
    layer(torch.randn(2, 3, 6))
    handed = megablocks.get_load_balancing_loss()
    handed.clear()
    assert len(megablocks.get_load_balancing_loss()) == 1


def test_checkpointed_layers_leave_their_loss_once():
    torch.manual_seed(0)
    model, args = stack(2, num_layers=2)
    model = model.double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        y = x
        for layer in model:
            y = checkpoint(layer, y, use_reentrant=False) if checkpointed else layer(y)
        loss = y.sum() + megablocks.batched_load_balancing_loss(args) + batched_router_zloss(args).sum()
        megablocks.clear_load_balancing_loss()
        clear_router_zloss()
        loss.backward()
        assert len(_LOADS) == len(_LOGITS) == 0  # the second forward, inside backward, left nothing
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_loss_that_has_lost_its_graph_is_refused():
    model, args = stack(1)
    x = torch.randn(2, 5, 6, requires_grad=True)
    checkpoint(model, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"load-balancing loss has no graph.*use_reentrant=False"):
        megablocks.batched_load_balancing_loss(args)
    with pytest.raises(RuntimeError, match=r"router z-loss has no graph"):
        batched_router_zloss(args)
    with torch.no_grad():
        assert megablocks.batched_load_balancing_loss(args) > 0


# ---- Several forwards before a step


def micro_batches(count=3):
    torch.manual_seed(0)
    model, args = stack(2, num_layers=2)
    return model.double(), args, torch.randn(count, 5, 6, dtype=torch.float64)


def gradients_of(model):
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


def test_forwards_that_wait_for_their_backward_share_one_loss():
    """Gradient accumulation with one backward: the mean of what each micro-batch would have added by itself."""
    model, args, batches = micro_batches()
    total = torch.zeros(())
    for x in batches:
        total = (
            total + model(x).sum() + (megablocks.batched_load_balancing_loss(args) + batched_router_zloss(args)[1]) / 3
        )
        megablocks.clear_load_balancing_loss()
        clear_router_zloss()
    total.backward()
    one_by_one = gradients_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = sum(model(x).sum() for x in batches)
        assert [len(entries) for entries in _LOADS.rounds()] == [2, 2, 2]
        assert len(megablocks.get_load_balancing_loss()) == 6
        z = batched_router_zloss(args)
        assert z.shape == (6,)
        loss = together + megablocks.batched_load_balancing_loss(args) + z[1::2].mean()
    megablocks.clear_load_balancing_loss()
    clear_router_zloss()
    loss.backward()
    for plain, again in zip(one_by_one, gradients_of(model), strict=True):
        torch.testing.assert_close(plain, again)


def test_the_pair_of_losses_is_a_mean_over_micro_batches_too():
    model, args, batches = micro_batches()
    pairs = []
    for x in batches:
        model(x)
        pairs.append([loss.item() for loss in batched_load_balancing_and_z_loss(args)])
        megablocks.clear_load_balancing_loss()
        clear_router_zloss()
    outputs = [model(x) for x in batches]
    together = [loss.item() for loss in batched_load_balancing_and_z_loss(args)]
    assert together == pytest.approx(torch.tensor(pairs, dtype=torch.float64).mean(0).tolist())
    assert len(outputs) == 3


def test_a_forward_whose_backward_has_run_is_no_longer_counted():
    """One forward and one backward all the time, as Megatron does in its steady state, and nobody who clears."""
    model, args, batches = micro_batches(4)
    first, second = model(batches[0]).sum(), model(batches[1]).sum()
    assert len(_LOADS.rounds()) == 2
    first.backward()
    with pytest.warns(UserWarning, match="the load-balancing loss of the first was cleared"):
        third = model(batches[2]).sum()
    megablocks.clear_load_balancing_loss()
    clear_router_zloss()
    model(batches[2])
    alone = megablocks.batched_load_balancing_loss(args).item()
    megablocks.clear_load_balancing_loss()
    second, third = model(batches[1]).sum(), model(batches[2]).sum()
    second.backward()  # behind a newer forward
    assert [len(entries) for entries in _LOADS.rounds()] == [2]
    assert megablocks.batched_load_balancing_loss(args).item() == pytest.approx(alone)
    third.backward()  # of the last forward the loss may still be asked for
    assert megablocks.batched_load_balancing_loss(args).item() == pytest.approx(alone)


def test_a_forward_that_nobody_holds_is_no_longer_counted():
    model, _, batches = micro_batches()
    held = model(batches[0])
    kept = weakref.ref(megablocks.get_load_balancing_loss()[0][1])
    model(batches[1])
    assert len(_LOADS.rounds()) == 2
    del held
    assert kept() is None
    with pytest.warns(UserWarning, match="was cleared"):
        assert len(_LOADS.rounds()) == 1


def test_the_losses_of_stages_and_chunks_add_up_to_the_models():
    """As Megatron's schedules ask for them: behind the forward of each stage, or chunk, and each micro-batch."""
    torch.manual_seed(0)
    model, args = stack(4, num_layers=4)
    model, x = model.double(), torch.randn(2, 5, 6, dtype=torch.float64)
    (model(x).sum() + megablocks.batched_load_balancing_loss(args)).backward()
    megablocks.clear_load_balancing_loss()
    whole = gradients_of(model)
    for options, each in (
        ({"pipeline_model_parallel_size": 2}, 2),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, 1),
    ):
        args = arguments(num_layers=4, **options)
        y, loss = x, torch.zeros(())
        for first in range(0, 4, each):
            y = model[first : first + each](y)
            loss = loss + megablocks.batched_load_balancing_loss(args)
            megablocks.clear_load_balancing_loss()
        (y.sum() + loss).backward()
        for expected, got in zip(whole, gradients_of(model), strict=True):
            torch.testing.assert_close(expected, got)
    model[:2](x)
    with pytest.raises(
        ValueError, match=r"expected 1 layers .*num_layers_per_virtual_pipeline_stage = 1\), got 2 since"
    ):
        megablocks.batched_load_balancing_loss(args)


def test_layers_in_place_of_each_other_are_not_taken_for_micro_batches():
    model, args = stack(3, num_layers=1)
    outputs = [model(torch.randn(2, 5, 6)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"expected 1 layers .*got 3 and 3 since"):
        megablocks.batched_load_balancing_loss(args)
    assert len(outputs) == 2
