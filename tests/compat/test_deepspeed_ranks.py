"""DeepSpeed's MoE on gloo ranks against the layer in one process: groups, results, gradients, state."""

from __future__ import annotations

import pytest
import rank_jobs_compat
import torch
from compat_cases import Ffn
from parallel_layer_cases import close
from rank_jobs_compat import WIDTH, H

from dmoe.compat.deepspeed import MoE

ONE = {"k": 1, "use_rts": False, "min_capacity": 1, "use_residual": True}
TWO = {"k": 2, "top2_2nd_expert_sampling": False, "min_capacity": 0}
THREE = {"k": 3, "capacity_factor": 0.5, "min_capacity": 0}
# Options; ranks, and how many of them share the experts; how they lie, None where the group is given.
CASES = [
    (ONE, 2, 2, None, [[0, 1]]),
    (TWO, 4, 2, False, [[0, 1], [2, 3]]),
    (THREE, 4, 2, True, [[0, 2], [1, 3]]),
    (TWO, 4, 4, False, [[0, 1, 2, 3]]),
]


@pytest.mark.parametrize(("options", "world", "ep_size", "layout", "groups"), CASES)
def test_a_layer_on_ranks_equals_the_layer_on_one(ranks, options, world, ep_size, layout, groups):
    torch.manual_seed(0)
    one = MoE(H, Ffn(H, WIDTH).double(), num_experts=4, **options)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    state = {name: value.clone() for name, value in one.state_dict().items()}
    shares = [tuple(torch.randn(n, H, dtype=torch.float64) for _ in range(2)) for n in (9, 4, 7, 6)[:world]]
    results = ranks.run(rank_jobs_compat.deepspeed, options, state, shares, ep_size, layout, ranks=world)
    by_rank = []
    for share in shares:
        one.zero_grad()
        by_rank.append(rank_jobs_compat.results_of(one, share))
    each = 4 // ep_size
    for group in groups:
        for place, rank in enumerate(group):
            got, single = results[rank], by_rank[rank]
            assert got["ranks"] == group
            for name in ("y", "l_aux", "x"):
                close(name, got[name], single[name])
            assert torch.equal(got["counts"], single["counts"])
            assert got["marks"] == {(True, False, f"ep_size_{ep_size}")}
            assert got["bytes_sent"] > 0
            for name, gradient in got["gradients"].items():
                if ".experts." in name:  # those of all tokens of the group, as DeepSpeed's layer leaves them
                    total = sum(by_rank[other]["gradients"][name] for other in group)
                    close(name, gradient, total[place * each : (place + 1) * each])
                    assert name not in got["unmarked"]
                else:
                    close(name, gradient, single["gradients"][name])
                    assert name in got["unmarked"]
            for name, value in got["state"].items():
                prefix, experts, rest = name.rpartition("deepspeed_experts.")
                n, _, tensor = rest.partition(".")
                whole = f"{prefix}{experts}{int(n) + place * each}.{tensor}" if experts else name
                assert torch.equal(value, state[whole])
            assert len(got["state"]) == len(state) - 4 * (4 - each)


def test_gradients_under_data_parallelism_are_those_of_one_process(ranks):
    torch.manual_seed(0)
    one = MoE(H, Ffn(H, WIDTH).double(), num_experts=4, **ONE)
    state = {name: torch.randn_like(value) for name, value in one.state_dict().items()}
    one.load_state_dict(state)
    shares = [tuple(torch.randn(n, H, dtype=torch.float64) for _ in range(2)) for n in (9, 4, 7, 6)]
    results = ranks.run(rank_jobs_compat.deepspeed_trained, ONE, state, shares)
    for x, grad_y in shares:
        y, l_aux, _ = one(x)
        (((y * grad_y).sum() + l_aux / 2) / 4).backward()
    for rank, gradients in enumerate(results):
        for name, parameter in one.named_parameters():
            first = rank % 2 * 2
            spread = ".experts." in name
            expected = parameter.grad[first : first + 2] if spread else parameter.grad
            close(name, gradients[name] / (2 if spread else 1), expected)


def test_groups_are_made_once_and_what_does_not_fit_is_said(ranks):
    for same, moved, indivisible, too_many in ranks.run(rank_jobs_compat.deepspeed_groups):
        assert same
        assert moved.startswith("ValueError: set_deepspeed_parallelism: expected the ranks [")
        assert indivisible == "ValueError: MoE: ep_size: expected a divisor of the number of ranks, 4, got 3"
        assert too_many == "ValueError: MoE: ep_group: expected a group of ep_size = 2 ranks, got 4"
