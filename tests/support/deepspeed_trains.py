"""DeepSpeed's engine trains a small model with dmoe's layers: run by ranks with the usual variables.

python deepspeed_trains.py OUT CASE ...
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE
from torch import nn

import dmoe

H, F, E, K, TOKENS, STEPS, LR = 8, 12, 4, 2, 16, 6, 0.2


class Model(nn.Module):
    """Two mixtures, one of them gated and with a shared expert, and what every rank has."""

    def __init__(self, *, ep_group: Any = None, loss_group: Any = None, aux_loss: str = "explicit") -> None:
        super().__init__()
        common = {"hidden_size": H, "ffn_hidden_size": F, "num_experts": E, "top_k": K, "aux_loss": aux_loss}
        common |= {"load_balancing_coefficient": 0.05, "load_balancing_over": "global", "bias": "expert"}
        common |= {"ep_group": ep_group, "dtensor": False, "loss_group": loss_group}
        self.first = nn.Linear(H, H)
        self.moe1 = dmoe.MoE(gated=False, activation="gelu", **common)
        self.moe2 = dmoe.MoE(gated=True, shared_ffn_hidden_size=F, router_bias=True, **common)
        self.last = nn.Linear(H, H)

    def forward(self, x):
        x = x + self.moe1(self.first(x))
        return self.last(x + self.moe2(x))


def batch(number: int, dtype=torch.float32):
    """Tokens and targets of a micro-batch of all ranks."""
    generator = torch.Generator().manual_seed(100 + number)
    return tuple(torch.randn(TOKENS, H, generator=generator).to(dtype) for _ in range(2))


def loss_of(model, x, y, aux):
    loss = nn.functional.mse_loss(model(x).float(), y.float())
    return loss + dmoe.aux_loss(model) if aux else loss


def build(**options):
    torch.manual_seed(7)
    return Model(**options)


CASES: dict[str, dict[str, Any]] = {}
for _stage in range(4):
    CASES[f"zero{_stage}"] = {"zero": {"stage": _stage}, "accumulate": 2, "clip": 0.05}
    CASES[f"zero{_stage} plain"] = {"zero": {"stage": _stage}}


for _stage in range(4):
    CASES[f"zero{_stage} ep2"] = {"zero": {"stage": _stage}, "accumulate": 2, "clip": 0.05, "ep": 2}
    CASES[f"zero{_stage} ep1"] = {"zero": {"stage": _stage}, "accumulate": 2, "clip": 0.05, "ep": 1}
for _stage in (1, 2):
    CASES[f"offload{_stage}"] = {
        "zero": {"stage": _stage, "offload_optimizer": {"device": "cpu"}},
        "accumulate": 2,
        "clip": 0.05,
    }
CASES["buckets2"] = {
    "zero": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 200, "allgather_bucket_size": 200},
    "accumulate": 2,
    "clip": 0.05,
}
for _stage in (0, 1, 2, 3):
    CASES[f"attached{_stage}"] = {"zero": {"stage": _stage}, "accumulate": 2, "clip": 0.05, "aux": "attached"}
    CASES[f"bf16 {_stage}"] = {
        "zero": {"stage": _stage},
        "accumulate": 2,
        "clip": 0.05,
        "aux": "attached",
        "dtype": torch.bfloat16,
        "config": {"bf16": {"enabled": True}},
    }
    CASES[f"fp16 {_stage}"] = {
        "zero": {"stage": _stage},
        "accumulate": 2,
        "clip": 0.05,
        "aux": "attached",
        "dtype": torch.float16,
        "config": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    }


for _stage in range(4):
    CASES[f"save{_stage}"] = {"zero": {"stage": _stage}, "save": True}
    CASES[f"save{_stage} ep1"] = {"zero": {"stage": _stage}, "save": True, "ep": 1}
    CASES[f"load{_stage}"] = {"zero": {"stage": _stage}, "load": f"ds_s2/save{_stage}/ckpt"}
    CASES[f"load{_stage} ep2"] = {"zero": {"stage": _stage}, "load": f"ds_s2/save{_stage}/ckpt", "ep": 2}
    CASES[f"load{_stage} ep1"] = {"zero": {"stage": _stage}, "load": f"ds_s2/save{_stage} ep1/ckpt", "ep": 1}

CASES["bf16 acc"] = {
    "zero": {"stage": 1},
    "accumulate": 2,
    "clip": 0.05,
    "dtype": torch.bfloat16,
    "config": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
for _stage in (1, 2):
    for _ep in (1, 2):
        CASES[f"universal{_stage} ep{_ep}"] = {"zero": {"stage": _stage}, "save": True, "ep": _ep, "adam": True, "config": ADAM}
        CASES[f"from universal{_stage} ep{_ep}"] = {"zero": {"stage": _stage}, "load": f"ds_u2/universal{_stage} ep2/universal", "ep": _ep, "adam": True, "config": {**ADAM, "checkpoint": {"load_universal": True}}}


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.get("accumulate", 1),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": case["zero"],
        "optimizer": {"type": "SGD", "params": {"lr": LR, "momentum": 0.9}},
        **case.get("config", {}),
    }
    if "clip" in case:
        config["gradient_clipping"] = case["clip"]
    return config


def train(engine, case, steps):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses, norms = [], []
    accumulate = case.get("accumulate", 1)
    for step in steps:
        total = 0.0
        for micro in range(accumulate):
            x, y = (
                each.chunk(world)[rank] for each in batch(step * accumulate + micro, case.get("dtype", torch.float32))
            )
            loss = loss_of(engine, x, y, aux=case.get("aux", "explicit") == "explicit")
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / accumulate
        torch.distributed.all_reduce(total)
        losses.append(total.item() / world)
        norms.append(engine.get_global_grad_norm())
    return losses, norms


def parameters_of(engine):
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().float().clone()
    return found


def run(out: Path, name: str) -> dict[str, Any]:
    from dmoe.integrations.deepspeed import expert_parallel_group, initialize

    case = CASES[name]
    world = torch.distributed.get_world_size()
    group = expert_parallel_group(case.get("ep", world))
    model = build(ep_group=group, loss_group=torch.distributed.group.WORLD, aux_loss=case.get("aux", "explicit"))
    engine, *_ = initialize(model=model, config=config_of(case))
    if case.get("save"):
        losses, norms = train(engine, case, range(STEPS // 2))
        engine.save_checkpoint(str(out / name / "ckpt"))
        torch.manual_seed(rank_seed := 99)
        model = Model(ep_group=group, loss_group=torch.distributed.group.WORLD)
        engine, *_ = initialize(model=model, config=config_of(case))
        path, _ = engine.load_checkpoint(str(out / name / "ckpt"))
        assert path is not None
        again = train(engine, case, range(STEPS // 2, STEPS))
        losses, norms = losses + again[0], norms + again[1]
    elif case.get("load"):
        path, _ = engine.load_checkpoint(str(out.parent / case["load"]), **case.get("how", {}))
        losses, norms = train(engine, case, range(STEPS // 2, STEPS))
    else:
        losses, norms = train(engine, case, range(STEPS))
    return {"losses": losses, "norms": norms, "parameters": parameters_of(engine)}


def main(out: Path, cases: list[str]) -> None:
    sys.modules["fairseq"] = None  # which DeepSpeed looks for, and which not every Python can import
    import deepspeed
    from deepspeed.comm.torch import TorchBackend

    # Shared memory between ranks, which it would compile first. By its globals: `deepspeed.comm.torch` is PyTorch.
    TorchBackend.__init__.__globals__["build_shm_op"] = lambda: None
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{out}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    results = {}
    for case in cases or CASES:
        try:
            results[case] = run(out, case)
        except Exception:
            import traceback

            results[case] = traceback.format_exc()
            print("FAILED", case, results[case][-1500:], flush=True)
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
