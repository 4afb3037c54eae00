"""fairseq's training on several ranks: equal to one rank with as many micro-batches, whatever the backend."""

from __future__ import annotations

import math

import pytest
import rank_jobs_fairseq as jobs
from fairseq_pool import needs_fairseq
from fairseq_ranks import BACKENDS, alone, data, differences, failure, models, pool, train, train_pairs

pytestmark = needs_fairseq


@pytest.mark.parametrize(
    ("backend", "changes"),
    [(backend, {}) for backend in BACKENDS]
    + [(backend, {"checkpoint_activations": True, "update_freq": 2}) for backend in BACKENDS],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_two_ranks_equal_one_with_twice_the_micro_batches(backend, changes):
    """20 updates of Adam with clipping, by the norm of all gradients."""
    one = alone(update_freq=2 * changes.get("update_freq", 1))
    two = train(2, ddp_backend=backend, **changes)
    experts, others = differences(one["model"], models(two))
    print(f"{backend} {changes}: experts {experts:.1e}, others {others:.1e}")
    assert experts < 1e-6
    assert others < 1e-4
    for run in two:
        assert run["updates"] == 20
        assert run["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert run["losses"] == pytest.approx(one["losses"], abs=2e-3)  # logged with three digits
    assert min(one["norms"]) > 0.3  # clipping was at work


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_ranks_than_experts_hold_each_several_times(backend):
    one = alone(update_freq=4, moe_expert_count=2, max_update=6)
    four = train(4, ddp_backend=backend, moe_expert_count=2, max_update=6)
    experts, others = differences(one["model"], models(four)[:2])
    assert max(experts, others) < 2e-5
    assert differences(one["model"], models(four)[2:])[0] == experts
    for run in four:
        assert run["norms"] == pytest.approx(one["norms"], rel=1e-5)


def test_the_norm_is_that_of_all_gradients():
    """Seen in what one step of SGD changes, which is the gradient times the rate."""
    changes = {"optimizer": "sgd", "adam_betas": None, "clip_norm": 0, "max_update": 1, "moe_expert_count": 4}
    start, one = (alone(**changes, lr=rate, update_freq=2) for rate in (0, 0.5))
    squares = {
        name: ((value - start["model"][name]).double() / 0.5).square().sum().item()
        for name, value in one["model"].items()
        if not name.endswith(("_float_tensor", "output_projection.weight"))  # the latter is the embedding's
    }
    of_experts = sum(square for name, square in squares.items() if ".experts." in name)
    assert one["norms"][0] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-4)
    assert math.sqrt(sum(squares.values()) - of_experts) < one["norms"][0] * (1 - 1e-3)


@pytest.mark.parametrize(("ranks", "experts", "backend"), [(2, 4, "legacy_ddp"), (4, 2, "pytorch_ddp")])
def test_root_of_the_ranks_as_normalisation(ranks, experts, backend):
    """One step of SGD: experts move by sqrt(W) times as much, all else as ever."""
    changes = {"optimizer": "sgd", "adam_betas": None, "clip_norm": 0, "lr": 0.5, "max_update": 1}
    changes |= {"moe_expert_count": experts}
    start = alone(**{**changes, "lr": 0, "update_freq": ranks})["model"]
    one = alone(**changes, update_freq=ranks)["model"]
    root = train(ranks, **changes, moe_normalize_expert_grad="sqrt_world_size", ddp_backend=backend)
    factor = {name: math.sqrt(ranks) if ".experts." in name else 1.0 for name in one}
    expected = {name: start[name] + factor[name] * (one[name] - start[name]) for name in one}
    assert differences(one, models(root)[: min(ranks, experts)])[0] > 1e-3
    assert max(differences(expected, models(root)[: min(ranks, experts)])) < 1e-6


HALF = {
    "fp16": {"fp16": True},
    "memory_efficient_fp16": {"memory_efficient_fp16": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize(
    ("backend", "half"),
    [
        ("legacy_ddp", "fp16"),
        ("legacy_ddp", "memory_efficient_fp16"),
        ("pytorch_ddp", "memory_efficient_fp16"),
        ("fully_sharded", "fp16"),
        ("fully_sharded", "memory_efficient_fp16"),
        ("fully_sharded", "bf16"),
    ],
)
def test_half_precision_on_two_ranks(backend, half):
    """Close to float32 on one rank; an overflow in one rank's expert is every rank's: all skip the step."""
    poison = (1, 3) if half != "bf16" else None
    one = alone(update_freq=2, lr=0.005)
    changes = {"lr": 0.005, "checkpoint_activations": True, "fp16_init_scale": 4, **HALF[half]}
    two = train(2, poison, ddp_backend=backend, **changes)
    assert [run["updates"] for run in two] == [20, 20]
    tolerance = 0.05 if half == "bf16" else 0.01
    if poison:
        assert two[0]["scales"] == two[1]["scales"] == [4.0, 4.0] + [2.0] * 19
        assert len(two[0]["norms"]) == len(two[1]["norms"]) == 20  # the overflow was no step
    for run in two:
        assert run["norms"][:2] == pytest.approx(one["norms"][:2], rel=tolerance)
        assert run["losses"][:2] == pytest.approx(one["losses"][:2], rel=tolerance)
        assert run["losses"][-1] < run["losses"][0] - 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"moe_expert_count": 3},
            "--moe-expert-count: expected a multiple of the 2 ranks, or a divisor of them,",
        ),
        ({"ddp_backend": "slowmo"}, "--ddp-backend: expected legacy_ddp, pytorch_ddp or fully_sharded"),
        ({"ddp_backend": "fully_sharded", "cpu_offload": True}, "--cpu-offload: expected none: experts stay"),
        ({"use_bmuf": True}, "--use-bmuf: expected none with experts on several ranks, got True; use"),
        ({"zero_sharding": "os"}, "--zero-sharding: expected none with experts on several ranks, got 'os'; use"),
        ({"amp": True}, "--amp: expected none with experts on several ranks, got True; use --fp16 or --bf16"),
        ({"store_ema": True}, "--store-ema: expected none with experts on several ranks"),
        ({"dummy_a2a": True}, "--dummy-a2a: expected one rank, got more"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_several_ranks_cannot_have_is_told_on_each(changes, told):
    for error in failure(2, no_save=True, **changes):
        assert told in error
        assert "\n" not in error


@pytest.mark.parametrize(("ranks", "backend"), [(1, "pytorch_ddp"), *((2, backend) for backend in BACKENDS)])
def test_a_gradient_that_is_no_number_is_looked_for(tmp_path, ranks, backend):
    """fairseq runs the batch again and names modules; then every rank ends with its error."""
    argv = [data(), *jobs.flags(ddp_backend=backend, save_dir=tmp_path, max_update=1)]
    for error, said in pool().run(jobs.not_a_number, argv, ranks=ranks):
        assert error == "gradients are Nan/Inf"
        assert any(line.startswith("NaN detected in output of decoder.layers.1.moe_layer") for line in said)
        assert any("moe_layer.moe.experts" in line for line in said if line.startswith("norms:"))


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_encoder_and_decoder_on_two_ranks(backend, experts):
    """Equal to one rank, though encoder layers hold parameters that nothing is computed with."""
    (one,) = train_pairs(1, experts, "--update-freq", "2")
    for run in train_pairs(2, experts, "--ddp-backend", backend):
        assert run["updates"] == 3
        assert run["losses"] == pytest.approx(one["losses"], abs=2e-3)
        assert run["norms"] == pytest.approx(one["norms"], rel=1e-5)
