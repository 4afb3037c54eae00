"""Runs the jobs of torchtitan_jobs.py, in a process of its own, as torchtitan is on the path of no other.

    python torchtitan_ranks.py FOLDER

One process imports torchtitan, which takes seconds, and every rank is a fork of it. FOLDER/JOB.pt is what the first
rank has returned of a job, FOLDER/JOB.error.txt what a rank has raised; ranks that failed do no more jobs.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

from patience import PATIENCE

from dmoe.integrations.torchtitan import fit_torch, run_on_cpu

fit_torch()
run_on_cpu()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torchtitan_jobs as jobs  # noqa: E402 - after run_on_cpu
from torchtitan import trainer  # noqa: E402


def _serve(folder, stage, rank, world, names):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "STAGE": str(stage)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # as in conftest: memory nobody wrote is NaN
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the group itself
    store = f"file://{folder}/store{stage}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE))
    trainer.time.sleep = lambda seconds: None  # it waits for other ranks' output
    for name in names:
        started = time.process_time()
        try:
            answer = getattr(jobs, name)(folder)
        except Exception:
            (folder / f"{name}.error.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
            return 1
        if rank == 0:
            torch.save(answer, folder / f"{name}.pt")
            print(f"{name}: {time.process_time() - started:.1f} s of processor time of the first rank", flush=True)
    return 0


def main(folder):
    logging.disable(logging.INFO)
    for stage, (world, names) in enumerate(jobs.STAGES):
        ranks = []
        for rank in range(world):
            ranks.append(os.fork())
            if not ranks[-1]:
                os._exit(_serve(folder, stage, rank, world, names))
        for rank in ranks:
            os.waitpid(rank, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
