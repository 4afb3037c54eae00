"""DeepSpeed's engine trains a small model with dmoe's layers, on 2, 4 and 1 ranks of this machine.

    python deepspeed_trains.py OUT EXAMPLE

``OUT/W`` gets ``rank{r}.pt``, what each of W ranks found in every case of theirs, and what cases save. Two ranks run
the script EXAMPLE as well, which saves into ``OUT/example``, and what the page on DeepSpeed shows.
"""

from __future__ import annotations

import datetime
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import deepspeed_cases as cases
import torch
import torch.distributed as dist
from deepspeed_starts import without_compiling
from doc_blocks import run_page
from patience import PATIENCE
from torch import multiprocessing

import dmoe


def main(out: Path, example: str) -> None:
    without_compiling()  # once: ranks are forks of this process, as to import it takes longer than most cases
    for world in cases.CASES:
        multiprocessing.start_processes(one_rank, (world, out, example), nprocs=world, start_method="fork")


def one_rank(rank: int, world: int, out: Path, example: str) -> None:
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/store{world}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # It asks oneDNN whether this processor is fast in it; PyTorch computes in it on any.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    (out / str(world)).mkdir(exist_ok=True)
    found = {name: run(out, name, case) for name, case in cases.CASES[world].items()}
    if world > 1:
        import deepspeed_refuses

        found["refused"] = deepspeed_refuses.sentences(out)
    torch.save(found, out / str(world) / f"rank{rank}.pt")
    if world == 2:
        sys.argv = [example, "--ep-size", "2", "--steps", "10", "--save", str(out / "example")]
        runpy.run_path(example, run_name="__main__")
        os.chdir(out)
        run_page("deepspeed.md")
    dist.barrier()  # nobody leaves while others wait


def run(out: Path, name: str, case: cases.Case) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    folder, middle = out / str(world) / name, cases.STEPS // 2
    engine = engine_of(case, seed=99 if case.load else 7)
    if case.load:
        theirs = "universal" if "checkpoint" in case.config else "ckpt"
        path, _ = engine.load_checkpoint(str(out / case.load / theirs), load_optimizer_states=not case.weights)
        assert path is not None
        if case.weights:
            return result(engine, ([], [], []))
        return result(engine, train(engine, case, range(middle, cases.STEPS)))
    if not case.resume:
        return result(engine, train(engine, case, range(cases.STEPS)))
    first = train(engine, case, range(middle))
    engine.save_checkpoint(str(folder / "ckpt"))
    if name == "universal" and rank == 0:
        from dmoe.integrations.deepspeed import to_universal

        to_universal(folder / "ckpt" / f"global_step{middle}", folder / "universal" / f"global_step{middle}")
    engine = engine_of(case, seed=99)
    assert engine.load_checkpoint(str(folder / "ckpt"))[0] is not None
    second = train(engine, case, range(middle, cases.STEPS))
    return result(engine, tuple(a + b for a, b in zip(first, second, strict=True)))


def engine_of(case: cases.Case, seed: int) -> Any:
    from dmoe.integrations.deepspeed import expert_parallel_group, initialize, param_groups, prepare

    world = dist.get_world_size()
    groups = {} if case.compat else {"ep_group": expert_parallel_group(case.ep or world)}
    groups |= {} if case.compat else {"loss_group": dist.group.WORLD}
    model = cases.build(case, world, seed, **groups)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": case.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": case.zero,
        "optimizer": case.optimizer,
        **case.config,
    }
    optimizer = None
    if case.own:
        prepare(model, config)
        optimizer = torch.optim.SGD(param_groups(model), **case.optimizer["params"])
    return initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, case: cases.Case, steps: range) -> tuple[list, ...]:
    """Losses over all ranks, the engine's norms and loss scales, of each step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses, norms, scales = [], [], []
    for step in steps:
        total = torch.zeros(())
        for micro in range(case.accumulate):
            x, y = (each.chunk(world)[rank] for each in cases.batch(step * case.accumulate + micro))
            loss = cases.loss_of(case, engine, x, y)
            poison = step == case.overflow and micro == 0 and rank == world - 1
            hook = engine.module.moe1.experts.down_proj.register_hook(lambda g: g * torch.inf) if poison else None
            engine.backward(loss)
            if hook is not None:
                hook.remove()
            engine.step()
            total += loss.detach().float() / case.accumulate
        if not case.compat:
            dmoe.update_selection_bias(engine.module)
        dist.all_reduce(total)
        losses.append(total.item() / world)
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
        scales.append(getattr(engine.optimizer, "loss_scale", None))
    return losses, norms, scales


def result(engine: Any, told: tuple[list, ...]) -> dict[str, Any]:
    import deepspeed

    tensors = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            tensors[name] = parameter.detach().float().clone()
    tensors |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    return {**dict(zip(("losses", "norms", "scales"), told, strict=True)), "tensors": tensors} | {
        "skipped": engine.skipped_steps
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
