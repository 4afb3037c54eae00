"""``count``: the parameters of a training command, on the meta device: 142 billion of them need no memory."""

from __future__ import annotations

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import dmoe
from dmoe.integrations.fairseq_moe import branch_flags, commands
from dmoe.integrations.fairseq_moe.flags import FlagError


def cli_main() -> None:
    """Print what a ``train`` command with the same flags would build.

    ``--distributed-world-size`` says over how many ranks the experts are spread (by default over the devices here).
    """
    parser = options.get_training_parser()
    # The stock parser: what only matters to a run, such as the backend between ranks, is not looked at.
    args = options.parse_args_and_arch.__wrapped__(parser, modify_parser=commands.add_flags)
    branch_flags.settle(args)
    cfg = convert_namespace_to_omegaconf(args)
    ranks = cfg.distributed_training.distributed_world_size
    if args.moe_expert_count % ranks:
        raise FlagError(f"--moe-expert-count: expected a multiple of the {ranks} ranks, got {args.moe_expert_count}")
    with torch.device("meta"):
        model = tasks.setup_task(cfg.task).build_model(cfg.model)
    experts = sum(p.numel() for p in model.parameters() if dmoe.is_expert_param(p))
    others = sum(p.numel() for p in model.parameters()) - experts
    print(
        f"non-expert {others:,}, expert {experts // ranks:,} per rank on {ranks} rank{'s' * (ranks > 1)}: "
        f"{others + experts:,} in all"
    )
