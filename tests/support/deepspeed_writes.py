"""DeepSpeed's own engine saves models with its own MoE: run by two processes with the usual variables of ranks.

    python deepspeed_writes.py OUT CASE ...

A CASE is ``plain``, ``gated`` or ``residual``. ``OUT/CASE`` gets ``ckpt``, what ``save_checkpoint`` wrote, and
``run.pt``: input and output of every MoE layer in evaluation, in float64 (but for DeepSpeed's gate, which is float32).
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import torch
from deepspeed_starts import without_compiling
from patience import PATIENCE
from torch import nn

H, F, E, TOKENS = 8, 12, 4, 32


class Ffn(nn.Module):
    """Megatron's names."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(H, F)
        self.dense_4h_to_h = nn.Linear(F, H)

    def forward(self, x):
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Gated(nn.Module):
    """Llama's names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(H, F, bias=False)
        self.up_proj = nn.Linear(H, F, bias=False)
        self.down_proj = nn.Linear(F, H, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    """Two MoE layers with a linear between."""

    def __init__(self, case: str) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        expert = Gated if case == "gated" else Ffn
        options = {"num_experts": E, "ep_size": 2, "k": 1, "eval_capacity_factor": float(E), "min_capacity": TOKENS}
        self.moe1 = MoE(H, expert(), use_residual=case == "residual", **options)
        self.between = nn.Linear(H, H)
        self.moe2 = MoE(H, expert(), use_residual=case == "residual", **options)

    def forward(self, x):
        first = self.moe1(x)[0]
        between = self.between(first)
        second = self.moe2(between)[0]
        return [(x, first), (between, second)]


def main(out: Path, cases: list[str]) -> None:
    without_compiling()
    import deepspeed

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{out}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for case in cases:
        save(out / case, case)


def save(out: Path, case: str) -> None:
    import deepspeed

    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    model = Model(case)
    for module in model.modules():  # each rank its own experts; they begin as copies of one
        if type(module) in (Ffn, Gated):
            for number, parameter in enumerate(module.parameters()):
                generator = torch.Generator().manual_seed(1000 * rank + number + id_of(module, model))
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config={"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        dist_init_required=False,
    )
    engine.save_checkpoint(str(out / "ckpt"), tag="global_step0")
    engine.module.double().eval()
    x = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        found = engine.module(x)
    if rank == 0:
        torch.save({"layers": found}, out / "run.pt")
    torch.distributed.barrier()


def id_of(module: nn.Module, model: nn.Module) -> int:
    """A number of its own for every module."""
    return 10 * next(n for n, each in enumerate(model.modules()) if each is module)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
