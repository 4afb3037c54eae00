"""What fairseq's flags for several ranks mean for a model with experts: kept, mapped or refused."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from importlib.util import find_spec
from typing import Any

import torch

from dmoe.integrations.fairseq_moe import profiling
from dmoe.integrations.fairseq_moe.flags import FlagError, has_moe_layers, read_flags

logger = logging.getLogger(__name__)

# Flag, the value at which it is off, and what to use instead. None of these knows that ranks hold different parameters.
_REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("use_bmuf", False, "--update-freq, which also makes ranks talk less often"),
    ("zero_sharding", "none", "--ddp-backend fully_sharded"),
    ("pipeline_model_parallel", False, "more ranks: the experts are spread over all"),
    ("model_parallel_size", 1, "more ranks: the experts are spread over all"),
    ("amp", False, "--fp16 or --bf16"),
    ("store_ema", False, "no moving average: it would keep one rank's experts only"),
    ("ddp_comm_hook", "none", "--memory-efficient-fp16, whose gradients travel in half precision"),
    ("heartbeat_timeout", -1, "torchrun, which ends all ranks when one fails"),
)
_BACKENDS = ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d", "fully_sharded")


def settle(args: Namespace, ranks: int) -> None:
    """Check and map parsed arguments, in place.

    Args:
        args: of any of fairseq's programs.
        ranks: processes of this run.

    Raises:
        FlagError: what cannot be, with what to use instead.
    """
    if getattr(args, "bf16", False) and find_spec("torch_xla") is None:
        args.tpu = False  # to fairseq 0.12.2, --bf16 means a TPU
    if getattr(args, "profile", False) and hasattr(args, "arch") and not torch.cuda.is_available():
        args.profile, profiling.on_cpu = False, True  # fairseq would start CUDA's profiler
    if getattr(args, "cpu", False) and ranks > 1:
        if not os.environ.get("WORLD_SIZE") and not getattr(args, "distributed_init_method", None):
            raise FlagError(
                f"--distributed-world-size: expected 1, got {ranks} with --cpu, where fairseq starts no processes; "
                f"start them by `torchrun --nproc_per_node {ranks} -m dmoe.integrations.fairseq_moe ...`"
            )
        if getattr(args, "distributed_backend", None) == "nccl":
            args.distributed_backend = "gloo"
            logger.info("--distributed-backend: nccl needs GPUs; with --cpu this is gloo")
    if getattr(args, "ddp_backend", None) == "fully_sharded":
        _settle_fsdp(args, ranks)
    flags = read_flags(args) if hasattr(args, "arch") else None
    if flags is None or ranks == 1 or not has_moe_layers(flags):
        return
    if args.ddp_backend not in _BACKENDS:
        raise FlagError(
            f"--ddp-backend: expected legacy_ddp, pytorch_ddp or fully_sharded with experts on several ranks, got "
            f"{args.ddp_backend}"
        )
    for name, off, instead in _REFUSED:
        value = getattr(args, name, off)
        if value not in (off, None):
            spelled = "--" + name.replace("_", "-")
            raise FlagError(f"{spelled}: expected none with experts on several ranks, got {value!r}; use {instead}")
    if args.ddp_backend in ("pytorch_ddp", "c10d") and not getattr(args, "find_unused_parameters", False):
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if getattr(args, name, 0):
                raise FlagError(
                    f"--{name.replace('_', '-')}: expected --find-unused-parameters or --ddp-backend legacy_ddp beside "
                    f"it, got {args.ddp_backend}, which waits for the gradients of layers that were left out"
                )


def _settle_fsdp(args: Namespace, ranks: int) -> None:
    if getattr(args, "cpu_offload", False):
        raise FlagError(
            "--cpu-offload: expected none: experts stay on the device that computes them; use more ranks, or "
            "--memory-efficient-fp16 and --checkpoint-activations"
        )
    if ranks == 1:
        args.ddp_backend = "legacy_ddp"
        logger.info("--ddp-backend fully_sharded: one rank has nothing to share; training without")
        return
    for name, told in (
        ("use_sharded_state", "experts are saved in a file for each rank and the rest in one"),
        ("not_fsdp_flatten_parameters", "PyTorch's FSDP2 never makes parameters flat"),
    ):
        if getattr(args, name, False):
            setattr(args, name, False)
            logger.info(f"--{name.replace('_', '-')}: {told}")
