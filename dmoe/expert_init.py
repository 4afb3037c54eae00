"""Initial values of experts: expert e's are a function of (seed, e), so who holds which expert does not change them."""

from __future__ import annotations

import torch

from dmoe.expert_slice import ExpertSlice
from dmoe.expert_weights import F_DIM, ExpertWeights
from dmoe.initial import expert_weight


def expert_generator(seed: int, expert: int) -> torch.Generator:
    """Random numbers of one expert: a function of (seed, expert), whoever holds it."""
    return torch.Generator(device="cpu").manual_seed((seed + expert * 0x9E3779B97F4A7C15) % 2**63)


def draw_initial_seed() -> int:
    """A seed from PyTorch's default generator, whatever the default device is."""
    return int(torch.randint(2**62, (), device="cpu").item())


@torch.no_grad()
def initialise(
    weights: ExpertWeights,
    owned: ExpertSlice,
    seed: int,
    std: float | None,
    init: str = "linear",
    frozen_down_bias: bool = False,
) -> None:
    """Fresh values for the experts of one rank, written in place.

    Args:
        weights: of the experts, or the parts of them, that live here.
        owned: which those are. Each expert's values are drawn whole, and the part of F that lives here is kept.
        seed: of all experts.
        std: of a normal distribution, beside zero biases; None is as ``init`` says.
        init: a name of ``MoEConfig.init``.
        frozen_down_bias: biases of the down projection are zero.
    """
    for position, expert in enumerate(owned.experts):
        generator = expert_generator(seed, expert)
        of_expert = weights.of_expert(position)
        width = of_expert["down_proj"].shape[-1] * owned.num_shards
        for name, tensor in of_expert.items():
            shape, dim = list(tensor.shape), F_DIM[name]
            if dim is not None:
                shape[dim] *= owned.num_shards
            fresh = torch.empty(shape, dtype=torch.float32, device="cpu")
            down = name.startswith("down")
            expert_weight(
                fresh,
                init,
                std,
                is_bias=not name.endswith("proj"),
                fan_in=width if down else weights.hidden_size,
                fan_out=weights.hidden_size if down else width,
                generator=generator,
            )
            if frozen_down_bias and name == "down_bias":
                fresh.zero_()
            if dim is not None:
                columns = owned.columns(shape[dim])
                fresh = fresh.narrow(dim, columns.start, columns.stop - columns.start)
            tensor.copy_(fresh)
